"""A trained model as one file for CPU, GPU and TPU, served by a process with jax alone.

    python examples/08_export_and_serve.py

What is exported takes the pictures' bytes and returns probabilities: whoever serves it needs to
know nothing of means and deviations. The server is examples/serve.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import urllib.request
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import gam_flax
from gam_flax.convert import load, picture_settings, read_checkpoint


class Classifier(nnx.Module):
    """Bytes in, probabilities out."""

    def __init__(self, network: nnx.Module, mean: list[float], std: list[float]):
        self.network = network
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        x = (pixels.astype(jnp.float32) / 255 - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        return jax.nn.softmax(self.network(x))


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a model and serve it.")
    parser.add_argument("--out", type=Path, default=Path("runs/fashion.jax_export"))
    parser.add_argument("--force", action="store_true", help="replace the file")
    options = parser.parse_args()

    # 1. The model that ships, its norms folded, its large kernels prepared for a CPU.
    assets = files("gam_flax") / "assets"
    checkpoint = Path(str(assets / "fashion_gam.pt"))
    settings = picture_settings(read_checkpoint(checkpoint).metadata, str(checkpoint))
    network = gam_flax.optimize_for_inference(load(checkpoint), (8, 28, 28, 1))
    classifier = Classifier(network, settings["mean"], settings["std"])

    # 2. One file for all platforms and any number of pictures.
    options.out.parent.mkdir(parents=True, exist_ok=True)
    shape = ("b", 28, 28, 1)
    gam_flax.export_model(classifier, shape, options.out, dtype=jnp.uint8, force=options.force)
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")

    # 3. Served by a process that has jax, and asked over HTTP.
    with np.load(str(assets / "fashion_test_200.npz")) as data:
        pictures = data["images"][:6, :, :, None]
    server = Path(__file__).with_name("serve.py")
    command = [sys.executable, str(server), str(options.out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[-1]
            body = BytesIO()
            np.save(body, pictures)
            with urllib.request.urlopen(address, body.getvalue(), timeout=120) as answer:
                served = np.asarray(json.load(answer))
        finally:
            process.terminate()

    # 4. The same numbers as here.
    classifier.eval()
    expected = np.asarray(jax.jit(lambda x: classifier(x))(jnp.asarray(pictures)))
    for row in served:
        print(f"{settings['classes'][row.argmax()]}, {row.max():.1%}")
    print(f"largest difference of a probability: {np.abs(served - expected).max():.1e}")


if __name__ == "__main__":
    main()
