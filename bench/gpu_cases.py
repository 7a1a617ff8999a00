"""What bench/gpu.py steps: the parameter shapes of known architectures, computed from their dimensions, and the cases.

Every list has the shapes that the published model has, so that its total is the published number of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from byte_model import STATES

from wd_kernels.formats import state_dtype

__all__ = [
    "BILLION",
    "SCALES",
    "TARGETS",
    "Case",
    "Shapes",
    "cases",
    "elements",
    "fitting_layers",
    "gpt2",
    "llama",
    "lora",
    "vit",
]

Shapes = tuple[tuple[int, ...], ...]
SCALES = ("full", "small")
BILLION = "1e9 elements"
#: Cases of one long tensor, and the percentage of the copy bandwidth that they should reach.
TARGETS = {
    f"{BILLION}, float32": 92,
    f"{BILLION}, bfloat16": 88,
    f"{BILLION}, float32, bfloat16 gradients": 88,
    f"{BILLION}, SGDW, float32": 92,
    f"{BILLION}, SGDW, bfloat16": 88,
}
F32, BF16 = torch.float32, torch.bfloat16


def elements(shapes: Sequence[tuple[int, ...]]) -> int:
    """Elements of all tensors."""
    return sum(map(math.prod, shapes))


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> Shapes:
    """GPT-2, its head tied to the token embedding; the defaults are those of the smallest.

    >>> elements(gpt2())
    124439808
    """
    norm = ((width,), (width,))
    attention = ((width, 3 * width), (3 * width,), (width, width), (width,))
    feed_forward = ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    return (
        (vocabulary, width),
        (context, width),
        *(norm + attention + norm + feed_forward) * layers,
        *norm,
    )


def vit(layers: int = 24, width: int = 1024, image: int = 224, patch: int = 16, classes: int = 1000) -> Shapes:
    """A vision transformer with a class token and biases everywhere; the defaults are ViT-L/16.

    >>> elements(vit())
    304326632
    """
    norm = ((width,), (width,))
    attention = ((3 * width, width), (3 * width,), (width, width), (width,))
    feed_forward = ((4 * width, width), (4 * width,), (width, 4 * width), (width,))
    return (
        (1, 1, width),
        (1, (image // patch) ** 2 + 1, width),
        (width, 3, patch, patch),
        (width,),
        *(norm + attention + norm + feed_forward) * layers,
        *norm,
        (classes, width),
        (classes,),
    )


def llama(
    layers: int = 32,
    width: int = 4096,
    inner: int = 14336,
    heads: int = 32,
    kv_heads: int = 8,
    vocabulary: int = 128256,
) -> Shapes:
    """Llama 3 with a head of its own; the defaults are the 8B.

    >>> elements(llama())
    8030261248
    """
    narrow = width // heads * kv_heads
    attention = ((width, width), (narrow, width), (narrow, width), (width, width))
    feed_forward = ((inner, width), (inner, width), (width, inner))
    return (
        (vocabulary, width),
        *(attention + feed_forward + ((width,), (width,))) * layers,
        (width,),
        (vocabulary, width),
    )


def lora(layers: int = 32, width: int = 4096, inner: int = 11008, rank: int = 16) -> Shapes:
    """LoRA's A and B on the seven projections of every layer; the defaults are a 7B model's: 448 matrices."""
    projections = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]
    return tuple(matrix for rows, columns in projections for matrix in ((rank, columns), (rows, rank))) * layers


def fitting_layers(free: int, bytes_per_parameter: int, most: int = 32) -> int:
    """Layers of the 8B Llama that fit into `free` bytes; 0 where not even the embeddings do."""
    fits = (n for n in range(most, 0, -1) if elements(llama(n)) * bytes_per_parameter <= free)
    return next(fits, 0)


@dataclass(frozen=True)
class Case:
    """Tensors to step, and what happens between steps.

    Attributes:
        name: unique among the cases.
        grad: the gradients' dtype, for a contender that takes it; the others have the parameters' dtype.
        gradients: "kept": the same tensors every step; "new": every step has new gradients at new addresses.
        groups: where over 1, every contender runs with one group of all tensors and with this many, lr changing in each
            group before each step.
        contenders: names of those that take part; empty: all.
        note: what a reader should know of it.
    """

    name: str
    shapes: Shapes
    rule: str = "adamw"
    param: torch.dtype = F32
    grad: torch.dtype = F32
    gradients: str = "kept"
    groups: int = 1
    contenders: tuple[str, ...] = ()
    note: str = ""

    @property
    def elements(self) -> int:
        return elements(self.shapes)

    @property
    def may_be_flat(self) -> bool:
        """Is a contender on flat parameters worth its copy of them? Flat gradients are kept, in one group."""
        many = len(self.shapes) > 1 and self.gradients == "kept" and self.groups == 1
        return many and self.param == self.grad and not self.contenders


def cases(scale: str, free: int) -> list[Case]:
    """The cases, those that budgets need first; `free` bytes of the device's memory decide what Llama is cut to."""
    small = scale == "small"
    billion = ((10**5 if small else 10**9,),)
    many = ((1000,),) * (30 if small else 10_000)
    groups = 20 if small else 465
    nano = gpt2(2, 32, 101, 16) if small else gpt2()
    shapes = {
        f"{len(many)} x 1000": many,
        f"GPT-2 {'tiny' if small else '125M'}": nano,
        "ViT tiny" if small else "ViT-L/16": vit(2, 32, 32, 16, 10) if small else vit(),
        f"LoRA {'tiny' if small else '7B'}": lora(2, 32, 64, 4) if small else lora(),
    }
    note = "contenders that take no such gradients have float32 ones"
    formats = (
        ("adamw", F32, F32),
        ("adamw", BF16, BF16),
        ("adamw", F32, BF16),
        ("sgdw", F32, F32),
        ("sgdw", BF16, BF16),
    )
    result = [
        Case(name, billion, *own, note=note if own[1] != own[2] else "")
        for name, own in zip(TARGETS, formats, strict=True)
    ]
    result += [
        Case(f"{name}, {gradients} gradients", own, gradients=gradients)
        for name, own in shapes.items()
        for gradients in ("kept", "new")
    ]
    result.append(Case(f"{groups} x 256, lr changing", ((256,),) * groups, groups=groups))
    result.append(_llama(small, free))
    return result


def _llama(small: bool, free: int) -> Case:
    """Ours and torch's fused alone, in the memory that both need beside shared parameters and gradients."""
    kept = 2 * BF16.itemsize + STATES["adamw"] * (state_dtype(BF16).itemsize + BF16.itemsize)
    layers = 2 if small else fitting_layers(int(0.92 * free), kept)
    shapes = llama(layers, 32, 64, 4, 2, 101) if small else llama(layers)
    note = f"{layers} of 32 layers, {elements(shapes):,} parameters; ours and torch's fused alone, for their memory"
    name = f"Llama 3 {'tiny' if small else '8B'}, {layers} layers, bfloat16"
    return Case(name, shapes, "adamw", BF16, BF16, contenders=("wd_kernels", "torch fused"), note=note)
