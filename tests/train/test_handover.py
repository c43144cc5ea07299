"""A training that began in torch goes on here with the step that torch would have made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gam_flax
import gam_torch
from gam_flax.convert import load
from gam_flax.train import TrainingError, fit, read_data
from gam_flax.train.pipeline import training_batches
from tests.train.made import TINY, tiny, write_fashion

STEPS = 4


def torch_step(model, optimizer, batch, data) -> None:
    x = (batch["image"].astype(np.float32) / 255 - data.mean) / data.std
    x = torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2)
    optimizer.zero_grad()
    labels = torch.from_numpy(batch["label"].astype(np.int64))
    torch.nn.functional.cross_entropy(model(x), labels).backward()
    optimizer.step()


def in_torch(folder, changes):
    """The pictures' settings, torch's file after three steps, and its weights after the fourth."""
    place = write_fashion(folder / "data", 64, 16)
    data = read_data("fashion-mnist", place)
    change = data.training_change(crop=1, flip=True)
    batches = training_batches(data.train, batch_size=16, seed=0, change=change)
    torch.manual_seed(0)
    model = gam_torch.create_model(
        "resnet8", attention="gam", num_classes=10, in_channels=1, stem="cifar", **TINY
    )
    if changes["optimizer"] == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
    for n in range(STEPS - 1):
        torch_step(model, optimizer, batches[n], data)
    file = folder / "torch.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    torch_step(model, optimizer, batches[STEPS - 1], data)
    return place, file, model.state_dict()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_torchs_fourth_step_is_made_here(tmp_path, optimizer):
    changes = {"optimizer": optimizer, "schedule": "constant", "learning_rate": 0.05}
    place, file, expected = in_torch(tmp_path, changes)
    settings = tiny(
        place,
        epochs=1,
        weight_decay=0.0,
        crop=1,
        init=str(file),
        init_step=STEPS - 1,
        variant="paper",
        **changes,
    )
    result = fit(settings, tmp_path / "run")
    assert result.finished and result.step == STEPS
    found = gam_flax.convert.to_torch(load(tmp_path / "run" / "last.safetensors"))
    for name, tensor in expected.items():
        # A bias before a norm has no gradient but rounding, which Adam makes a whole step of.
        loose = optimizer == "adamw" and name.endswith("bias")
        tolerance = {"abs": 0.11} if loose else {"rel": 1e-3, "abs": 1e-4}
        assert found[name] == pytest.approx(tensor.numpy(), **tolerance), name


def test_a_file_without_an_optimizer(tmp_path):
    place, file, expected = in_torch(tmp_path, {"optimizer": "sgd"})
    torch.save(expected, file)
    with pytest.raises(TrainingError, match="torch.pt: has no state_dict of an optimizer"):
        fit(tiny(place, init=str(file), init_step=3, variant="paper"), tmp_path / "run")
    with pytest.raises(TrainingError, match="init-step 3: must be 1 or more, with init"):
        tiny(place, init_step=3)
