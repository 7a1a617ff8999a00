"""What the benchmarks step: sizes, shapes of known models, dtypes, rules, threads, groups, and the scaling sweeps.

A case is a text, such as 300x100000-float32-new or gpt2-bfloat16-kept; CPU and GPU step lists of such texts. Every
model has the shapes that the published one has, so that its total is the published number of parameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from byte_model import STATES, our_states
from peers import DEEPSPEED, FLAT, FUSED, OURS, RULES, Peer

REFERENCE, BARE_LOOP, CEILING = f"{OURS} reference", "bare loop", "ceiling"
#: The same optimizer, its launches timed from within.
TIMED = {OURS: f"{OURS}, launches timed", FLAT: f"{FLAT}, launches timed"}
#: What a sweep varies, and what it is measured with.
SWEEPS: dict[str, tuple[str, ...]] = {
    "tensors": (OURS, TIMED[OURS], FLAT, TIMED[FLAT], FUSED, DEEPSPEED, BARE_LOOP),
    "elements": (OURS, TIMED[OURS], FUSED, DEEPSPEED, BARE_LOOP),
    "groups": (OURS, TIMED[OURS], FLAT, TIMED[FLAT], FUSED, DEEPSPEED),
}
SLOWLY = 100_000  # elements of the largest case that the reference steps

# Shapes of models -----------------------------------------------------------------------------------------------------

Shapes = tuple[tuple[int, ...], ...]


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
    return ((vocabulary, width), (context, width), *(norm + attention + norm + feed_forward) * layers, *norm)


def vit(layers: int = 24, width: int = 1024, image: int = 224, patch: int = 16, classes: int = 1000) -> Shapes:
    """A vision transformer with a class token and biases everywhere; the defaults are ViT-L/16.

    >>> elements(vit())
    304326632
    """
    norm = ((width,), (width,))
    attention = ((3 * width, width), (3 * width,), (width, width), (width,))
    feed_forward = ((4 * width, width), (4 * width,), (width, 4 * width), (width,))
    embedding = ((1, 1, width), (1, (image // patch) ** 2 + 1, width), (width, 3, patch, patch), (width,))
    return (*embedding, *(norm + attention + norm + feed_forward) * layers, *norm, (classes, width), (classes,))


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
    layer = (*attention, *feed_forward, (width,), (width,))
    return ((vocabulary, width), *layer * layers, (width,), (vocabulary, width))


def lora(layers: int = 32, width: int = 4096, inner: int = 11008, rank: int = 16) -> Shapes:
    """LoRA's A and B on the seven projections of every layer; the defaults are a 7B model's: 448 matrices."""
    projections = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]
    return tuple(matrix for rows, columns in projections for matrix in ((rank, columns), (rows, rank))) * layers


#: By name; LAYERS may follow, as in llama3_8b:20. The tiny ones are for rehearsals.
MODELS: dict[str, Callable[..., Shapes]] = {
    "gpt2": gpt2,
    "vit_l16": vit,
    "llama3_8b": llama,
    "lora_7b": lora,
    "tiny_gpt2": partial(gpt2, 2, 32, 101, 16),
    "tiny_vit": partial(vit, 2, 32, 32, 16, 10),
    "tiny_llama3": partial(llama, 2, 32, 64, 4, 2, 101),
    "tiny_lora": partial(lora, 2, 32, 64, 4),
}

# Cases ----------------------------------------------------------------------------------------------------------------

_SIZE = re.compile(rf"(\d+)x(\d+)(|Ki|Mi)|({'|'.join(MODELS)})(?::(\d+))?")
_CASE = re.compile(
    r"([^-]+)-(\w+?)(?:\+(\w+))?-(kept|new)"
    rf"(?:-({'|'.join(RULES)}))?(?:-(\d+)threads?)?(?:-(\d+)groups?-(constant|changing))?(?:-by-({'|'.join(SWEEPS)}))?"
)


@dataclass(frozen=True)
class Case:
    """Tensors to step, and what happens between steps.

    Attributes:
        size: TENSORSxELEMENTS, with Ki or Mi perhaps, or a model of MODELS.
        dtype: of the parameters.
        grad: the gradients' dtype, for a contender that takes it; None, and for all others: the parameters'.
        gradients: "kept": the same tensors every step; "new": every step has new gradients at new addresses.
        rule: a key of peers.RULES.
        threads: of torch; 0: as many as it had.
        groups: where over 1, every optimizer runs with one group of all tensors and with this many groups.
        lr: "constant", or "changing" in every group before every step.
        sweep: a key of SWEEPS, where the case is a point of one; it then runs with its groups only.
        only: names of the peers that take part; empty: all.
    """

    size: str
    dtype: torch.dtype = torch.float32
    grad: torch.dtype | None = None
    gradients: str = "kept"
    rule: str = "adamw"
    threads: int = 0
    groups: int = 1
    lr: str = "constant"
    sweep: str = ""
    only: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case that prints as `text`, such as gpt2-float32+bfloat16-kept or 4x256-float32-kept-2groups-changing."""
        found = _CASE.fullmatch(text)
        dtypes: list[Any] = [getattr(torch, name, None) for name in found.group(2, 3) if name] if found else [None]
        if found is None or not _SIZE.fullmatch(found[1]) or not all(isinstance(d, torch.dtype) for d in dtypes):
            raise ValueError(
                f"case {text!r}: expected TENSORSxELEMENTS or one of {', '.join(MODELS)}, then -DTYPE[+DTYPE of the "
                f"gradients]-kept|new[-{'|-'.join(RULES)}][-Nthreads][-Ngroups-constant|changing]"
                f"[-by-{'|'.join(SWEEPS)}]"
            )
        size, _, _, gradients, rule, threads, groups, lr, sweep = found.groups()
        grad = dtypes[1] if len(dtypes) > 1 else None
        return cls(
            size, dtypes[0], grad, gradients, rule or "adamw", int(threads or 0), int(groups or 1), lr or "constant",
            sweep or "",
        )  # fmt: skip

    @cached_property
    def shapes(self) -> Shapes:
        found = _SIZE.fullmatch(self.size)
        assert found is not None, self.size
        if found[4]:
            return MODELS[found[4]](*([int(found[5])] if found[5] else []))
        return ((int(found[2]) * {"": 1, "Ki": 1 << 10, "Mi": 1 << 20}[found[3]],),) * int(found[1])

    @property
    def is_model(self) -> bool:
        return not self.size[0].isdigit()

    @property
    def elements(self) -> int:
        """Of all tensors."""
        return elements(self.shapes)

    @property
    def grad_dtype(self) -> torch.dtype:
        return self.grad or self.dtype

    @property
    def dtype_name(self) -> str:
        return "+".join(str(d).removeprefix("torch.") for d in (self.dtype, self.grad) if d)

    @property
    def bytes_needed(self) -> float:
        """Memory that it takes, about: parameters, gradients and states; twice that where there are flat copies too."""
        each = self.dtype.itemsize + self.grad_dtype.itemsize + our_states(self.rule, self.dtype, None)
        return self.elements * each * (1 if self.sweep == "elements" else 3)

    def contenders(self, peers: Sequence[str]) -> list[tuple[str, int]]:
        """(name, number of groups) of all that step this case; `peers` are the optimizers that are there."""
        names = [name for name in peers if not self.only or name in self.only]
        if self.gradients == "kept" and len(self.shapes) > 1 and self.grad_dtype == self.dtype and not self.only:
            names.insert(1, FLAT)
        if self.sweep:
            names += [longer for name, longer in TIMED.items() if name in names]
            names = [name for name in SWEEPS[self.sweep] if name in names or name == BARE_LOOP]
            return [*((name, self.groups) for name in names), (CEILING, 1)]
        if self.groups > 1:
            return [*((name, groups) for groups in (1, self.groups) for name in names), (CEILING, 1)]
        if self.elements <= SLOWLY:
            names.append(REFERENCE)
        return [(name, 1) for name in (*names, BARE_LOOP, CEILING)]

    def stepping(self, peers: Sequence[Peer]) -> list[str]:
        """The names of those that can step it."""
        return [peer.name for peer in peers if peer.rule == self.rule and self.dtype in peer.dtypes]

    def __str__(self) -> str:
        parts = [self.size, self.dtype_name, self.gradients]
        if self.rule != "adamw":
            parts.append(self.rule)
        if self.threads:
            parts.append(f"{self.threads}thread" + "s" * (self.threads > 1))
        if self.groups > 1 or self.lr != "constant":
            parts.append(f"{self.groups}group{'s' * (self.groups > 1)}-{self.lr}")
        if self.sweep:
            parts.append(f"by-{self.sweep}")
        return "-".join(parts)


