from .gates import AttentionMap as AttentionMap
from .gates import attention_maps as attention_maps
from .photograph import Photograph as Photograph
from .photograph import draw_attention_maps as draw_attention_maps
