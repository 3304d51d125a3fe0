"""Qwen2-VL (arXiv 2409.12191)."""

from btok.families import qwen_tower
from btok.families.family import Family, VisionRules
from btok.families.mrope import mrope
from btok.families.qwen_images import QwenImageProcessor

QWEN2_VL = Family(
    "Qwen2VLForConditionalGeneration",
    VisionRules(QwenImageProcessor, qwen_tower.features, prepare=qwen_tower.use_in),
    mrope,
    language_model="language_model",
)