#: The cases that the README begins with: large tensors, middling, small.
LEAD = ("300x100000-float32-kept", "2000x4096-float32-kept", "1000x1000-float32-kept")
#: On the CPU.
CASES = [
    *map(
        Case.parse,
        (
            "1x64Mi-float32-kept",
            "1x64Mi-bfloat16-kept",
            "300x100000-float32-kept",
            "300x100000-float32-new",
            "300x100000-bfloat16-kept",
            "2000x4096-float32-kept",
            "2000x4096-float32-new",
            "2000x256-float32-kept",
            "2000x256-float32-new",
            "1000x1000-float32-kept",
            "1000x1000-float32-new",
            "1000x1000-bfloat16-kept",
            "1000x1000-bfloat16-new",
            "1000x1000-float16-kept",
            "1000x1000-float64-kept",
            "100x1000-float32-kept",
            "1x64Mi-float32-kept-sgdw",
            "1x64Mi-bfloat16-kept-sgdw",
            "300x100000-float32-kept-sgdw",
            "300x100000-float32-new-sgdw",
            "1000x1000-float32-kept-sgdw",
            "1000x1000-float32-new-sgdw",
            "1000x1000-bfloat16-kept-sgdw",
            "1x64Mi-float32-kept-1thread",
            "300x100000-float32-kept-1thread",
            "1000x1000-float32-kept-1thread",
            "465x256-float32-kept-465groups-constant",
            "465x256-float32-kept-465groups-changing",
        ),
    ),
    *(Case(f"{10**k}x{10 ** (6 - k)}", sweep="tensors") for k in range(5)),
    *(Case(f"1x{10**k}", sweep="elements") for k in range(3, 10)),
    *(Case("1000x1000", groups=10**k, lr="changing", sweep="groups") for k in range(4)),
]

