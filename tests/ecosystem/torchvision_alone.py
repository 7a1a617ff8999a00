"""A torchvision whose compiled operators belong to another build of torch, and do not load beside this one.

timm needs torchvision, and transformers and torchmetrics import it where they find it. torchvision, when it is
imported, says what two of its operators make of meta tensors, which is an error where nobody has defined them. So they
are defined, by their schemas alone: nothing here calls them, and they have no kernel. Import this before any of these.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

DEFINED: list[torch.library.Library] = []  # what a library defines lives as long as it does
spec = find_spec("torchvision")
if spec is not None and spec.origin is not None:
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except OSError:
        DEFINED.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            DEFINED[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
