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
from gam_flax.convert.files import check_free, whole_file
from gam_flax.convert.into_flax import load_torch
from gam_flax.convert.saved import build

ROUNDS = 7


def run_demo(console: Console, out: Path, *, force: bool) -> None:
    """Reads, ports, compares, times and draws; prints a few lines and a table.

    Args:
        out: the folder for the pictures, made where it does not exist.
        force: replace pictures that exist.
    """
    picture = out / "attention_maps.png"
    check_free(picture, force=force)
    checkpoint, images, labels = shipped()
    about = checkpoint.metadata
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
    x = (images[..., None].astype(np.float32) / 255 - float(about["mean"])) / float(about["std"])
    console.print(compare(torch_model, flax_model, x, labels))
    out.mkdir(parents=True, exist_ok=True)
    draw_maps(flax_model, x, images, labels, json.loads(about["classes"]), picture, force=force)
    console.print(f"Pictures    {picture}")


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


def draw_maps(
    model: Any,
    x: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
    classes: list[str],
    path: Path,
    *,
    force: bool,
    count: int = 6,
) -> None:
    """A PNG: for the first image of each of `count` classes, the spatial gate after each stage."""
    import jax.numpy as jnp
    from flax import nnx
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    rows = [int(np.argmax(labels == label)) for label in np.unique(labels)[:count]]
    capture = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)
    logits, kept = capture(jnp.asarray(x[rows]))
    predicted = np.asarray(logits).argmax(1)
    stages = [n for n in range(1, len(model.layers) + 1) if hasattr(model, f"attention{n}")]
    gates = [
        np.asarray(kept[f"attention{n}"]["spatial_attention"]["__call__"].get_value()[0]).mean(-1)
        for n in stages
    ]
    low, high = min(gate.min() for gate in gates), max(gate.max() for gate in gates)
    figure = Figure(figsize=(2.1 * (len(stages) + 1) + 0.8, 2.1 * count), layout="constrained")
    axes = figure.subplots(count, len(stages) + 1, squeeze=False)
    for row, (index, line) in enumerate(zip(rows, axes, strict=True)):
        line[0].imshow(images[index], cmap="gray", extent=(0, 1, 1, 0))
        line[0].set_ylabel(classes[labels[index]], fontsize=10)
        line[0].set_title(f"predicted: {classes[predicted[row]]}", fontsize=9)
        for axis, stage, gate in zip(line[1:], stages, gates, strict=True):
            axis.imshow(gate[row], vmin=low, vmax=high, extent=(0, 1, 1, 0))
            at = (np.arange(images.shape[1]) + 0.5) / images.shape[1]
            axis.contour(at, at, images[index], levels=[64], colors="white", linewidths=0.8)
            if row == 0:
                axis.set_title(f"stage {stage}, {gate.shape[1]}×{gate.shape[2]}", fontsize=9)
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
    figure.suptitle("Where GAM's spatial gate is open: mean over channels, image outlined")
    scale = ScalarMappable(Normalize(low, high))
    figure.colorbar(scale, ax=axes, label="spatial gate (0 closed, 1 open)", aspect=50)
    with whole_file(path, force=force) as part:
        figure.savefig(part, format="png", dpi=110)


def _arguments(checkpoint: Checkpoint) -> dict[str, Any]:
    return json.loads(checkpoint.metadata["arguments"])
