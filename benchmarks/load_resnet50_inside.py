"""The processes that load_resnet50.py measures, one contestant each; the first writes the files.

python -m benchmarks.load_resnet50_inside prepare FOLDER BATCH SIDE
python -m benchmarks.load_resnet50_inside flax|eager|meta|compile FOLDER BATCH SIDE [CACHE]
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.inside import Stages, peak_memory, report

FLAX_FILE, TORCH_FILE, EXPECTED = "flax.safetensors", "torch.safetensors", "expected.npy"

NEXT_BATCHES = 3


def pictures(batch: int, side: int) -> Any:
    """(batch, side, side, 3), the same in every process."""
    import numpy as np

    return np.random.default_rng(0).standard_normal((batch, side, side, 3), np.float32)


def channels_first(x: Any) -> Any:
    """As torch has them."""
    import numpy as np
    import torch

    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def prepare(folder: Path, batch: int, side: int) -> None:
    """Writes one network for both frameworks, and its answer in float64."""
    import numpy as np
    import torch
    from flax import nnx
    from safetensors.torch import save_file
    from torch import nn

    import gam_flax
    import gam_torch
    from gam_flax.convert import load_torch, save

    torch.manual_seed(0)
    model = gam_torch.create_model("resnet50")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:  # as after training: statistics that fit, no scale 1 and no bias 0
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(channels_first(pictures(8, 128)))
    for norm in norms:
        norm.momentum = 0.1
    model.eval()
    flax_model = gam_flax.create_model("resnet50", rngs=nnx.Rngs(0))
    load_torch(flax_model, model)
    save(flax_model, folder / FLAX_FILE)
    save_file(model.state_dict(), folder / TORCH_FILE)
    with torch.inference_mode():
        x = channels_first(pictures(batch, side)).double()
        np.save(folder / EXPECTED, model.double()(x).numpy())


def flax(folder: Path, batch: int, side: int, cache: Path | None) -> None:
    """gam_flax.convert.load, then the forward pass compiled by jax.jit."""
    stages = Stages()
    with stages("import"):
        import jax
        import jax.numpy as jnp
        import numpy as np
        from flax import nnx

        import gam_flax
        from gam_flax.convert import load

        jax.config.update("jax_enable_compilation_cache", cache is not None)
        if cache is not None:
            jax.config.update("jax_compilation_cache_dir", str(cache))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        _ = gam_flax.create_model  # its file is only loaded when it is asked for
        jnp.zeros(1).block_until_ready()  # which starts the backend
    x = pictures(batch, side)
    with stages("load"):
        model = load(folder / FLAX_FILE)
        model.eval()
        graph, state = nnx.split(model)
        jax.block_until_ready(state)
    del model
    with stages("trace"):
        lowered = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, x)
    with stages("compile"):
        compiled = lowered.compile()

    def run() -> Any:
        return np.asarray(compiled(state, x))

    finish(stages, run, folder)


def eager(folder: Path, batch: int, side: int, cache: Path | None) -> None:
    """gam_torch.create_model and load_state_dict, run as it is."""
    torch_side(folder, batch, side)


def meta(folder: Path, batch: int, side: int, cache: Path | None) -> None:
    """The same, but no weight is drawn or copied: the model takes the tensors of the file."""
    torch_side(folder, batch, side, on_meta=True)


def compile(folder: Path, batch: int, side: int, cache: Path | None) -> None:
    """The same as `eager`, compiled by torch.compile."""
    # Without a cache of its own a run begins with an empty one: its folder is fresh.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache or Path.cwd() / "inductor")
    torch_side(folder, batch, side, compiled=True)


def torch_side(
    folder: Path, batch: int, side: int, *, on_meta: bool = False, compiled: bool = False
) -> None:
    """The three contestants of torch."""
    stages = Stages()
    with stages("import"):
        import torch
        from safetensors.torch import load_file

        import gam_torch

        create_model = gam_torch.create_model
        torch.zeros(1).add_(1)
    x = channels_first(pictures(batch, side))
    with stages("load"):
        with torch.device("meta" if on_meta else "cpu"):
            model = create_model("resnet50")
        model.load_state_dict(load_file(folder / TORCH_FILE), strict=True, assign=on_meta)
        model.eval()
    forward = torch.compile(model) if compiled else model

    def run() -> Any:
        with torch.inference_mode():
            return forward(x).numpy()

    finish(stages, run, folder)


def finish(stages: Stages, run: Callable[[], Any], folder: Path) -> None:
    """The first batch and the next ones; then the check that this is the right network."""
    import numpy as np

    with stages("first batch"):
        y = run()
    answered = sum(stages.seconds.values())
    stages.repeat("next batch", run, NEXT_BATCHES)
    peak, helper = peak_memory(), peak_memory(resource.RUSAGE_CHILDREN)
    expected = np.load(folder / EXPECTED)
    idle = stages.peaks["import"]
    report(
        {
            **stages.seconds,
            "until the first answer": answered,
            "idle memory": idle,
            "memory of the load": stages.peaks["load"] - idle,
            "peak memory": peak,
            "memory above idle": peak - idle,
            "largest helper process": helper,
            "relative error": float(np.abs(y - expected).max() / np.abs(expected).max()),
        }
    )


def main(words: list[str]) -> None:
    role, folder, batch, side, *cache = words
    if role == "prepare":
        prepare(Path(folder), int(batch), int(side))
        report({})
        return
    contestant = {"flax": flax, "eager": eager, "meta": meta, "compile": compile}[role]
    contestant(Path(folder), int(batch), int(side), Path(cache[0]) if cache else None)


if __name__ == "__main__":
    main(sys.argv[1:])
