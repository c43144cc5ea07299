"""What `read_checkpoint` reads: containers, dtypes, shards, arrays in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from gam_flax.convert.checkpoint import read_checkpoint
from gam_flax.convert.errors import CheckpointError
from tests.convert import attacks
from tests.convert.saving import assert_holds, save, torch, weights

REAL = Path(__file__).parents[2].parent / "shared" / "data"


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
