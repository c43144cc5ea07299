"""PyTorch twin of `gam_flax`: the same blocks and networks under the same names.

Importing this package loads no framework; torch is imported with the first name that is used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
