from .batch_norm import BatchNorm as BatchNorm
from .conv import channel_shuffle as channel_shuffle
from .conv import conv2d as conv2d
from .conv import max_pool2d as max_pool2d
from .sequential import Sequential as Sequential
from .initialize import torch_default_init as torch_default_init
