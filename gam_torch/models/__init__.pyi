from .mobilenet_v2 import MobileNetV2 as MobileNetV2
from .registry import create_model as create_model
from .registry import list_models as list_models
from .resnet import ResNet as ResNet
from .summary import LayerSummary as LayerSummary
from .summary import Summary as Summary
from .summary import summarize as summarize
from .yolov5 import YOLOv5 as YOLOv5
