"""What `read_checkpoint` makes of what it reads: wrappers, prefixes, pickled modules."""

from __future__ import annotations

import argparse
import collections
import pathlib
import pickletools
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from gam_flax.convert.checkpoint import from_mapping, from_module, read_checkpoint
from gam_flax.convert.errors import CheckpointError
from tests.convert.saving import assert_holds, lost, nn, save, torch, weights

# Wrappers


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    "wrapper",
    ["ema", "ema_state_dict", "model_ema", "state_dict_ema", "state_dict", "model_state_dict",
     "model", "net", "network", "params", "weights", "module", "generator"],
)  # fmt: skip
def test_wrappers(tmp_path, legacy, wrapper):
    contents = {
        "epoch": 3,
        "best_acc1": torch.tensor([71.5]),
        "optimizer": OPTIMIZER,
        "scaler": {"scale": torch.ones(1)},
        wrapper: weights(),
        "optimizer_g": {"anything": torch.ones(2)},
        "custom": OPTIMIZER,
    }
    found = read_checkpoint(save(contents, tmp_path / "net.pth.tar", legacy=legacy))
    assert_holds(found, weights())
    assert found.stripped == (wrapper,)


@pytest.mark.parametrize(
    ("contents", "stripped"),
    [
        ({"model": {"state_dict": weights()}}, ("model", "state_dict")),
        ({"anything": {"else": {"net": weights()}}}, ("anything", "else", "net")),
        ({"state_dict": weights(1), "ema": weights()}, ("ema",)),
        ({"state_dict": weights(), "ema": None}, ("state_dict",)),
        ({"state_dict": weights(), "ema": {"shadow": [torch.ones(2)]}}, ("state_dict",)),
        ({"model": weights(), "net": weights(1)}, ("model",)),
        ({"hooks": {}, "step": torch.tensor(3), "student": weights()}, ("student",)),
        ({**weights(), "num_classes": 3, "name": "x", "_extra_state": None, 7: "seven"}, ()),
    ],
)  # fmt: skip
def test_which_of_several(tmp_path, contents, stripped):
    found = read_checkpoint(save(contents, tmp_path / "net.pt"))
    assert_holds(found, weights())
    assert found.stripped == stripped


def test_entry_chooses(tmp_path):
    contents = {"G": weights(), "D": weights(1), "ema": weights(2), "epoch": 1}
    path = save(contents, tmp_path / "gan.pt")
    assert_holds(read_checkpoint(path), weights(2))
    assert_holds(read_checkpoint(path, entry="D"), weights(1))
    with pytest.raises(
        CheckpointError, match="no entry 'E' with tensors in it; entries: G, D, ema"
    ):
        read_checkpoint(path, entry="E")
    with pytest.raises(CheckpointError, match="no entry 'epoch'"):
        read_checkpoint(path, entry="epoch")
    path = save({"nets": {"G": weights(), "D": weights(1)}}, tmp_path / "gan.pt")
    with pytest.raises(CheckpointError, match="several entries have tensors: G, D; .* entry="):
        read_checkpoint(path)
    assert_holds(read_checkpoint(path, entry="G"), weights())
    assert read_checkpoint(path, entry="G").stripped == ("nets", "G")


def test_files_without_weights(tmp_path):
    for contents in ({"epoch": 3}, {}, [torch.ones(2)], torch.ones(2), 7, {"optimizer": OPTIMIZER}):
        with pytest.raises(CheckpointError, match="there are no tensors in it"):
            read_checkpoint(save(contents, tmp_path / "net.pt"))


def test_names_that_are_no_strings(tmp_path):
    with pytest.raises(CheckpointError, match="a tensor is named by 7, not by a string"):
        read_checkpoint(save({**weights(), 7: torch.ones(2)}, tmp_path / "net.pt"))


def test_metadata_of_our_own(tmp_path):
    contents = {"state_dict": weights(), "gam_attention": {"variant": "gated", "ratio": 4}}
    found = read_checkpoint(save(contents, tmp_path / "net.pt"))
    assert found.metadata == {"variant": "gated"}


def test_files_in_flax_layout_are_left_alone(tmp_path):
    save_file({"module.w": np.ones(2)}, tmp_path / "net.safetensors", metadata={"format": "flax"})
    found = read_checkpoint(tmp_path / "net.safetensors")
    assert (found.layout, list(found.tensors), found.stripped) == ("flax", ["module.w"], ())


# Prefixes


