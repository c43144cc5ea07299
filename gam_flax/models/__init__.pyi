from .registry import create_model as create_model
from .registry import list_models as list_models
from .resnet import ResNet as ResNet
