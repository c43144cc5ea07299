"""A ResNet with attention, trained by `gam_flax.train`, loaded, and used.

    python examples/04_resnet_on_fashion_mnist.py                   a taste: a few pictures
    python examples/04_resnet_on_fashion_mnist.py --full            all of Fashion-MNIST
    python examples/04_resnet_on_fashion_mnist.py --attention cbam

Stop it when you like: the same call goes on where it stopped. On the command line this is
`gam-flax train --data fashion-mnist --model resnet8 --attention gam --out runs/gam`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from fashion import few_pictures

from gam_flax.convert import load
from gam_flax.preprocess import normalized
from gam_flax.train import Settings, fit, read_data
from gam_flax.train.data import FASHION


def main() -> None:
    parser = argparse.ArgumentParser(description="A ResNet with attention on Fashion-MNIST.")
    parser.add_argument("--attention", default="gam", help="gam, cbam, se or bam")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--full", action="store_true", help="all pictures, 12 epochs")
    parser.add_argument("--out", type=Path, default=Path("runs/resnet8"))
    options = parser.parse_args()

    # 1. What is learnt, from what, and how: everything that makes the run.
    place = None if options.full else str(few_pictures(options.out.parent))
    settings = Settings(
        "fashion-mnist" if options.full else "arrays",
        place,
        model="resnet8",
        attention=options.attention,
        model_options={"attention_options": {"ratio": 4}},
        epochs=12 if options.full else options.epochs,
        batch_size=128 if options.full else 15,
        optimizer="adamw",
        learning_rate=4e-3,
        warmup=0.5,
    )

    # 2. The run, which leaves its metrics, curves and models in a folder.
    result = fit(settings, options.out)
    if not result.finished:
        return
    print(f"accuracy {result.accuracy:.1%} at the end, {result.best_accuracy:.1%} at its best")

    # 3. Its best model, as anybody loads it.
    model = load(options.out / "best.safetensors")
    model.eval()
    data = read_data(settings.data, settings.data_dir)
    some = [data.test[i] for i in range(8)]
    pixels = np.stack([picture["image"] for picture in some])
    logits = jax.jit(lambda x: model(x))(jnp.asarray(normalized(pixels, data.mean, data.std)))
    for picture, guess in zip(some, np.asarray(logits).argmax(1), strict=True):
        print(f"{FASHION[picture['label']]}, predicted {FASHION[guess]}")


if __name__ == "__main__":
    main()