@pytest.mark.parametrize(
    ("keys", "plain", "stripped"),
    [
        (["module.a.w", "module.b"], ["a.w", "b"], ("module.",)),
        (["module.module.w", "module.module.v"], ["w", "v"], ("module.", "module.")),
        (["_orig_mod.module.w"], ["w"], ("_orig_mod.", "module.")),
        (["module._orig_mod.w"], ["w"], ("module.", "_orig_mod.")),
        (["module.w", "n_averaged"], ["module.w", "n_averaged"], ()),
        (["module.module.w", "module.v"], ["module.w", "v"], ("module.",)),
        (["a._orig_mod.b._orig_mod.w", "c"], ["a.b.w", "c"], ("_orig_mod.",)),
        (["module.a._orig_mod.w", "module.c"], ["a.w", "c"], ("module.", "_orig_mod.")),
        (["model.0.w", "model.1.w"], ["model.0.w", "model.1.w"], ()),
        (["submodule.w", "my_orig_mod.w"], ["submodule.w", "my_orig_mod.w"], ()),
        (["module", "module_list.w"], ["module", "module_list.w"], ()),
    ],
)
def test_prefixes(keys, plain, stripped):
    found = from_mapping({key: np.full(2, i) for i, key in enumerate(keys)})
    assert list(found.tensors) == plain
    assert [int(array[0]) for array in found.tensors.values()] == list(range(len(keys)))
    assert found.stripped == stripped


def test_prefixes_that_collide():
    with pytest.raises(CheckpointError, match="'a._orig_mod.w' and 'a.w' are the same without"):
        from_mapping({"a._orig_mod.w": np.ones(2), "a.w": np.ones(2)})


def test_a_million_prefixes():
    deep = "module." * 1_000_000
    found = from_mapping({f"{deep}w": np.ones(2), f"{deep}v": np.ones(2)})
    assert list(found.tensors) == ["w", "v"]


# Pickled modules


class Attention(nn.Module):
    """Has what pickled YOLO modules have: sets, tensors and numpy numbers as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_parameter("nothing", None)
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("transient", torch.zeros(3), persistent=False)
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.BatchNorm2d(3)))
        self.group = nn.GroupNorm(1, 3, eps=1e-6)
        self.layers[1][0].eps, self.layers[1][0].momentum = 1e-3, 0.03
        self.last = self.layers[1][0]  # the same module under another name
        self.names, self.stride = {"cat", "dog"}, torch.tensor([8.0])
        self.best_acc = np.float64(0.5)


NORMS = {
    "layers.1.0": {"eps": 1e-3, "momentum": 0.03},
    "group": {"eps": 1e-6, "momentum": None},
    "last": {"eps": 1e-3, "momentum": 0.03},
}


@pytest.mark.parametrize("wrapper", ["ema", "model", None])
def test_a_pickled_module_of_a_class_that_is_gone(tmp_path, legacy, wrapper):
    with lost(Attention):
        module = Attention().half()
        contents = {wrapper: module, "epoch": 3, "updates": None} if wrapper else module
        path = save(contents, tmp_path / "best.pt", legacy=legacy)
    found = read_checkpoint(path)
    assert_holds(found, module.state_dict())
    assert found.norms == NORMS
    assert found.stripped == ((wrapper,) if wrapper else ())
    assert found.tensors["scale"].dtype == np.float16


def test_a_pickled_module_in_data_parallel(tmp_path, legacy):
    module = nn.DataParallel(nn.Sequential(nn.BatchNorm1d(3, eps=1e-3)))
    found = read_checkpoint(save(module, tmp_path / "net.pt", legacy=legacy))
    assert list(found.tensors) == list(module.module.state_dict())
    assert found.stripped == ("module.",)
    assert found.norms == {"0": {"eps": 1e-3, "momentum": 0.1}}


def test_the_module_before_the_state_dict_of_no_ema(tmp_path):
    contents = {"model": nn.Linear(2, 2), "ema": None, "optimizer": None}
    assert read_checkpoint(save(contents, tmp_path / "last.pt")).stripped == ("model",)


def test_a_module_without_tensors(tmp_path):
    with pytest.raises(CheckpointError, match="there are no tensors in it"):
        read_checkpoint(save(nn.ReLU(), tmp_path / "net.pt"))


def test_names_that_collide_in_a_pickled_module(tmp_path):
    module = nn.Sequential(nn.Linear(2, 2))
    module._parameters["0.weight"] = nn.Parameter(torch.ones(2))
    with pytest.raises(CheckpointError, match="its model has two tensors '0.weight'"):
        read_checkpoint(save(module, tmp_path / "net.pt"))
    module._parameters = {3: nn.Parameter(torch.ones(2))}  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match="'_parameters' in its model has the name 3"):
        read_checkpoint(save(module, tmp_path / "net.pt"))


# What else training code leaves in files


class AttributeDict(dict):
    """As Lightning's: a dict with attributes."""


