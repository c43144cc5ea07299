"""What did the attention do to a photograph? As numbers, and as a figure.

    python examples/07_attention_maps.py

It takes the classifier and three of the pictures that ship. On the command line, for yours:
`gam-flax maps photo.jpg --checkpoint best.safetensors`, or `--checkpoint` a training run's folder.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from gam_flax.convert import load, picture_settings, read_checkpoint
from gam_flax.maps import attention_maps, draw_attention_maps
from gam_flax.preprocess import normalized


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention maps of photographs.")
    parser.add_argument("--out", type=Path, default=Path("runs/maps"))
    parser.add_argument("--force", action="store_true", help="replace figures that exist")
    options = parser.parse_args()

    assets = files("gam_flax") / "assets"
    checkpoint = Path(str(assets / "fashion_gam.pt"))
    model = load(checkpoint)
    settings = picture_settings(read_checkpoint(checkpoint).metadata, str(checkpoint))
    with np.load(str(assets / "fashion_test_200.npz")) as data:
        images = data["images"]

    # As numbers: the gates of any batch, and the activations before and after each block.
    x = normalized(images[:50, :, :, None], settings["mean"], settings["std"])
    _, maps = attention_maps(model, jnp.asarray(x), blocks="all")
    for found in maps:
        spatial = np.asarray(found.spatial)
        print(
            f"{found.path}: {found.kind}, channel gate {found.channel.mean():.2f} ± "
            f"{found.channel.std():.2f}, spatial gate {spatial.mean():.2f} ± {spatial.std():.2f}"
        )

    # As a figure of each picture: it also takes the name of a photograph's file.
    options.out.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        path = options.out / f"picture_{number}.png"
        seen = draw_attention_maps(model, images[number], path, force=options.force, **settings)
        name, probability = seen.likeliest(1)[0]
        print(f"{path}: {name}, {probability:.1%}")


if __name__ == "__main__":
    main()
