"""Fashion-MNIST for the examples: as much of it as asked for, where it is; else what ships."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np

from gam_flax.convert.files import whole_file
from gam_flax.train import DataSet, read_data
from gam_flax.train.data import DEBIAN_FASHION


def few_pictures(folder: Path, train: int = 2000, test: int = 1000) -> Path:
    """An .npz of the first pictures, as `Settings("arrays", path)` reads it.

    From `apt install dataset-fashion-mnist`; without it from the 200 test pictures that the
    package ships, 150 to train on and 50 to test.
    """
    if DEBIAN_FASHION.exists():
        data = read_data("fashion-mnist")
        assert isinstance(data, DataSet)
        some = [(data.train, range(train)), (data.test, range(test))]
        images = [np.stack([part[i]["image"] for i in rows]) for part, rows in some]
        labels = [part.labels[: len(rows)] for part, rows in some]
    else:
        with np.load(str(files("gam_flax") / "assets" / "fashion_test_200.npz")) as shipped:
            images, labels = (np.split(shipped[name], [150]) for name in ("images", "labels"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "fashion.npz"
    names = ("x_train", "x_test", "y_train", "y_test")
    with whole_file(path, force=True) as part, part.open("wb") as file:
        np.savez(file, **dict(zip(names, [*images, *labels], strict=True)))
    return path
