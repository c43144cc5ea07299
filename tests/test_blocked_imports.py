"""Each half works where the other's framework cannot be imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.paths import ROOT

TORCH = ("torch", "torchvision")
JAX = ("jax", "jaxlib", "flax", "optax", "orbax")

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def run_without(names: tuple[str, ...], code: str, **paths) -> str:
    """What `code` prints in a fresh interpreter in which `names` are not installed."""
    given = "".join(f"{name} = {str(path)!r}\n" for name, path in paths.items())
    code = BLOCK.format(names=names) + given + code
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("names, passed", [(TORCH, 8), (JAX, 4)], ids=["torch", "jax"])
def test_the_battery_of_blocks(names, passed):
    """Four blocks, in NNX and Linen without torch, in torch without jax."""
    battery = ["tests/attention/test_blocks.py", "-k", "shape_of_the_input and reference and 8"]
    options = ["-q", "-p", "no:cacheprovider"]
    printed = run_without(names, f"import pytest; sys.exit(pytest.main({battery + options}))")
    assert f"{passed} passed, {12 - passed} skipped" in printed.splitlines()[-1]


def test_flax_ports_saves_and_loads_without_torch(tmp_path):
    code = """
import gam_flax, jax, jax.numpy as jnp
from flax import nnx
from safetensors.numpy import save_file

def build(seed):
    return gam_flax.create_model(
        "resnet8", layers=(1, 1), widths=(4, 8), attention="gam", num_classes=3,
        attention_options={"variant": "reference", "ratio": 2, "kernel_size": 3},
        rngs=nnx.Rngs(seed),
    )

def answer(model):
    model.eval()
    return model(jnp.ones((2, 9, 8, 3)))

model = build(0)
gam_flax.torch_default_init(model, jax.random.key(0))
tensors = gam_flax.convert.to_torch(model)
save_file(tensors, folder + "/torch.safetensors")

ported = build(1)
report = gam_flax.convert.load_torch(ported, folder + "/torch.safetensors", variant="reference")
assert len(report.mapped) == len(tensors), report
assert (answer(ported) == answer(model)).all()
assert (answer(build(1)) != answer(model)).any()

gam_flax.convert.save(model, folder + "/flax.safetensors")
assert (answer(gam_flax.convert.load(folder + "/flax.safetensors")) == answer(model)).all()

try:
    gam_flax.convert.read_checkpoint("gam_flax/assets/fashion_gam.pt")
except gam_flax.convert.CheckpointError as error:
    print(error)
"""
    said = run_without(TORCH, code, folder=tmp_path)
    assert "fashion_gam.pt: needs PyTorch to be read: pip install" in said


def test_torch_trains_a_step_without_jax():
    code = """
import gam_torch, torch
model = gam_torch.create_model("resnet8", attention="gam", num_classes=3, layers=(1, 1),
                               widths=(4, 8), attention_options={"ratio": 2})
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, labels = torch.randn(4, 3, 9, 8), torch.tensor([0, 1, 2, 0])
losses = []
for _ in range(2):
    loss = torch.nn.functional.cross_entropy(model(x), labels)
    losses.append(loss.item())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
assert losses[1] < losses[0], losses
"""
    run_without(JAX, code)


@pytest.mark.parametrize(
    "names, file",
    [(TORCH + JAX, "safetensors"), (JAX, "pt")],
    ids=["safetensors needs neither", "a .pt file needs torch alone"],
)
def test_reading_and_naming(tmp_path, names, file):
    import torch
    from safetensors.torch import save_file

    from gam_torch import GAM

    path, weights = tmp_path / f"gam.{file}", GAM(8, kernel_size=3).state_dict()
    save_file(weights, path) if file == "safetensors" else torch.save(weights, path)
    code = """
import gam_flax.convert as convert
(block,) = convert.identify(path)
print(block.kind, block.options["channels"], len(convert.read_checkpoint(path).tensors))
"""
    assert run_without(names, code, path=path).split() == ["gam", "8", str(len(weights))]
