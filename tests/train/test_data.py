"""The files that pictures come in, whole and broken: one clear line each."""

from __future__ import annotations

import io
import os
import pickle
import tarfile

import numpy as np
import pytest

from gam_flax.train import DataError, read_data
from tests.train.made import cifar_batch, idx, pictures, python2_pickle, write_fashion


def fails(kind, place, *said: str, **options) -> None:
    with pytest.raises(DataError) as raised:
        read_data(kind, place, **options)
    line = str(raised.value)
    assert "\n" not in line
    for word in said:
        assert word in line, line


# Fashion-MNIST and MNIST


@pytest.mark.parametrize("kind", ["fashion-mnist", "mnist"])
def test_idx_files(tmp_path, kind):
    data = read_data(kind, write_fashion(tmp_path, 40, 12))
    images, labels = pictures(40)
    assert np.array_equal(np.stack([data.train[i]["image"] for i in range(40)]), images)
    assert np.array_equal(data.train.labels, labels) and data.train.labels.dtype == np.int32
    assert len(data.test) == 12 and data.side == 12 and data.channels == 1
    assert len(data.classes) == 10 and data.mirrored == (kind == "fashion-mnist")
    assert data.mean == pytest.approx([images.mean() / 255])
    assert data.std == pytest.approx([images.std() / 255])


def test_idx_files_without_gz(tmp_path):
    write_fashion(tmp_path, 40, 12)
    images, _ = pictures(40)
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images[..., 0]))
    assert np.array_equal(read_data("mnist", tmp_path).train.images, images)


NAME = "train-images-idx3-ubyte.gz"
PLAIN = idx(np.zeros((40, 12, 12), np.uint8))


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "not found"),
        (b"", "begins with nothing"),
        (b"PNG, perhaps", "begins with 50 4e 47"),
        (idx(np.zeros(40, np.uint8)), "has 1 axes, expected 3"),
        (PLAIN[:10], "cut short in its head"),
        (PLAIN[:-7], "is cut short: 5,769 bytes, expected 5,776 for 40×12×12"),
        (PLAIN + b"x", "is too long"),
        (b"\x1f\x8b\x08 and no more", "cut short or broken"),
        (idx(np.zeros((40, 12, 11), np.uint8)), "square"),
        (idx(np.zeros((39, 12, 12), np.uint8)), "39 training pictures"),
    ],
)
def test_broken_idx_files(tmp_path, content, said):
    write_fashion(tmp_path, 40, 12)
    (tmp_path / NAME).unlink()
    if content is not None:
        (tmp_path / NAME).write_bytes(content)
    fails("mnist", tmp_path, said)


def test_a_gz_file_cut_short(tmp_path):
    write_fashion(tmp_path, 40, 12)
    os.truncate(tmp_path / NAME, 300)
    fails("mnist", tmp_path, NAME, "cut short or broken", "fetch it again")


def test_a_class_that_is_none(tmp_path):
    write_fashion(tmp_path, 40, 12)
    labels = np.full(12, 10, np.uint8)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    fails("mnist", tmp_path, "test classes go from 10 to 10, expected 0 to 9")


def test_where_and_what_is_asked_for(tmp_path):
    fails("mnist", None, "say where it is")
    fails("imagenet", tmp_path, "must be one of fashion-mnist, mnist, cifar10")


# CIFAR


def write_cifar10(folder):
    folder.mkdir()
    for i in range(1, 6):
        (folder / f"data_batch_{i}").write_bytes(cifar_batch(8, seed=i))
    (folder / "test_batch").write_bytes(cifar_batch(6, seed=9))
    names = [f"name {i}".encode() for i in range(10)]
    (folder / "batches.meta").write_bytes(python2_pickle({b"label_names": names}))
    return folder


def test_cifar10(tmp_path):
    folder = write_cifar10(tmp_path / "cifar-10-batches-py")
    archive = tmp_path / "other" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-py")
    for place in (folder, tmp_path, archive, archive.parent):
        data = read_data("cifar10", place)
        images, labels = pictures(8, side=32, channels=3, seed=2)
        assert np.array_equal(data.train.images[8:16], images)
        assert np.array_equal(data.train.labels[8:16], labels)
        assert len(data.train) == 40 and len(data.test) == 6
        assert data.classes[3] == "name 3" and data.channels == 3
    os.truncate(archive, 2000)
    fails("cifar10", archive, "cifar-10-python.tar.gz", "cut short or broken")


