"""GAM and its relatives for JAX and Flax, with the tools that port and compare PyTorch networks.

Importing this package loads no framework; jax and flax are imported with the first name that
is used, torch only by the functions that read or run torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
