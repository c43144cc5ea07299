"""`gam-flax demo`: the shipped PyTorch classifier ported to Flax, both run on real images."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from gam_flax.convert.blocks import identify
from gam_flax.convert.checkpoint import Checkpoint, read_checkpoint
from gam_flax.convert.files import check_free
from gam_flax.convert.into_flax import load_torch
from gam_flax.convert.saved import build, picture_settings
from gam_flax.maps.photograph import draw_attention_maps
from gam_flax.preprocess import normalized

ROUNDS = 7

DRAWN = (1, 5, 9)
"""The classes whose first image gets a figure: a trouser, a sandal, a boot."""


def run_demo(console: Console, out: Path, *, force: bool) -> None:
    """Reads, ports, compares, times and draws; prints a few lines and a table.

    Args:
        out: the folder for the pictures, made where it does not exist.
        force: replace pictures that exist.
    """
    checkpoint, images, labels = shipped()
    settings = picture_settings(checkpoint.metadata, checkpoint.path)
    for label in DRAWN:
        check_free(_figure(out, settings, label), force=force)
    blocks = identify(checkpoint)
    console.print(
        f"Checkpoint  fashion_gam.pt, PyTorch {checkpoint.container} file, "
        f"{len(checkpoint.tensors)} tensors: {_arguments(checkpoint)['name']}"
    )
    for block in blocks:
        console.print(
            f"  found     {block.prefix}: {block.kind.upper()} {block.variants[0]}, "
            f"{block.channels} channels, ratio {block.ratio:g}, {block.kernel_size}×"
            f"{block.kernel_size}"
        )
    torch_model, flax_model, report = twins(checkpoint)
    console.print(
        f"Ported      {len(report.mapped)} of {len(checkpoint.tensors)} tensors to Flax, "
        f"{len(report.missing)} missing, {len(report.unexpected)} left over"
    )
    x = normalized(images[..., None], settings["mean"], settings["std"])
    console.print(compare(torch_model, flax_model, x, labels))
    out.mkdir(parents=True, exist_ok=True)
    for label in DRAWN:
        figure = _figure(out, settings, label)
        image = images[np.argmax(labels == label)]
        draw_attention_maps(flax_model, image, figure, force=force, **settings)
        console.print(f"Attention   {figure}")


def shipped() -> tuple[Checkpoint, np.ndarray, np.ndarray]:
    """The trained classifier, 200 Fashion-MNIST test images (200, 28, 28), and their classes."""
    assets = files("gam_flax") / "assets"
    with as_file(assets / "fashion_gam.pt") as path:
        checkpoint = read_checkpoint(path)
    with as_file(assets / "fashion_test_200.npz") as path, np.load(path) as data:
        return checkpoint, data["images"], data["labels"]


def twins(checkpoint: Checkpoint) -> tuple[Any, Any, Any]:
    """The checkpoint's network in PyTorch and in Flax, in evaluation mode, and the report."""
    import gam_flax
    import gam_torch
    from gam_flax.convert.files import to_torch_tensor

    torch_model = build(gam_torch, checkpoint.metadata, checkpoint.path)
    torch_model.load_state_dict({k: to_torch_tensor(v) for k, v in checkpoint.tensors.items()})
    flax_model = build(gam_flax, checkpoint.metadata, checkpoint.path)
    report = load_torch(flax_model, checkpoint)
    torch_model.eval()
    flax_model.eval()
    return torch_model, flax_model, report


def compare(torch_model: Any, flax_model: Any, x: np.ndarray, labels: np.ndarray) -> Table:
    """Accuracy, error against float64, compile time and time of a batch, side by side."""
    import jax
    import torch
    from flax import nnx

    graph, state = nnx.split(flax_model)
    forward = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    nchw = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        truth = torch_model.double()(nchw.double()).numpy()
        torch_model.float()
        torch_logits = torch_model(nchw).numpy()
        torch_time = _median_time(lambda: torch_model(nchw))
    start = time.perf_counter()
    compiled = forward.lower(state, x).compile()
    compile_time = time.perf_counter() - start
    flax_logits = np.asarray(compiled(state, x))
    flax_time = _median_time(lambda: compiled(state, x).block_until_ready())

    table = Table(f"{len(x)} Fashion-MNIST test images", "PyTorch, eager", "Flax, jit")
    logits = (torch_logits, flax_logits)
    table.add_row("accuracy", *(f"{np.mean(y.argmax(1) == labels):.1%}" for y in logits))
    table.add_row("largest error of a logit", *(f"{np.abs(y - truth).max():.1e}" for y in logits))
    table.add_row("  against float64, of", *(f"{np.abs(truth).max():.1f}" for _ in logits))
    table.add_row("compilation", "–", f"{compile_time:.2f} s")
    table.add_row("one batch, median", f"{torch_time * 1e3:.1f} ms", f"{flax_time * 1e3:.1f} ms")
    same = int((torch_logits.argmax(1) == flax_logits.argmax(1)).sum())
    table.caption = f"the same class for {same} of {len(x)} images"
    return table


def _median_time(run: Callable[[], Any]) -> float:
    run()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[ROUNDS // 2]


def _figure(out: Path, settings: dict[str, Any], label: int) -> Path:
    return out / f"attention_{settings['classes'][label]}.png"


def _arguments(checkpoint: Checkpoint) -> dict[str, Any]:
    return json.loads(checkpoint.metadata["arguments"])
