"""Training: data, recipes, steps over a mesh, checkpoints that survive anything."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
