"""The attention blocks as Linen modules: channels are read from the input, `train` is a call argument."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
