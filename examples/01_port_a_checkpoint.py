"""A PyTorch checkpoint becomes a Flax model, gives the same answers, and goes back unchanged.

    python examples/01_port_a_checkpoint.py

It takes the classifier that ships. For yours: `gam-flax inspect best.pt` says what is in it, and
what its weights cannot tell. The same on the command line: `gam-flax convert`, `gam-flax verify`.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.resources import files
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import gam_flax
import gam_torch
from gam_flax.convert import identify, load, load_torch, save, to_torch

NETWORK = {
    "name": "resnet8",
    "attention": "gam",
    "attention_options": {"variant": "reference"},
    "attention_at": [1, 2, 3],
    "in_channels": 1,
    "num_classes": 10,
}


def main() -> None:
    shipped = Path(str(files("gam_flax") / "assets" / "fashion_gam.pt"))
    parser = argparse.ArgumentParser(description="Port a PyTorch checkpoint to Flax.")
    parser.add_argument("--checkpoint", type=Path, default=shipped)
    checkpoint = parser.parse_args().checkpoint

    # 1. What is in the file?
    for block in identify(checkpoint):
        print(block)

    # 2. The network in Flax, and torch's weights in it. Layers go by their paths.
    model = gam_flax.create_model(**NETWORK, rngs=nnx.Rngs(0))
    print(load_torch(model, checkpoint))
    model.eval()

    # 3. The same in torch, and both on the same pictures: NHWC here, NCHW there.
    torch_model = gam_torch.create_model(**NETWORK)
    torch_model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    torch_model.eval()
    x = np.random.default_rng(0).standard_normal((8, 28, 28, 1), dtype=np.float32)
    with torch.inference_mode():
        expected = torch_model(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    logits = np.asarray(jax.jit(lambda x: model(x))(jnp.asarray(x)))
    difference, scale = np.abs(logits - expected).max(), np.abs(expected).max()
    print(f"largest difference of a logit: {difference:.1e}, of {scale:.1f}")

    # 4. Saved, the file knows how its model is built. Loaded and back in torch: every bit.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fashion.safetensors"
        save(model, path)
        back = to_torch(load(path))
    same = all(
        np.array_equal(tensor.numpy(), back[key])
        for key, tensor in torch_model.state_dict().items()
    )
    print(f"torch → Flax → file → torch: {'the same bits' if same else 'other bits'}")


if __name__ == "__main__":
    main()
