"""A block of any framework behind one face: pictures in and out are numpy, NHWC.

A framework is imported with the first block of it, so that a test runs where another is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from gam_flax.convert.leaves import torch_name


class Block:
    """The block `name`, drawn from seed 0, of a named variant or as its constructor makes it."""

    framework: str
    package: str
    module: Any

    def __init__(self, name: str, channels: int, variant: str | None = None, **options: Any):
        block = getattr(import_module(self.package), name)
        create = partial(block.from_variant, variant) if variant else block
        args, kwargs = self.arguments(channels)
        self.module = create(*args, **kwargs, **options)

    @staticmethod
    def arguments(channels: int) -> tuple[tuple, dict[str, Any]]:
        """What every constructor of the framework takes before a block's own options."""
        raise NotImplementedError

    def __call__(self, x: np.ndarray, train: bool = False) -> np.ndarray:
        """The output for `x`; training updates the block's statistics."""
        raise NotImplementedError

    def tensors(self) -> dict[str, np.ndarray]:
        """Parameters and statistics under torch's names, in the framework's own layout."""
        raise NotImplementedError


class TorchBlock(Block):
    framework = "torch"
    package = "gam_torch"

    @staticmethod
    def arguments(channels: int) -> tuple[tuple, dict[str, Any]]:
        import torch

        torch.manual_seed(0)
        return (channels,), {}

    def __call__(self, x: np.ndarray, train: bool = False) -> np.ndarray:
        import torch

        x = np.moveaxis(x, -1, 1) if x.ndim == 4 else x
        y = self.module.train(train)(torch.from_numpy(x))
        return np.moveaxis(y.detach().numpy(), 1, -1)

    def tensors(self) -> dict[str, np.ndarray]:
        return {name: value.numpy().copy() for name, value in self.module.state_dict().items()}


class FlaxBlock(Block):
    """What NNX and Linen share once a block is a pure function."""

    def pure(self, train: bool = False) -> tuple[Callable, Any, Any]:
        """`apply(params, stats, x) -> (y, stats)` without effects, and its first two arguments."""
        raise NotImplementedError

    def keep(self, stats: Any) -> None:
        raise NotImplementedError

    def __call__(self, x: np.ndarray, train: bool = False) -> np.ndarray:
        import jax.numpy as jnp

        apply, params, stats = self.pure(train)
        y, stats = apply(params, stats, jnp.asarray(x))
        self.keep(stats)
        return np.asarray(y)


class NNXBlock(FlaxBlock):
    framework = "nnx"
    package = "gam_flax"

    @staticmethod
    def arguments(channels: int) -> tuple[tuple, dict[str, Any]]:
        from flax import nnx

        return (channels,), {"rngs": nnx.Rngs(0)}

    def pure(self, train: bool = False) -> tuple[Callable, Any, Any]:
        from flax import nnx

        self.module.train() if train else self.module.eval()
        graph, params, stats = nnx.split(self.module, nnx.Param, nnx.BatchStat)

        def apply(params: Any, stats: Any, x: Any) -> tuple[Any, Any]:
            module = nnx.merge(graph, params, stats, copy=True)
            return module(x), nnx.state(module, nnx.BatchStat)

        return apply, params, stats

    def keep(self, stats: Any) -> None:
        from flax import nnx

        nnx.update(self.module, stats)

    def tensors(self) -> dict[str, np.ndarray]:
        from flax import nnx

        leaves = nnx.to_flat_state(nnx.state(self.module))
        return {torch_name(".".join(map(str, path))): np.asarray(v[...]) for path, v in leaves}


class LinenBlock(FlaxBlock):
    """Its variables are drawn for the channels, which the module itself does not know."""

    framework = "linen"
    package = "gam_flax.linen"

    def __init__(self, name: str, channels: int, variant: str | None = None, **options: Any):
        import jax
        import jax.numpy as jnp

        super().__init__(name, channels, variant, **options)
        variables = self.module.init(jax.random.key(0), jnp.zeros((1, 4, 4, channels)))
        self.params, self.stats = variables["params"], variables.get("batch_stats", {})

    @staticmethod
    def arguments(channels: int) -> tuple[tuple, dict[str, Any]]:
        return (), {}

    def pure(self, train: bool = False) -> tuple[Callable, Any, Any]:
        def apply(params: Any, stats: Any, x: Any) -> tuple[Any, Any]:
            variables = {"params": params, "batch_stats": stats}
            y, after = self.module.apply(variables, x, train, mutable=["batch_stats"])
            return y, after.get("batch_stats", {})

        return apply, self.params, self.stats

    def keep(self, stats: Any) -> None:
        self.stats = stats

    def tensors(self) -> dict[str, np.ndarray]:
        import jax

        leaves = [*jax.tree.leaves_with_path(self.params), *jax.tree.leaves_with_path(self.stats)]
        return {torch_name(".".join(k.key for k in path)): np.asarray(v) for path, v in leaves}


FRAMEWORKS = {block.framework: block for block in (TorchBlock, NNXBlock, LinenBlock)}
