"""Two models by the names of the functions that build them, as `gam-flax parity` takes them."""

from __future__ import annotations

import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from gam_flax.convert.errors import CheckpointError, shorten
from gam_flax.convert.flax_paths import nnx_modules
from gam_flax.convert.into_flax import load_torch, load_torch_linen
from gam_flax.parity.trace import channels_last

if TYPE_CHECKING:
    from gam_flax.convert.report import ConversionReport
    from gam_flax.parity.report import ParityReport

_PACKAGE = Path(__file__).parents[1]


def build_pair(torch_factory: str, flax_factory: str) -> tuple[Any, Any]:
    """The torch model, and the NNX model or the pair (linen module, variables).

    Both are "MODULE:FUNCTION", found from the current directory or installed. They are called
    without arguments, with `rngs=nnx.Rngs(0)` where Flax's takes `rngs`; torch's seed is 0.

    Raises:
        CheckpointError: one line: no such module or function, it raised, or gave something else.
    """
    import torch
    from flax import linen, nnx

    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    torch_build, flax_build = _function(torch_factory), _function(flax_factory)
    torch.manual_seed(0)
    with one_line(f"{shorten(torch_factory)} raised"):
        torch_model = torch_build()
    if not isinstance(torch_model, torch.nn.Module):
        _wrong(torch_factory, torch_model, "a torch.nn.Module")
    rngs = {"rngs": nnx.Rngs(0)} if _takes_rngs(flax_build) else {}
    with one_line(f"{shorten(flax_factory)} raised"):
        flax_model = flax_build(**rngs)
    match flax_model:
        case nnx.Module() | (linen.Module(), Mapping()):
            return torch_model, flax_model
    _wrong(flax_factory, flax_model, "an nnx.Module or a pair (linen module, variables)")


def load_weights(
    torch_model: Any, flax_model: Any, *, rename: Any, variant: Any
) -> tuple[Any, ConversionReport]:
    """The Flax model with torch's weights, as far as both have them, and what went where.

    The settings of norms stay Flax's own: another eps is what a comparison is to find.
    """
    options = {"rename": rename, "variant": variant, "strict": False}
    if isinstance(flax_model, tuple):
        module, variables = flax_model
        variables, report = load_torch_linen(variables, torch_model, **options)
        return (module, variables), report
    report = load_torch(flax_model, torch_model, **options)
    modules = nnx_modules(flax_model)
    for path, changes in report.settings.items():
        for name, old, _ in changes:
            both = ("eps", "epsilon") if name == "eps" else (name,)
            for attribute in both:
                if hasattr(modules[path], attribute):
                    setattr(modules[path], attribute, old)
    report.settings.clear()
    return flax_model, report


def random_input(shape: str) -> np.ndarray:
    """N(0, 1) of a shape like "2,3,64,64", which is torch's, with the channels moved last."""
    try:
        sizes = tuple(int(part) for part in shape.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise CheckpointError(
            f"--input-shape {shorten(shape)}: give sizes as torch has them, such as 2,3,64,64"
        )
    pixels = np.random.default_rng(0).standard_normal(sizes, dtype=np.float32)
    return channels_last(pixels)


def read_rename(path: Path | None) -> dict[str, str] | None:
    """A .json file with torch's paths and Flax's."""
    if path is None:
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{shorten(path)}: not a .json file: {shorten(error, 120)}"
        ) from error
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{shorten(path)}: must hold one object, torch's path → Flax's")
    return names


def run(torch_model: Any, flax_model: Any, inputs: np.ndarray, **options: Any) -> ParityReport:
    """`compare`; what it or the models raise becomes one line."""
    from gam_flax.parity.comparison import compare

    with one_line("the comparison stopped"):
        return compare(torch_model, flax_model, inputs, **options)


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turns any exception into a CheckpointError: what happened, the message, and the line of the
    user's code."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        message = shorten(" ".join(str(error).split()), 300)
        raise CheckpointError(
            f"{what}: {type(error).__name__}: {message}{_where(error)}"
        ) from error


def _where(error: Exception) -> str:
    """The last line of neither this package's nor an installed one's code."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}:{error.lineno})"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if file.exists() and "site-packages" not in file.parts and _PACKAGE not in file.parents:
            return f" ({file.name}:{frame.lineno})"
    return ""


def _function(name: str) -> Callable[..., Any]:
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise CheckpointError(f"{shorten(name)}: name a function as MODULE:FUNCTION")
    try:
        with one_line(f"importing {shorten(module_name)} raised"):
            found: Any = import_module(module_name)
    except CheckpointError as error:
        cause = error.__cause__
        missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise CheckpointError(
                f"{shorten(name)}: no module {shorten(missing)}, here or installed"
            ) from error
        raise
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise CheckpointError(f"{shorten(name)}: {module_name} has no {shorten(attribute)}")
        found = getattr(found, part)
    if not callable(found):
        raise CheckpointError(f"{shorten(name)}: {shorten(attribute)} is not a function")
    return found


def _takes_rngs(factory: Callable[..., Any]) -> bool:
    try:
        return "rngs" in inspect.signature(factory).parameters
    except ValueError:  # a builtin
        return False


def _wrong(name: str, found: Any, expected: str) -> NoReturn:
    raise CheckpointError(f"{shorten(name)}: gave a {type(found).__name__}, not {expected}")
