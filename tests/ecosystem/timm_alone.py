"""timm beside a torchvision whose compiled operators belong to another build of torch, and do not load here.

timm imports torchvision for its transforms and for `FrozenBatchNorm2d`, and torchvision, when it is imported, says what
two of its operators make of meta tensors, which is an error where nobody has defined them. So they are defined, by
their schemas alone: nothing here calls them, and they have no kernel. Import this before timm.
"""

from __future__ import annotations

import torch

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    LIBRARY = torch.library.Library("torchvision", "DEF")  # what it defines lives as long as it does
    for name in ("nms", "qnms"):
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401
