from .bam import BAM as BAM
from .cbam import CBAM as CBAM
from .gam import GAM as GAM
from .gam import ChannelAttention as ChannelAttention
from .gam import SpatialAttention as SpatialAttention
from .registry import create_attention as create_attention
from .registry import list_attentions as list_attentions
from .se import SqueezeExcitation as SqueezeExcitation
