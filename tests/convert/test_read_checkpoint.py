"""What `read_checkpoint` reads, and what it makes of it."""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import pathlib
import pickletools
import subprocess
import sys
import types
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from gam_flax.convert.checkpoint import from_mapping, from_module, read_checkpoint
from gam_flax.convert.errors import CheckpointError
from tests.convert import attacks

torch = pytest.importorskip("torch", reason=".pt files are read through torch")
nn = torch.nn

REAL = Path(__file__).parents[2].parent / "shared" / "data"


def weights(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(3, 2, 1, 1, generator=generator),
        "conv.bias": torch.randn(3, generator=generator),
    }


def save(contents: Any, path: Path, *, legacy: bool = False) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch looks for the source of classes in vain
        torch.save(contents, path, _use_new_zipfile_serialization=not legacy)
    return path


def assert_holds(found: Any, expected: dict[str, Any]) -> None:
    assert list(found.tensors) == list(expected)
    for key, tensor in expected.items():
        array = found.tensors[key]
        assert array.shape == tuple(tensor.shape)
        stored = tensor.detach().clone().reshape(-1).view(torch.uint8)
        assert array.tobytes() == stored.numpy().tobytes()


@pytest.fixture(params=[False, True], ids=["zip", "legacy"])
def legacy(request: pytest.FixtureRequest) -> bool:
    return request.param


@contextlib.contextmanager
def lost(*classes: type) -> Iterator[None]:
    """Gives classes a home in a module `models.common` that is gone when they are read."""
    names = ["models", "models.common"]
    home = types.ModuleType("models.common")
    sys.modules.update(zip(names, [types.ModuleType("models"), home], strict=True))
    for cls in classes:
        cls.__module__, cls.__qualname__ = "models.common", cls.__name__
        setattr(home, cls.__name__, cls)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


# Containers and dtypes


def test_both_containers_of_torch(tmp_path, legacy):
    found = read_checkpoint(save(weights(), tmp_path / "net.pt", legacy=legacy))
    assert_holds(found, weights())
    assert found.container == ("legacy" if legacy else "zip")
    assert (found.stripped, found.metadata, found.norms, found.layout) == ((), {}, {}, "torch")
    assert found.path == str(tmp_path / "net.pt")


def test_safetensors(tmp_path):
    arrays = {key: value.numpy() for key, value in weights().items()}
    save_file(arrays, tmp_path / "net.safetensors", metadata={"format": "pt", "by": "us"})
    found = read_checkpoint(tmp_path / "net.safetensors")
    assert {k: v.tobytes() for k, v in found.tensors.items()} == {
        k: v.tobytes() for k, v in arrays.items()
    }
    assert found.container == "safetensors"
    assert found.metadata == {"format": "pt", "by": "us"}


def test_the_content_decides_not_the_suffix(tmp_path, legacy):
    named = save(weights(), tmp_path / "torch.safetensors", legacy=legacy)
    assert_holds(read_checkpoint(named), weights())
    save_file({"w": np.zeros(2)}, tmp_path / "safe.pt")
    assert read_checkpoint(str(tmp_path / "safe.pt")).container == "safetensors"


DTYPES = [
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz",
    "int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool complex64 complex128",
]


@pytest.mark.parametrize("dtype", " ".join(DTYPES).split())
def test_dtypes_are_kept(tmp_path, legacy, dtype):
    kept = getattr(torch, dtype)
    tensor = torch.tensor([0, 1, 1, 0, 1, 0]).to(kept).reshape(2, 3)
    contents = {"w": tensor, "t": tensor.T, "scalar": tensor[1, 0], "none": tensor[:0]}
    path = save(contents, tmp_path / "net.pt", legacy=legacy)
    if legacy and (dtype.startswith("float8") or dtype in ("uint16", "uint32", "uint64")):
        with pytest.raises(CheckpointError, match="damaged"):  # torch does not read them either
            read_checkpoint(path)
        return
    found = read_checkpoint(path)
    assert_holds(found, contents)
    assert {array.dtype.name for array in found.tensors.values()} == {dtype}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "bool"])
