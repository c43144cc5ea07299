"""The attention blocks as Linen modules: they read their channels from the input."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
