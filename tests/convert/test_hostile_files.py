"""Hostile, damaged and foreign files: one line that names the file, nothing run, nothing hung."""

from __future__ import annotations

import builtins
import contextlib
import copyreg
import importlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save as to_safetensors

from gam_flax.convert.checkpoint import Checkpoint, read_checkpoint
from gam_flax.convert.errors import CheckpointError, shorten
from tests.convert import attacks

torch = pytest.importorskip("torch", reason="hostile .pt files are read through torch")

WEIGHTS = {"fc.bias": np.ones(2, "f4"), "fc.weight": np.arange(6, dtype="f4").reshape(2, 3)}


def refusal(path: Path, **options: Any) -> str:
    """The line with which `path` is refused."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path, **options)
    line = str(caught.value)
    assert line.isprintable(), line
    assert path.name in line
    assert len(line) < 800
    assert "TypeCheckError" not in line, line  # of the test run's own type checker
    return line


def outcome(path: Path) -> Checkpoint | None:
    """What is in `path`; None where it was refused as it should be."""
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        assert str(error).isprintable() and path.name in str(error)
        assert "TypeCheckError" not in str(error)
        return None


# Code


def _payloads(canary: str) -> dict[str, Any]:
    touch = f"touch {canary}"
    python = f"open({canary!r}, 'w').close()"
    return {
        "posix.system": attacks.Call(os.system, touch),
        "subprocess.Popen": attacks.Call(subprocess.Popen, ["touch", canary]),
        "builtins.eval": attacks.Call(builtins.eval, python),
        "builtins.exec": attacks.Call(builtins.exec, python),
        "builtins.setattr": attacks.Call(builtins.setattr, os, "x", 1),
        "importlib.import_module": attacks.Call(importlib.import_module, "antigravity"),
        "io.open": attacks.Call(open, canary, "w"),
        "shutil.copy": attacks.Call(shutil.copy, sys.executable, canary),
    }


@pytest.mark.parametrize("wanted", _payloads(""))
@pytest.mark.parametrize("container", [attacks.zip_container, attacks.legacy_container])
def test_functions_of_the_standard_library_are_refused_by_name(tmp_path, container, wanted):
    canary = tmp_path / "ran"
    payload = _payloads(str(canary))[wanted]
    contents = {"state_dict": {"w": payload}, "extra": payload}
    path = tmp_path / "best.pt"
    with contextlib.suppress(TypeError):  # a module, the argument of setattr, does not pickle
        path.write_bytes(container(pickle.dumps(contents, protocol=2)))
    if not path.exists():
        path.write_bytes(container(attacks.program(attacks.name(*wanted.split(".")))))
    assert f"refused: the pickle asks for {wanted}; nothing was run." in refusal(path)
    assert not canary.exists()


def test_the_canary_would_have_been_seen(tmp_path):
    canary = tmp_path / "ran"
    pickle.loads(pickle.dumps(_payloads(str(canary))["posix.system"], protocol=2))
    assert canary.exists()


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_no_pickle_protocol_runs_anything(tmp_path, write, protocol):
    canary = tmp_path / "ran"
    payload = _payloads(str(canary))["posix.system"]
    refusal(write(attacks.zip_container(pickle.dumps({"w": payload}, protocol=protocol))))
    assert not canary.exists()


def test_code_hidden_behind_copyreg_is_refused(write):
    a = attacks
    hidden = a.call(a.name("copy_reg", "_reconstructor"), a.name("posix", "system"), b"NN")
    assert "copyreg._reconstructor" in refusal(write(a.zip_container(a.program(hidden))))
    assert copyreg  # Python 2's name for it, translated


def test_code_hidden_in_a_class_that_nobody_knows_is_inert(tmp_path, write):
    """Functions of other libraries are named freely, and called: nothing is behind the name."""
    a, canary = attacks, tmp_path / "ran"
    calls = [
        a.call(a.name("numpy.f2py.crackfortran", "myeval"), a.text(f"open('{canary}', 'w')")),
        a.call(a.name("torch.hub", "load"), a.text("somebody/something")),
        a.call(a.name("torch", "load"), a.text(str(canary))),
        a.name("os_but_not_quite", "system") + a.tuple_of(a.text("touch")) + b"\x81" + b"}b",
        a.call(
            a.name("torch._tensor", "_rebuild_from_type_v2"),
            *(a.name("pip", "main"), a.name("pip", "main"), a.tuple_of(a.text("install")), b"}"),
        ),
    ]
    weights = a.dict_of(w=a.tensor())
    for hidden in calls:
        pickled = a.program(a.dict_of(extra=hidden, state_dict=weights))
        outcome(write(a.zip_container(pickled, {"0": bytes(8)})))
        assert not canary.exists()


def test_classes_permitted_elsewhere_are_not_used_here(write):
    """A class that the user gave to torch.serialization.add_safe_globals stays out of the game."""

    class Permitted:
        def __setstate__(self, state):
            raise AssertionError("ran")

    Permitted.__module__, Permitted.__qualname__ = "lost.models", "Net"
    content = attacks.zip_container(
        attacks.program(attacks.module(attacks.dict_of(w=attacks.tensor()))),
        {"0": bytes(8)},
    )
    with torch.serialization.safe_globals([Permitted]):
        before = set(torch.serialization.get_safe_globals())
        assert list(read_checkpoint(write(content)).tensors) == ["w"]
        assert set(torch.serialization.get_safe_globals()) == before
    assert Permitted in before


# Bombs


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", attacks.bombs())
@pytest.mark.parametrize("legacy", [False, True])
def test_bombs_do_not_go_off(write, legacy, name):
    line = refusal(write(attacks.bombs(legacy=legacy)[name]))
    assert "refused: " in line or "no tensors" in line  # and not: out of memory, after all


def test_a_compressed_zip_is_refused_unopened(write):
    pickled = attacks.program(attacks.dict_of(w=attacks.tensor((2**22,), stored=2**22)))
    bomb = attacks.zip_container(pickled, {"0": bytes(2**24)}, compression=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 2**16
    assert "compressed" in refusal(write(bomb))


def test_entries_over_each_other_are_refused(write):
    """One megabyte of data, named by forty entries: the trick of the better zip bombs."""
    content = attacks.zip_container(b"", {"0": bytes(2**20)})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        directory = b""
        for i in range(40):
            info = entries[2]
            info.filename = f"archive/data/{i:02}"
            directory += struct.pack(
                "<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, info.CRC, info.file_size,
                info.file_size, len(info.filename), 0, 0, 0, 0, 0, info.header_offset,
            ) + info.filename.encode()  # fmt: skip
    pickled = entries[0]
    start = content.index(b"PK\x01\x02")
    own = struct.pack(
        "<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0,
        len(pickled.filename), 0, 0, 0, 0, 0, 0,
    ) + pickled.filename.encode()  # fmt: skip
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 41, 41, len(own + directory), start, 0)
    assert "claim more" in refusal(write(content[:start] + own + directory + end))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "tensor",
    [
        {"shape": (2**20, 2**10), "stride": (0, 0)},
        {"shape": (2**31 - 1,), "stride": (0,)},
        {"shape": (2**40,), "stride": (1,)},
    ],
)
def test_a_tensor_that_stretches_is_refused(write, tensor, legacy):
    container = attacks.legacy_container if legacy else attacks.zip_container
    pickled = attacks.program(attacks.dict_of(w=attacks.tensor(**tensor, legacy=legacy)))
    refusal(write(container(pickled, {"0": bytes(8)})))


def test_many_views_of_one_storage_are_refused_together(write):
    one = 2**18  # a megabyte

    def views(count: int) -> bytes:
        tensors = {f"w{i}": attacks.tensor((one,), stored=one) for i in range(count)}
        pickled = attacks.program(attacks.dict_of(**tensors))
        return attacks.zip_container(pickled, {"0": bytes(4 * one)})

    assert "stretch" in refusal(write(views(8)))
    assert len(read_checkpoint(write(views(4))).tensors) == 4


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "tensor",
    [
        {"shape": (3,)},
        {"shape": (2,), "offset": 1},
        {"shape": (2,), "offset": -1},
        {"shape": (-1,)},
        {"shape": (2,), "stride": (-1,)},
        {"shape": (2,), "stride": (1, 1)},
        {"shape": (2,), "stored": -1},
        {"shape": (2,), "stored": 2**62},
        {"shape": (2,), "key": "../../secret"},
        {"shape": (2**64,)},
    ],
)
def test_tensors_beyond_their_storage(write, tensor, legacy):
    container = attacks.legacy_container if legacy else attacks.zip_container
    pickled = attacks.program(attacks.dict_of(w=attacks.tensor(**tensor, legacy=legacy)))
    found = outcome(write(container(pickled, {"0": bytes(8)})))
    assert found is None or found.tensors["w"].nbytes <= 8


# Damage


def _saved(container: str) -> bytes:
    if container == "safetensors":
        return to_safetensors(WEIGHTS)
    stream = io.BytesIO()
    state_dict = {key: torch.from_numpy(value.copy()) for key, value in WEIGHTS.items()}
    torch.save(state_dict, stream, _use_new_zipfile_serialization=container == "zip")
    return stream.getvalue()


CONTAINERS = ["zip", "legacy", "safetensors"]


def _same(found: Checkpoint) -> bool:
    return list(found.tensors) == list(WEIGHTS) and all(
        np.array_equal(found.tensors[key], value) for key, value in WEIGHTS.items()
    )


@pytest.mark.parametrize("container", CONTAINERS)
def test_cut_off_anywhere(write, container):
    whole = _saved(container)
    assert _same(read_checkpoint(write(whole)))
    for end in range(0, len(whole), 1 if container == "safetensors" else 7):
        refusal(write(whole[:end]))


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_bit_flipped_anywhere(write, container):
    """A zip has checksums: what is read at all is right. The other two have none for the data."""
    whole = _saved(container)
    for at in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        found = outcome(write(bytes(damaged)))
        assert found is None or container != "zip" or _same(found), at


@given(st.data())
@pytest.mark.parametrize("container", CONTAINERS)
def test_bytes_overwritten(tmp_path_factory, container, data):
    damaged = bytearray(_saved(container))
    places = st.integers(0, len(damaged) - 1)
    for at, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1)):
        damaged[at] = byte
    path = tmp_path_factory.mktemp("damaged") / "net.pt"
    path.write_bytes(damaged)
    outcome(path)


_OPCODES = b"(.}])NKKXcqhtueasbRQ\x81\x85\x86\x87\x88\x8a\x80\x00\n"


@given(st.lists(st.sampled_from(_OPCODES), max_size=60))
def test_any_pickle_at_all(tmp_path_factory, opcodes):
    path = tmp_path_factory.mktemp("pickles") / "net.pt"
    path.write_bytes(attacks.zip_container(b"\x80\x02" + bytes(opcodes) + b"."))
    refusal(path)


def test_a_zip_saved_without_checksums_is_read(write):
    torch.serialization.set_crc32_options(False)
    try:
        content = _saved("zip")
    finally:
        torch.serialization.set_crc32_options(True)
    assert _same(read_checkpoint(write(content)))


@pytest.mark.parametrize("name", attacks.LIES)
def test_safetensors_that_lie(write, name):
    refusal(write(attacks.LIES[name], "net.safetensors"))


# Names


def test_names_of_ten_thousand_characters(write):
    long = "x" * 10_000
    path = write(to_safetensors({long: np.zeros(2, np.float32)}), "net.safetensors")
    assert list(read_checkpoint(path).tensors) == [long]
    a = attacks
    pickled = a.program(a.dict_of(**{long: a.tensor()}))
    assert list(read_checkpoint(write(a.zip_container(pickled, {"0": bytes(8)}))).tensors) == [long]
    both = {f"{long}.w": np.zeros(2), f"{long}.{'_orig_mod.' * 3}w": np.ones(2)}
    line = refusal(write(to_safetensors(both), "net.safetensors"))
    assert "the same without their prefixes" in line and len(line) < 600


def test_names_that_would_rewrite_the_terminal(write):
    hostile = "\x1b[2J\r\nfine: converted\u202e"
    keys = {f"{hostile}.w": np.zeros(1), f"{hostile}._orig_mod.w": np.zeros(1)}
    assert "\\x1b[2J\\r\\nfine" in refusal(write(to_safetensors(keys), "net.safetensors"))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(write(b"nothing", "a\x1b[2J.pt"))
    assert "a\\x1b[2J.pt: neither" in str(caught.value)


def test_shorten():
    assert shorten("conv1.weight") == "conv1.weight"
    assert shorten("a" * 50 + "b" * 50, 11) == "aaaa...bbbb"
    assert shorten("a\nb\x00c") == "a\\nb\\x00c"
    assert shorten("\ud800") == "\\ud800"
    assert len(shorten("\n" * 10_000, 80)) == 80
    assert shorten(7) == "7"


# Shards


@pytest.mark.parametrize(
    "shard",
    ["/etc/passwd", "../net.safetensors", "a/b.safetensors", "a\\b.safetensors", "..", ".", "",
     "C:net.safetensors", "\\\\server\\share", 7, None, ["a"]],
)  # fmt: skip
def test_shards_stay_in_their_folder(tmp_path, write, shard):
    folder = tmp_path / "inner"
    folder.mkdir()
    write(to_safetensors(WEIGHTS), "net.safetensors")
    index = folder / "net.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"fc.weight": shard}}))
    line = refusal(index)
    assert "refused" in line and "fc.weight" in line


def test_a_name_with_a_null_byte(write):
    path = write(json.dumps({"weight_map": {"w": "a\0b"}}).encode(), "net.index.json")
    refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b'{"weight_map": ',
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"metadata": {}}',
        b'{"weight_map": {"w": "a", "w": "b"}}',
        b"{" + b'"a":{' * 100_000,
        b'{"weight_map": "\xff"}',
        b'{"n": ' + b"9" * 10_000 + b"}",
    ],
)
def test_broken_indexes(write, content):
    refusal(write(content, "net.safetensors.index.json"))
