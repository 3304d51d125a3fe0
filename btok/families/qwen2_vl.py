"""Qwen2-VL (arXiv 2409.12191)."""

from btok.families.family import Family
from btok.families.mrope import mrope
from btok.families.qwen_images import QwenImageProcessor
from btok.families.qwen_tower import QwenVision

QWEN2_VL = Family(
    "Qwen2VLForConditionalGeneration",
    QwenVision(QwenImageProcessor),
    mrope,
    language_model="language_model",
)
