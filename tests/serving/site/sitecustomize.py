"""Lets torchvision be imported beside a CPU build of torch: its compiled operators, which nothing
that is served here calls, are built for CUDA and do not load, and it asks for their names.
"""

import torch

LIBRARY = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
