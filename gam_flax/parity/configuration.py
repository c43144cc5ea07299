"""What a comparison runs under: the switches of both frameworks, found, set and put back."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from gam_flax.convert.flax_paths import linen_leaves, nnx_modules, nnx_variables
from gam_flax.parity.notes import listed

_PACKAGES = ("numpy", "torch", "jax", "jaxlib", "flax", "optax")
_AUTOCAST = ("cpu", "cuda")
_MODES = ("deterministic", "use_running_average")  # NNX's; true in evaluation
_NARROW = ("tf32", "bf16", "high", "medium")  # float32 products in fewer bits
_JAX = (
    "enable_x64",
    "default_matmul_precision",
    "numpy_dtype_promotion",
    "debug_nans",
    "debug_infs",
    "disable_jit",
)

# torch's precision of float32 products, as a tree: where an inner node says "none", the nodes
# before it decide. So they are read from the root, each set to "none" after it was read.
_PRECISIONS = (
    ("generic", "all"),
    ("cuda", "all"),
    ("mkldnn", "all"),
    ("cuda", "matmul"),
    ("cuda", "conv"),
    ("cuda", "rnn"),
    ("mkldnn", "matmul"),
    ("mkldnn", "conv"),
    ("mkldnn", "rnn"),
)


@dataclass(frozen=True)
class Configuration:
    """Where and under what a comparison ran.

    versions: of Python and of each package, None for one that is not installed.
    devices: "torch" and "jax": where the torch model's weights lie and where Flax runs.
    threads: "torch" and "jax": how many a CPU run may use.
    found, used: the switches by name, before and during the comparison.
    torch_mode, flax_mode: "train", "eval" or "mixed"; None where the model has no such flags, as
        a Linen module. `compare` sets the flags of every layer to the mode it is asked for.
    torch_odd, flax_odd: paths of the layers in the other mode than the model, or than most.
    notes: what a reader should know, a sentence each.
    """

    versions: Mapping[str, str | None]
    devices: Mapping[str, tuple[str, ...]]
    threads: Mapping[str, int]
    found: Mapping[str, str]
    used: Mapping[str, str]
    torch_mode: str | None
    flax_mode: str | None
    torch_odd: tuple[str, ...] = ()
    flax_odd: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """As one JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Configuration:
        """What `to_json` wrote."""
        content = json.loads(text)
        content["devices"] = {side: tuple(names) for side, names in content["devices"].items()}
        for name in ("torch_odd", "flax_odd", "notes"):
            content[name] = tuple(content[name])
        return cls(**content)


@contextmanager
def comparison_settings(*, x64: bool, default_dtype: str = "float32") -> Iterator[None]:
    """Both frameworks at their most exact, and as they were afterwards, whatever happens.

    torch: float32 products in float32 (no TF32, no bfloat16, by old flags and new), autocast
    off, cudnn's choice of algorithms by timing off, gradients on, inference mode off. jax: matrix
    products in the highest precision, standard promotion of dtypes, no check for NaN.
    Deterministic algorithms and the numbers of threads are the user's.

    Args:
        x64: jax's switch for float64.
        default_dtype: torch's dtype for tensors that a forward makes.
    """
    import jax
    import torch

    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
        for device in _AUTOCAST:
            before = torch.is_autocast_enabled(device)
            stack.callback(torch.set_autocast_enabled, device, before)
            torch.set_autocast_enabled(device, False)
        stack.enter_context(_ieee_products())
        torch.set_default_dtype(getattr(torch, default_dtype))
        torch.backends.cudnn.benchmark = False
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(jax.enable_x64(x64))
        stack.enter_context(jax.default_matmul_precision("highest"))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.debug_nans(False))
        stack.enter_context(jax.debug_infs(False))
        yield


