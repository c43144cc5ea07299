"""Checkpoints in, checkpoints out. Reading and naming need numpy and safetensors alone."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
