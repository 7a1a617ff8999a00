"""What the benchmarks step: sizes, shapes of known models, dtypes, rules, threads, groups, and the scaling sweeps.

A case is a text, such as 300x100000-float32-new or gpt2-bfloat16-kept; CPU and GPU have lists of such texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from byte_model import STATES
from peers import DEEPSPEED, FLAT, FUSED, OURS, RULES, Peer

from wd_kernels.model_shapes import Shapes, elements, gpt2, llama, lora, vit

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

#: By name; LAYERS may follow, as in llama3_8b:20. The tiny one is for rehearsals.
MODELS: dict[str, Callable[..., Shapes]] = {
    "gpt2": gpt2, "vit_l16": vit, "llama3_8b": llama, "lora_7b": lora, "tiny_gpt2": partial(gpt2, 2, 32, 101, 16)
}  # fmt: skip

_CASE = re.compile(
    rf"((\d+)x(\d+)(|Ki|Mi)|({'|'.join(MODELS)})(?::(\d+))?)-(\w+?)(?:\+(\w+))?-(kept|new)"
    rf"(?:-({'|'.join(RULES)}))?(?:-(\d+)threads?)?(?:-(\d+)groups?-(constant|changing))?(?:-by-({'|'.join(SWEEPS)}))?"
)


class Case:
    """Tensors to step, and what happens between steps, by a text such as gpt2-float32-kept or 4x256-bfloat16-new-sgdw.

    Args:
        text: TENSORSxELEMENTS (with Ki or Mi perhaps) or a model of MODELS, then
            -DTYPE[+DTYPE of the gradients]-kept|new[-RULE][-Nthreads][-Ngroups-constant|changing][-by-SWEEP].
        only: names of the peers that take part; empty: all.

    Gradients are "kept" from step to step, or "new" ones at new addresses; they have a dtype of their own for a
    contender that takes it. Where there are groups, every optimizer runs with one group of all tensors and with as
    many, their lr "constant" or "changing" in each before every step. A point of a sweep runs with its groups only.
    """

    def __init__(self, text: str, only: tuple[str, ...] = ()) -> None:
        found = _CASE.fullmatch(text)
        dtypes: list[Any] = [getattr(torch, name, None) for name in found.group(7, 8) if name] if found else [None]
        if found is None or not all(isinstance(dtype, torch.dtype) for dtype in dtypes):
            form = str(Case.__doc__).split("text: ")[1].split("only:")[0]
            raise ValueError(f"case {text!r}: expected {' '.join(form.split())} Models: {', '.join(MODELS)}")
        self.text, self.only, self.size, self.model = text, only, found[1], found[5] or ""
        if self.model:
            self.shapes = MODELS[self.model](*([int(found[6])] if found[6] else []))
        else:
            self.shapes = ((int(found[3]) * {"": 1, "Ki": 1 << 10, "Mi": 1 << 20}[found[4]],),) * int(found[2])
        self.dtype, self.grad, self.mixed = dtypes[0], dtypes[-1], len(dtypes) > 1
        self.gradients, self.rule, self.threads = found[9], found[10] or "adamw", int(found[11] or 0)
        self.groups, self.lr, self.sweep = int(found[12] or 1), found[13] or "constant", found[14] or ""
        self.elements = elements(self.shapes)

    def __str__(self) -> str:
        return self.text

    @property
    def bytes_needed(self) -> float:
        """Memory that it takes, about: parameters, gradients and states; twice that where there are flat copies too."""
        each = self.dtype.itemsize + self.grad.itemsize + STATES[self.rule] * max(self.dtype.itemsize, 4)
        return float(self.elements * each) * (1 if self.sweep == "elements" else 3)

    def stepping(self, peers: Sequence[Peer]) -> list[tuple[str, int]]:
        """(name, number of groups) of all that step this case, where `peers` are there."""
        names = [peer.name for peer in peers if peer.rule == self.rule and self.dtype in peer.dtypes]
        names = [name for name in names if not self.only or name in self.only]
        if self.gradients == "kept" and len(self.shapes) > 1 and not self.mixed and not self.only:
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


#: The cases that the README begins with: large tensors, middling, small.
LEAD = ("300x100000-float32-kept", "2000x4096-float32-kept", "1000x1000-float32-kept")
#: On the CPU.
CASES = (
    "1x64Mi-float32-kept", "1x64Mi-bfloat16-kept", "300x100000-float32-kept", "300x100000-float32-new",
    "300x100000-bfloat16-kept", "2000x4096-float32-kept", "2000x4096-float32-new", "2000x256-float32-kept",
    "2000x256-float32-new", "1000x1000-float32-kept", "1000x1000-float32-new", "1000x1000-bfloat16-kept",
    "1000x1000-bfloat16-new", "1000x1000-float16-kept", "1000x1000-float64-kept", "100x1000-float32-kept",
    "1x64Mi-float32-kept-sgdw", "1x64Mi-bfloat16-kept-sgdw", "300x100000-float32-kept-sgdw",
    "300x100000-float32-new-sgdw", "1000x1000-float32-kept-sgdw", "1000x1000-float32-new-sgdw",
    "1000x1000-bfloat16-kept-sgdw", "1x64Mi-float32-kept-1thread", "300x100000-float32-kept-1thread",
    "1000x1000-float32-kept-1thread", "465x256-float32-kept-465groups-constant",
    "465x256-float32-kept-465groups-changing",
    *(f"{10**k}x{10 ** (6 - k)}-float32-kept-by-tensors" for k in range(5)),
    *(f"1x{10**k}-float32-kept-by-elements" for k in range(3, 10)),
    *(f"1000x1000-float32-kept-{n}-changing-by-groups" for n in ("1group", "10groups", "100groups", "1000groups")),
)  # fmt: skip

# On a GPU -------------------------------------------------------------------------------------------------------------

#: Cases of one long tensor, and the percentage of the copy bandwidth that they should reach.
TARGETS = {
    "1x1000000000-float32-kept": 92, "1x1000000000-bfloat16-kept": 88, "1x1000000000-float32+bfloat16-kept": 88,
    "1x1000000000-float32-kept-sgdw": 92, "1x1000000000-bfloat16-kept-sgdw": 88,
}  # fmt: skip
#: Cases of many tensors, which should take a sixth of torch's fused at most.
MANY = ("10000x1000-float32-kept", "10000x1000-float32-new")
#: What a rehearsal has instead.
SMALL = (
    "1x100000-float32-kept", "1x100000-float32+bfloat16-kept", "1x100000-float32-kept-sgdw", "30x1000-float32-new",
    "tiny_gpt2-bfloat16-kept", "20x256-float32-kept-20groups-changing",
)  # fmt: skip


def fitting_layers(free: float, bytes_per_parameter: float) -> int:
    """Layers of the 8B Llama that fit into `free` bytes; 0 where not even the embeddings do."""
    return next((n for n in range(32, 0, -1) if elements(llama(n)) * bytes_per_parameter <= free), 0)


def gpu_cases(free: int) -> list[Case]:
    """Those that budgets need first; `free` bytes of the device's memory decide what Llama is cut to."""
    models = [f"{model}-float32-{how}" for model in ("gpt2", "vit_l16", "lora_7b") for how in ("kept", "new")]
    # Ours and torch's fused alone, in the memory that both need beside shared parameters and gradients.
    needed = 2 * 2 + STATES["adamw"] * (4 + 2)
    largest = Case(f"llama3_8b:{fitting_layers(0.92 * free, needed)}-bfloat16-kept", only=(OURS, FUSED))
    return [*map(Case, (*TARGETS, *MANY, *models, "465x256-float32-kept-465groups-changing")), largest]