def check_configuration(
    torch_model: Any, flax_model: Any, *, dtype: str = "float64"
) -> Configuration:
    """What a comparison of the two models in `dtype` meets; to be called before anything is set.

    Args:
        torch_model: a `torch.nn.Module`.
        flax_model: an `nnx.Module` or a pair (linen module, variables).
        dtype: as `compare` takes it.
    """
    import jax
    import torch

    found = _switches()
    with comparison_settings(x64=dtype == "float64"):
        used = _switches()
    torch_modes = {path: module.training for path, module in torch_model.named_modules()}
    torch_mode, torch_odd = _mode(torch_modes, torch_model.training)
    flax_mode, flax_odd = _mode(_nnx_modes(flax_model))
    devices = {
        "torch": tuple(sorted({str(tensor.device) for tensor in torch_model.parameters()})),
        "jax": tuple(map(str, jax.local_devices())),
    }
    notes = [
        *_switch_notes(found),
        *_mode_notes("torch", torch_mode, torch_odd, len(torch_modes)),
        *_mode_notes("Flax", flax_mode, flax_odd, len(_nnx_modes(flax_model))),
        *_torch_notes(torch_model),
        *_flax_notes(flax_model),
    ]
    if jax.default_backend() != "cpu":
        notes.append(f"Flax runs on {jax.default_backend()}, torch on the CPU")
    return Configuration(
        versions={"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
        devices=devices,
        threads={"torch": torch.get_num_threads(), "jax": _cores()},
        found=found,
        used=used,
        torch_mode=torch_mode,
        flax_mode=flax_mode,
        torch_odd=torch_odd,
        flax_odd=flax_odd,
        notes=tuple(notes),
    )


# torch's precision flags


@contextmanager
def _ieee_products() -> Iterator[None]:
    """float32 products in float32. The old flags go along with the new ones, as torch raises
    when asked for an old one that contradicts them."""
    import torch

    new = _take_precisions()
    matmul, allow_tf32 = _old_flags()
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        _put_precisions(dict.fromkeys(new, "ieee"))
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = allow_tf32
        _put_precisions(new)  # the old flags have set some of them


def _old_flags() -> tuple[str, bool]:
    """The precision of matrix products, and cudnn's TF32, as set by the flags of before
    torch 2.9; to be called with the new ones taken."""
    import torch

    try:
        allow_tf32 = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # it is on, and the new ones, which are none, contradict it
        allow_tf32 = True
    return torch.get_float32_matmul_precision(), allow_tf32


def _take_precisions() -> dict[tuple[str, str], str]:
    """What each node says itself; all are "none" afterwards. Nothing where torch has only the
    old flags. (`torch.backends.mkldnn.fp32_precision` sets the root: it cannot be used.)"""
    import torch

    read = getattr(torch._C, "_get_fp32_precision_getter", None)
    found: dict[tuple[str, str], str] = {}
    for node in _PRECISIONS if read else ():
        found[node] = read(*node)  # type: ignore[misc]
        _put_precisions({node: "none"})
    return found


def _put_precisions(precisions: Mapping[tuple[str, str], str]) -> None:
    import torch

    for node, precision in precisions.items():
        torch._C._set_fp32_precision_setter(*node, precision)  # type: ignore[attr-defined]


def _switches() -> dict[str, str]:
    """Every switch that may change a number, as text."""
    import jax
    import torch

    new = _take_precisions()
    matmul, allow_tf32 = _old_flags()
    _put_precisions(new)
    precisions = {f"torch.{backend}.{op}": value for (backend, op), value in new.items()}
    return {
        "torch.float32_matmul_precision": matmul,
        "torch.cudnn.allow_tf32": str(allow_tf32),
        **precisions,
        "torch.cudnn.benchmark": str(torch.backends.cudnn.benchmark),
        "torch.deterministic_algorithms": str(torch.are_deterministic_algorithms_enabled()),
        **{f"torch.autocast.{d}": str(torch.is_autocast_enabled(d)) for d in _AUTOCAST},
        "torch.default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "torch.grad": str(torch.is_grad_enabled()),
        "torch.inference_mode": str(torch.is_inference_mode_enabled()),
        **{f"jax.{name}": str(getattr(jax.config, f"jax_{name}")) for name in _JAX},
    }


# Modes


def _nnx_modes(model: Any) -> dict[str, bool]:
    """Path → whether it trains, of every flag of an NNX model; nothing for a Linen module."""
    from flax import nnx

    if not isinstance(model, nnx.Module):
        return {}
    return {
        f"{path}.{name}".lstrip("."): not getattr(module, name)
        for path, module in nnx_modules(model).items()
        for name in _MODES
        if isinstance(getattr(module, name, None), bool)
    }


def _mode(training: Mapping[str, bool], most: bool | None = None) -> tuple[str | None, tuple]:
    """The mode of a model, and the paths that are not in its own, or in that of the most."""
    if not training:
        return None, ()
    if most is None:
        most = 2 * sum(training.values()) >= len(training)
    odd = tuple(path for path, trains in training.items() if trains != most)
    return "mixed" if odd else "train" if most else "eval", odd


# Notes


def _mode_notes(side: str, mode: str | None, odd: tuple[str, ...], count: int) -> Iterator[str]:
    if mode == "mixed":
        what = "layers" if side == "torch" else "mode flags"
        yield (
            f"{side}: {len(odd)} of {count} {what} differ in train or eval mode from the rest: "
            f"{listed(odd)}; the comparison sets them all alike"
        )


def _switch_notes(found: Mapping[str, str]) -> Iterator[str]:
    usual = ("torch.cuda.conv", "torch.cuda.rnn")  # TF32 is torch's default there
    narrow = [n for n, v in found.items() if v in _NARROW and "torch." in n and n not in usual]
    if narrow:
        yield f"torch: float32 products were allowed in fewer bits ({listed(narrow)}); not here"
    if found["jax.default_matmul_precision"] not in ("None", "highest", "float32"):
        was = found["jax.default_matmul_precision"]
        yield f"jax: matrix products were asked for in precision {was}; in the highest here"
    if any(found[f"torch.autocast.{device}"] == "True" for device in _AUTOCAST):
        yield "torch: autocast was on; not here"
    if found["torch.default_dtype"] != "float32":
        yield f"torch: the default dtype was {found['torch.default_dtype']}; not here"
    if found["jax.disable_jit"] == "True":
        yield "jax: jit is switched off, which makes the comparison slow"


def _torch_notes(model: Any) -> Iterator[str]:
    import torch
    from torch.nn.utils import parametrize

    modules = dict(model.named_modules())
    wrapped = [p for p, m in modules.items() if type(m).__name__ == "OptimizedModule"]
    if wrapped:
        yield f"torch: torch.compile wraps {listed(wrapped)}: compare its _orig_mod"
    parallel = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
    wrapped = [path for path, module in modules.items() if isinstance(module, parallel)]
    if wrapped:
        yield f"torch: a parallel wrapper is around {listed(wrapped)}: compare its module"
    scripted = [p for p, m in modules.items() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        yield f"torch: {listed(scripted)}: is a script, whose layers cannot be watched"
    made = [path for path, module in modules.items() if parametrize.is_parametrized(module)]
    made += [
        path
        for path, module in modules.items()
        if any(map(_is_norm_hook, module._forward_pre_hooks.values()))
    ]
    if made:
        yield (
            f"torch: {listed(made)}: a weight is computed from others (a parametrization); "
            "it has no parameter of its own name"
        )
    hooked = [
        path
        for path, module in modules.items()
        if path not in made
        and (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
    ]
    if hooked:
        yield f"torch: {listed(hooked)}: a hook runs with the layer"
    yield from _tensor_notes("torch", {k: str(p.dtype) for k, p in model.named_parameters()})
    frozen = [key for key, p in model.named_parameters() if not p.requires_grad]
    if frozen:
        yield f"torch: {listed(frozen)}: frozen; its gradient is compared as any other"


def _flax_notes(model: Any) -> Iterator[str]:
    if isinstance(model, tuple):
        leaves = {".".join(path): leaf for path, leaf in linen_leaves(model[1]).items()}
    else:
        leaves = nnx_variables(model)
    yield from _tensor_notes("Flax", {path: str(leaf.dtype) for path, leaf in leaves.items()})


def _tensor_notes(side: str, dtypes: Mapping[str, str]) -> Iterator[str]:
    """What is kept in fewer bits than float32."""
    for dtype in ("float16", "bfloat16"):
        narrow = [name for name, kept in dtypes.items() if kept.removeprefix("torch.") == dtype]
        if narrow:
            yield f"{side}: {dtype} weights: {listed(narrow)}"


def _is_norm_hook(hook: Any) -> bool:
    """Of `torch.nn.utils.weight_norm` and `spectral_norm` as they were before parametrizations."""
    return type(hook).__name__ in ("WeightNorm", "SpectralNorm")


# The machine


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    """As many threads as XLA's CPU client takes: the cores that this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1