# On a GPU -------------------------------------------------------------------------------------------------------------

#: Cases of one long tensor, and the percentage of the copy bandwidth that they should reach.
TARGETS = {
    "1x1000000000-float32-kept": 92,
    "1x1000000000-bfloat16-kept": 88,
    "1x1000000000-float32+bfloat16-kept": 88,
    "1x1000000000-float32-kept-sgdw": 92,
    "1x1000000000-bfloat16-kept-sgdw": 88,
}
#: Cases of many tensors, which should take a sixth of torch's fused at most.
MANY = ("10000x1000-float32-kept", "10000x1000-float32-new")


def fitting_layers(free: float, bytes_per_parameter: float, most: int = 32) -> int:
    """Layers of the 8B Llama that fit into `free` bytes; 0 where not even the embeddings do."""
    fits = (n for n in range(most, 0, -1) if elements(llama(n)) * bytes_per_parameter <= free)
    return next(fits, 0)


def gpu_cases(small: bool, free: int) -> list[Case]:
    """Those that budgets need first; `free` bytes of the device's memory decide what Llama is cut to."""
    models = [f"{model}-float32-{how}" for model in ("gpt2", "vit_l16", "lora_7b") for how in ("kept", "new")]
    texts = [*TARGETS, *MANY, *models, "465x256-float32-kept-465groups-changing"]
    if small:
        for whole, tiny in (("1x1000000000", "1x100000"), ("10000x", "30x"), ("465", "20"), ("gpt2", "tiny_gpt2"),
                            ("vit_l16", "tiny_vit"), ("lora_7b", "tiny_lora")):  # fmt: skip
            texts = [text.replace(whole, tiny) for text in texts]
    # Ours and torch's fused alone, in the memory that both need beside shared parameters and gradients.
    half = torch.bfloat16
    needed = 2 * half.itemsize + our_states("adamw", half, None) + STATES["adamw"] * half.itemsize
    size = "tiny_llama3" if small else f"llama3_8b:{fitting_layers(0.92 * free, needed)}"
    return [*map(Case.parse, texts), replace(Case(size, half), only=(OURS, FUSED))]