class Ordered(collections.OrderedDict):
    pass


class Paths(list):
    pass


class Config:
    __slots__ = ("a", "b")


def test_classes_of_all_kinds_around_the_weights(tmp_path, legacy):
    extras = {
        "hyper_parameters": AttributeDict(lr=0.1, nested=AttributeDict(a=1)),
        "metrics": collections.defaultdict(list, {"loss": [1, 2]}),
        "counts": collections.Counter("aab"),
        "queue": collections.deque([1, 2]),
        "paths": Paths(["a", "b"]),
        "path": pathlib.PurePosixPath("runs/1"),
        "args": argparse.Namespace(lr=0.1, device=torch.device("cuda:0"), sizes={1, 2}),
        "best": np.float64(0.5),
        "rng": [np.arange(3), torch.get_rng_state(), np.random.RandomState(0).get_state()],
        "dtype": [torch.float16, np.dtype("float32")],
        "range": [range(3), slice(1, 2), frozenset({1}), b"bytes", 1 + 2j, 2**70],
        "amount": Config(),
    }
    extras["hyper_parameters"].attribute = 1
    with lost(AttributeDict, Ordered, Paths, Config):
        contents = {"state_dict": Ordered(weights()), **extras}
        path = save(contents, tmp_path / "epoch=3.ckpt", legacy=legacy)
    found = read_checkpoint(path)
    assert_holds(found, weights())
    assert found.stripped == ("state_dict",)


def test_state_dicts_with_attributes(tmp_path, legacy):
    """`state_dict()` carries `_metadata`; numbers of batches may be missing."""
    state_dict = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)).state_dict()
    assert_holds(read_checkpoint(save(state_dict, tmp_path / "net.pt", legacy=legacy)), state_dict)
    del state_dict["0.num_batches_tracked"]
    assert_holds(read_checkpoint(save(state_dict, tmp_path / "old.pt", legacy=legacy)), state_dict)


def test_parameters_as_values(tmp_path, legacy):
    contents = {"w": nn.Parameter(torch.ones(2)), "v": torch.ones(2, requires_grad=True)}
    contents["w"].tag = "kept by torch as an attribute"
    found = read_checkpoint(save(contents, tmp_path / "net.pt", legacy=legacy))
    assert [array.tolist() for array in found.tensors.values()] == [[1, 1], [1, 1]]


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_other_pickle_protocols_end_in_success_or_one_line(tmp_path, protocol):
    path = tmp_path / "net.pt"
    torch.save(weights(), path, pickle_protocol=protocol)
    with zipfile.ZipFile(path) as archive:
        opcodes = {op.name for op, _, _ in pickletools.genops(archive.read("net/data.pkl"))}
    if opcodes & {"FRAME", "STACK_GLOBAL"}:
        with pytest.raises(CheckpointError, match="save it again with torch.save and its default"):
            read_checkpoint(path)
    else:
        assert_holds(read_checkpoint(path), weights())


# Memory


def test_mappings_of_torch_numpy_and_jax_arrays():
    jnp = pytest.importorskip("jax.numpy")
    found = from_mapping(
        {"model": {"a": torch.ones(2), "b": np.ones(2), "c": jnp.ones(2, jnp.bfloat16), "d": 3}},
        path="given.pt",
    )
    assert [array.dtype.name for array in found.tensors.values()] == [
        "float32",
        "float64",
        "bfloat16",
    ]
    assert (found.container, found.stripped, found.path) == ("memory", ("model",), "given.pt")


def test_mappings_that_hold_no_numbers():
    with pytest.raises(CheckpointError, match="^net: 'a' is an array of object"):
        from_mapping({"a": np.array([None])}, path="net")
    with pytest.raises(CheckpointError, match="^the state_dict in memory: there are no tensors"):
        from_mapping({})


def test_live_modules():
    module = Attention()
    found = from_module(module)
    assert_holds(found, module.state_dict())
    assert found.norms == NORMS
    assert (found.container, found.stripped, found.path) == ("memory", (), "")
    found = from_module(nn.DataParallel(module))
    assert (list(found.tensors), found.norms) == (list(module.state_dict()), NORMS)
    assert found.stripped == ("module.",)
    compiled = nn.Sequential(nn.BatchNorm2d(3))
    compiled = nn.ModuleDict({"a": nn.ModuleDict({"_orig_mod": compiled})})
    assert from_module(compiled).norms == {"a.0": {"eps": 1e-5, "momentum": 0.1}}
    assert from_module(nn.BatchNorm2d(3, momentum=None)).norms == {
        "": {"eps": 1e-5, "momentum": None}
    }
    assert from_mapping({"model": module}).norms == NORMS
