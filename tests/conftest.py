"""For every test: annotated shapes are checked, hypothesis repeats itself; loads no framework."""

from __future__ import annotations

import atexit
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator

import hypothesis
import jaxtyping
import pytest
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintException, BeartypeDecorHintPep585DeprecationWarning

# Most of a small test is compilation, and on a CPU most of that is jax's own random generator.
os.environ.setdefault("JAX_DEFAULT_PRNG_IMPL", "rbg")

# A quarter of a run was compiling what another worker, or another file, had compiled before.
# Workers and what tests start find the folder in the environment.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = tempfile.TemporaryDirectory(prefix="gam-attention-tests-")
    atexit.register(programs.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Deadlines fail on a busy machine, and a test that draws anew each time fails for someone else.
hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, max_examples=25, database=None
)
hypothesis.settings.load_profile("repeatable")

_int_is_float = BeartypeConf(is_pep484_tower=True)  # as every type checker reads `ratio: float`


def _check(function: Callable) -> Callable:
    """beartype, but for constructors inherited from Flax, whose own annotations it cannot check."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BeartypeDecorHintPep585DeprecationWarning)
        try:
            return beartype(conf=_int_is_float)(function)
        except BeartypeDecorHintException:
            return function


# The hook wants the checker's name, and conftest's own is not unique: every folder may have one.
sys.modules["shape_checks"] = types.ModuleType("shape_checks")
sys.modules["shape_checks"].check = _check
jaxtyping.install_import_hook(["gam_flax", "gam_torch"], "shape_checks.check")

from tests.frameworks import FRAMEWORKS, Block  # noqa: E402, which imports what is to be checked


@pytest.fixture(params=FRAMEWORKS, scope="session")
def make(request: pytest.FixtureRequest) -> type[Block]:
    """Builds a block by its class name, in one framework after the other.

    `@pytest.mark.parametrize("make", ["nnx", "linen"], indirect=True)` where jax alone is meant.
    """
    pytest.importorskip("torch" if request.param == "torch" else "flax")
    return FRAMEWORKS[request.param]


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_end_with_their_file() -> Iterator[None]:
    """Thousands of them take gigabytes, and a garbage collector's time, in a long run."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations are not checked: what a user meets who passes a wrong shape or option."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
