from .convolve import conv_general_dilated as conv_general_dilated
from .convolve import convolution_algorithm as convolution_algorithm
from .convolve import convolve as convolve
