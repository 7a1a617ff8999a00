"""What the CPU benchmark steps: sizes, tensor counts, dtypes, rules, threads, groups, and the scaling sweeps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peers import FLAT, FUSED, OURS

import wd_kernels
from wd_kernels.formats import state_dtype

__all__ = [
    "BARE_LOOP",
    "CASES",
    "CEILING",
    "DEEPSPEED",
    "FLAT",
    "LEAD",
    "REFERENCE",
    "SWEEPS",
    "TIMED",
    "Case",
    "free_memory",
]

REFERENCE, BARE_LOOP, CEILING = f"{OURS} reference", "bare loop", "ceiling"
#: The same optimizer, its launches timed from within.
TIMED = {OURS: f"{OURS}, launches timed", FLAT: f"{FLAT}, launches timed"}
DEEPSPEED = "DeepSpeed CPU"
#: What a sweep varies, and what it is measured with.
SWEEPS: dict[str, tuple[str, ...]] = {
    "tensors": (OURS, TIMED[OURS], FLAT, TIMED[FLAT], FUSED, DEEPSPEED, BARE_LOOP),
    "elements": (OURS, TIMED[OURS], FUSED, DEEPSPEED, BARE_LOOP),
    "groups": (OURS, TIMED[OURS], FLAT, TIMED[FLAT], FUSED, DEEPSPEED),
}
#: The cases that the README begins with: large tensors, middling, small.
LEAD = ("300x100000-float32-kept", "2000x4096-float32-kept", "1000x1000-float32-kept")
SLOWLY = 100_000  # elements of the largest case that the reference steps
_KIBI = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20}
_PATTERN = re.compile(
    r"(\d+)x(\d+)(|Ki|Mi)-(\w+)-(kept|new)(-sgdw)?(?:-(\d+)threads?)?(?:-(\d+)groups?-(constant|changing))?"
    r"(?:-by-(tensors|elements|groups))?"
)


@dataclass(frozen=True)
class Case:
    """Tensors to step, and what happens between steps.

    Attributes:
        gradients: "kept": the same tensors every step; "new": every step has new gradients at new addresses.
        rule: "adamw", or "sgdw" with momentum.
        threads: of torch; 0: as many as it had.
        groups: where over 1, every optimizer runs with one group of all tensors and with this many groups.
        lr: "constant", or "changing" in every group before every step.
        sweep: a key of SWEEPS, where the case is a point of one; it then runs with its groups only.
    """

    tensors: int
    elements: int
    dtype: torch.dtype = torch.float32
    gradients: str = "kept"
    rule: str = "adamw"
    threads: int = 0
    groups: int = 1
    lr: str = "constant"
    sweep: str = ""

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case that prints as `text`, such as 300x100000-float32-new or 465x256-float32-kept-465groups-changing."""
        found = _PATTERN.fullmatch(text)
        dtype = getattr(torch, found[4], None) if found else None
        if found is None or not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"case {text!r}: expected TENSORSxELEMENTS-DTYPE-kept|new[-sgdw][-Nthreads]"
                "[-Ngroups-constant|changing][-by-tensors|elements|groups]"
            )
        return cls(
            int(found[1]),
            int(found[2]) * _KIBI[found[3]],
            dtype,
            found[5],
            "sgdw" if found[6] else "adamw",
            int(found[7] or 0),
            int(found[8] or 1),
            found[9] or "constant",
            found[10] or "",
        )

    @property
    def size(self) -> str:
        """Tensors x elements, as people say it."""
        mebi, rest = divmod(self.elements, 1 << 20)
        return f"{self.tensors}x{self.elements if rest or not mebi else f'{mebi}Mi'}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def bytes_needed(self) -> int:
        """Memory that it takes, about: parameters, gradients and states; twice that where there are flat copies too."""
        each = 2 * self.dtype.itemsize + (2 if self.rule == "adamw" else 1) * state_dtype(self.dtype).itemsize
        return self.tensors * self.elements * each * (1 if self.sweep == "elements" else 3)

    def contenders(self, peers: Sequence[str]) -> list[tuple[str, int]]:
        """(name, number of groups) of all that step this case; `peers` are the optimizers that are there."""
        names = list(peers)
        if self.gradients == "kept" and self.tensors > 1 and hasattr(wd_kernels, "flatten_"):
            names.insert(1, FLAT)
        if self.sweep:
            names += [longer for name, longer in TIMED.items() if name in names]
            names = [name for name in SWEEPS[self.sweep] if name in names or name == BARE_LOOP]
            return [*((name, self.groups) for name in names), (CEILING, 1)]
        if self.groups > 1:
            return [*((name, groups) for groups in (1, self.groups) for name in names), (CEILING, 1)]
        if self.tensors * self.elements <= SLOWLY:
            names.append(REFERENCE)
        return [(name, 1) for name in (*names, BARE_LOOP, CEILING)]

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


def free_memory() -> int | None:
    """Bytes that programs can still take, as Linux estimates it; None where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


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
    *(Case(10**k, 10 ** (6 - k), sweep="tensors") for k in range(5)),
    *(Case(1, 10**k, sweep="elements") for k in range(3, 10)),
    *(Case(1000, 1000, groups=10**k, lr="changing", sweep="groups") for k in range(4)),
]