def test_dtypes_of_safetensors(tmp_path, dtype):
    array = np.array([[0, 1, 2]]).astype(getattr(ml_dtypes, dtype, dtype))
    arrays = {"w": array, "scalar": np.array(array[0, 1]), "none": array[:0]}
    save_file(arrays, tmp_path / "net.safetensors")
    found = read_checkpoint(tmp_path / "net.safetensors").tensors
    for key, expected in arrays.items():
        assert (found[key].dtype, found[key].shape) == (expected.dtype, expected.shape)
        assert found[key].tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse: call .to_dense"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse: call .to_dense"),
        (lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8), "quantized: call"),
        (lambda: torch.empty(3, device="meta"), "on the meta device"),
        (lambda: torch.zeros(2, dtype=torch.complex32), "complex32"),
    ],
)
def test_tensors_that_are_not_dense_numbers(tmp_path, make, said):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in beta state" and "deprecated"
        path = save({"w": make()}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=f"net.pt: 'w' is {said}"):
        read_checkpoint(path)


def test_conjugated_and_negated_views(tmp_path):
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    found = read_checkpoint(save({"w": tensor.conj()}, tmp_path / "net.pt")).tensors
    np.testing.assert_array_equal(found["w"], [1 - 2j, 3 + 4j])
    found = read_checkpoint(save({"w": tensor.conj().imag}, tmp_path / "net.pt")).tensors
    np.testing.assert_array_equal(found["w"], [-2, 4])


def test_views_share_their_storage(tmp_path):
    base = torch.arange(12.0)
    contents = {"even": base[::2], "wide": base[:3].expand(2, 3), "tied": base}
    assert_holds(read_checkpoint(save(contents, tmp_path / "net.pt")), contents)


def test_storages_tagged_with_a_gpu(tmp_path, legacy):
    a = attacks
    pickled = a.program(a.dict_of(w=a.tensor(location="cuda:3", legacy=legacy)))
    container = a.legacy_container if legacy else a.zip_container
    data = np.array([1, 2], np.float32).tobytes()
    (tmp_path / "net.pt").write_bytes(container(pickled, {"0": data}))
    assert read_checkpoint(tmp_path / "net.pt").tensors["w"].tolist() == [1, 2]


def test_nothing_is_copied_and_the_file_stays_as_it_is(tmp_path):
    torch_file = save(weights(), tmp_path / "net.pt")
    save_file({"w": np.ones(4)}, tmp_path / "net.safetensors")
    for path in (torch_file, tmp_path / "net.safetensors"):
        before = path.read_bytes()
        found = read_checkpoint(path)
        for array in found.tensors.values():
            assert not array.flags.owndata
            array[...] = 7
        assert path.read_bytes() == before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_reading_takes_no_memory_of_its_own(tmp_path, suffix):
    path, megabytes = tmp_path / f"big.{suffix}", 32
    if suffix == "pt":
        save({f"w{i}": torch.ones(2**18) for i in range(megabytes)}, path)
    else:
        save_file({f"w{i}": np.ones(2**18, np.float32) for i in range(megabytes)}, path)
    program = f"""
import sys
from gam_flax.convert.checkpoint import read_checkpoint
if {suffix == "pt"}:
    import torch
def own():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
before = own()
found = read_checkpoint({str(path)!r})
total = sum(float(array.sum()) for array in found.tensors.values())
print(len(found.tensors), int(total), (own() - before) / 1024)
"""
    count, total, grown = _run(program).split()
    assert (int(count), int(total)) == (megabytes, megabytes * 2**18)
    assert float(grown) < 0.25 * megabytes


def _run(program: str) -> str:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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


# Shards


def _shard(folder: Path, placed: dict[str, str], **files: dict[str, Any]) -> Path:
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    index = folder / "net.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 16}, "weight_map": placed}))
    return index


def test_sharded_safetensors(tmp_path):
    placed = {"module.b": "two.safetensors", "module.a": "one.safetensors"}
    index = _shard(
        tmp_path, placed,
        one={"module.a": np.ones(2), "module.unlisted": np.ones(2)}, two={"module.b": np.zeros(2)},
    )  # fmt: skip
    for path in (index, tmp_path):
        found = read_checkpoint(path)
        assert {k: v.tolist() for k, v in found.tensors.items()} == {"b": [0, 0], "a": [1, 1]}
        assert list(found.tensors) == ["b", "a"]
        assert found.container == "sharded safetensors"
        assert found.stripped == ("module.",)
        assert found.metadata == {"format": "pt"}