def test_cifar100(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, count in (("train", 20), ("test", 5)):
        (folder / name).write_bytes(cifar_batch(count, labels=b"fine_labels"))
    names = [f"{i}".encode() for i in range(100)]
    (folder / "meta").write_bytes(python2_pickle({b"fine_label_names": names}))
    data = read_data("cifar100", tmp_path)
    assert len(data.classes) == 100 and len(data.train) == 20


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    "content, said",
    [
        (pickle.dumps(Harmful(), protocol=2), "it names"),
        (pickle.dumps({"data": Harmful()}, protocol=4), "it names"),
        (python2_pickle({b"labels": [1]}), "has no 'data' in it"),
        (python2_pickle([1, 2]), "has no 'data' in it"),
        (python2_pickle({b"data": np.zeros((2, 5)), b"labels": [1, 2]}), "expected uint8 of"),
        (python2_pickle({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}), "2 pictures"),
        (cifar_batch(8)[:1000], "cut short or broken"),
        (b"", "cut short or broken"),
        (None, "cannot be read"),
    ],
)
def test_hostile_and_broken_batches(tmp_path, monkeypatch, content, said):
    monkeypatch.chdir(tmp_path)
    folder = write_cifar10(tmp_path / "cifar-10-batches-py")
    (folder / "data_batch_3").unlink()
    if content is not None:
        (folder / "data_batch_3").write_bytes(content)
    fails("cifar10", folder, "data_batch_3", said)
    assert not (tmp_path / "harm").exists()


def test_every_other_global_is_refused():
    from gam_flax.train.cifar import _unpickled

    for module, name in (("os", "system"), ("numpy", "load"), ("numpy", "fromfile")):
        raw = b"c" + module.encode() + b"\n" + name.encode() + b"\n."
        with pytest.raises(DataError, match=f"it names {module}.{name}"):
            _unpickled("file", raw)


def test_no_cifar_there(tmp_path):
    fails("cifar10", tmp_path, "neither cifar-10-python.tar.gz nor cifar-10-batches-py")
    fails("cifar100", tmp_path / "nowhere", "not found")


# Arrays


def test_arrays(tmp_path):
    x, y = pictures(20)
    arrays = {"x_train": x[..., 0], "y_train": y[:, None], "x_test": x[:5], "y_test": y[:5]}
    np.savez(tmp_path / "all.npz", **arrays)
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    for place in (tmp_path / "all.npz", tmp_path):
        data = read_data("arrays", place)
        assert np.array_equal(data.train.images, x) and np.array_equal(data.train.labels, y)
        assert len(data.classes) == y.max() + 1


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"x_train": np.zeros((20, 4, 4))}, "training pictures are float64 of (20, 4, 4, 1)"),
        ({"x_test": np.zeros((5, 9, 9), np.uint8)}, "one size"),
        ({"y_test": np.zeros(5)}, "classes are float64"),
        ({"y_train": np.array([None] * 20)}, "allow_pickle=False"),
        ({"y_train": np.full(20, -1)}, "training classes go from -1"),
        ({"x_train": None}, "x_train"),
    ],
)
def test_broken_arrays(tmp_path, changes, said):
    x, y = pictures(20)
    arrays = {"x_train": x, "y_train": y, "x_test": x[:5], "y_test": y[:5], **changes}
    np.savez(
        tmp_path / "a.npz", allow_pickle=True, **{k: v for k, v in arrays.items() if v is not None}
    )
    fails("arrays", tmp_path / "a.npz", "a.npz", said)


def test_no_arrays(tmp_path):
    fails("arrays", tmp_path, "cannot be read")
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 cut")
    fails("arrays", tmp_path / "a.npz", "a.npz", "cannot be read")


# Folders


def write_folder(folder):
    from PIL import Image

    for part in ("train", "val"):
        for i, name in enumerate(("cat", "dog")):
            (folder / part / name).mkdir(parents=True)
            for n, mode in enumerate(("RGB", "L", "RGBA")):
                picture = Image.new("RGB", (20 + n, 30), (100 * i, 0, 200)).convert(mode)
                picture.save(folder / part / name / f"{n}.png")
    (folder / "train" / "cat" / "notes.txt").write_text("no picture")
    return folder


def test_a_folder(tmp_path):
    data = read_data("folder", write_folder(tmp_path), side=16)
    assert data.classes == ("cat", "dog") and data.side == 16
    assert list(data.train.labels) == [0, 0, 0, 1, 1, 1]
    element = data.train[3]
    assert element["image"].shape == (18, 18, 3) and element["image"].dtype == np.uint8
    assert (element["image"] == (100, 0, 200)).all()


def test_broken_folders(tmp_path):
    fails("folder", tmp_path / "none", "train", "not found")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    fails("folder", tmp_path / "empty", "has no folders in it")
    folder = write_folder(tmp_path / "broken")
    raw = (folder / "train" / "dog" / "0.png").read_bytes()
    (folder / "train" / "dog" / "0.png").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match="dog/0.png: not a readable picture"):
        read_data("folder", folder, side=16).train[3]
    (folder / "val" / "bird").mkdir()
    fails("folder", folder, "bird", "a class that the training pictures have not")
    (folder / "train" / "eel").mkdir()
    fails("folder", folder, "eel", "has no pictures in it")


def test_pickles_are_as_python_2_wrote_them():
    """The helper of these tests, against the standard reader."""
    raw = cifar_batch(3)
    assert b"cnumpy.core.multiarray\n_reconstruct" in raw and b"_codecs" not in raw
    content = pickle.load(io.BytesIO(raw), encoding="bytes")
    assert content[b"data"].shape == (3, 3072)