def test_sharded_torch_files(tmp_path):
    save({"module.a": torch.ones(2)}, tmp_path / "one.bin")
    save({"module.b": torch.zeros(2)}, tmp_path / "two.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    placed = {"module.a": "one.bin", "module.b": "two.bin"}
    index.write_text(json.dumps({"weight_map": placed}))
    found = read_checkpoint(tmp_path)
    assert {k: v.tolist() for k, v in found.tensors.items()} == {"a": [1, 1], "b": [0, 0]}
    assert found.container == "sharded zip"


def test_shards_that_are_missing_or_lack_a_key(tmp_path):
    index = _shard(tmp_path, {"a": "one.safetensors"}, one={"b": np.ones(2)})
    with pytest.raises(CheckpointError, match="index.json: 'a' is not in 'one.safetensors'"):
        read_checkpoint(index)
    index = _shard(tmp_path, {"a": "absent.safetensors"})
    with pytest.raises(CheckpointError, match="index.json: absent.safetensors: No such file"):
        read_checkpoint(index)
    index = _shard(tmp_path, {"a": index.name})
    with pytest.raises(CheckpointError, match="a JSON file, where a checkpoint was expected"):
        read_checkpoint(index)
    (tmp_path / "cut.safetensors").write_bytes(b"\x40" + bytes(7) + b"{")
    index = _shard(tmp_path, {"a": "cut.safetensors"})
    with pytest.raises(CheckpointError, match="json: cut.safetensors: not a sound safetensors"):
        read_checkpoint(index)


def test_folders(tmp_path):
    save_file({"w": np.ones(2)}, tmp_path / "only.safetensors")
    assert list(read_checkpoint(tmp_path).tensors) == ["w"]
    save_file({"w": np.ones(2)}, tmp_path / "second.safetensors")
    with pytest.raises(CheckpointError, match="only.safetensors, second.safetensors"):
        read_checkpoint(tmp_path)


# Without frameworks


def test_importing_loads_no_framework():
    program = """
import sys
import gam_flax.convert.checkpoint
print(sorted({"torch", "jax", "flax"} & set(sys.modules)))
"""
    assert _run(program) == "[]\n"


def test_safetensors_need_neither_torch_nor_jax(tmp_path):
    save_file({"module.w": np.ones(2)}, tmp_path / "net.safetensors")
    program = f"""
import sys
sys.modules.update(torch=None, jax=None, flax=None)
from gam_flax.convert.checkpoint import from_mapping, read_checkpoint
found = read_checkpoint({str(tmp_path / "net.safetensors")!r})
print(list(from_mapping(found.tensors).tensors))
"""
    assert _run(program) == "['w']\n"


def test_without_torch_its_files_say_what_to_install(tmp_path, legacy, monkeypatch):
    path = save(weights(), tmp_path / "net.pt", legacy=legacy)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match="net.pt: needs PyTorch to be read: pip install") as e:
        read_checkpoint(path)
    assert "gam-attention[torch]" in str(e.value) and "safetensors" in str(e.value)


def test_paths_of_every_kind(tmp_path, monkeypatch):
    path = save(weights(), tmp_path / "net.pt")
    monkeypatch.chdir(tmp_path)
    for given in (path, str(path), "net.pt", Path("net.pt")):
        assert_holds(read_checkpoint(given), weights())


# Real files


@pytest.mark.skipif(not REAL.is_dir(), reason="the folder with real checkpoints is not here")
def test_real_checkpoints():
    found = read_checkpoint(REAL / "mobilenet_v2-b0353104.pth")
    assert (len(found.tensors), found.container, found.stripped) == (314, "legacy", ())
    assert list(found.tensors)[0] == "features.0.0.weight"
    assert found.tensors["classifier.1.weight"].shape == (1000, 1280)
    found = read_checkpoint(REAL / "resnet20-12fca82f.th")
    assert found.stripped == ("state_dict", "module.")
    assert len(found.tensors) == 97
    assert not any(key.endswith("num_batches_tracked") for key in found.tensors)
    expected = torch.load(REAL / "resnet20-12fca82f.th", weights_only=True, map_location="cpu")[
        "state_dict"
    ]
    assert_holds(found, {key.removeprefix("module."): value for key, value in expected.items()})
