"""What a step of bfloat16 parameters with master weights costs, beside the passes that it replaces. Prints tables.

python bench/masters.py [--rounds N] [> bench/results/masters.txt]
"""

from __future__ import annotations

import gc
import importlib
import statistics
from collections.abc import Callable
from typing import Any

import internals
import torch
from byte_model import step_bytes
from formats import BF16, F32, SHAPES, begin, milliseconds, parameters
from rich.progress import track

import wd_kernels

OURS: dict[str, dict[str, Any]] = {
    "float32 master": {"master_weights": "float32"},
    "split32": {"master_weights": "split32"},
    "split24": {"master_weights": "split24"},
    "split24, stochastic": {"master_weights": "split24", "stochastic_rounding": True},
    "split32, bfloat16 states": {"master_weights": "split32", "state_dtype": BF16},
    "split24, bfloat16 states": {"master_weights": "split24", "state_dtype": BF16},
    "split24, 8-bit states": {"master_weights": "split24", "state_dtype": torch.int8},
}
MASTERS = {"float32": F32, "split32": torch.int16, "split24": torch.int8}


def ours(name: str) -> Callable[[list[Any]], Callable[[], object]]:
    return lambda params: wd_kernels.AdamW(params, lr=1e-3, **OURS[name]).step


def float32(params: list[Any]) -> Callable[[], object]:
    """Our step of float32 parameters with float32 gradients: nothing but that."""
    own = masters_of(params, F32)
    return wd_kernels.AdamW(own, lr=1e-3).step


def masters_of(params: list[Any], grads: torch.dtype) -> list[Any]:
    """Float32 parameters, with the gradients of `params` in a dtype."""
    own = [torch.nn.Parameter(p.detach().float()) for p in params]
    for p, q in zip(params, own, strict=True):
        q.grad_dtype = grads
        q.grad = p.grad if grads == p.grad.dtype else p.grad.to(grads)
    return own


def two_passes(params: list[Any]) -> Callable[[], object]:
    """Our float32 step, which takes bfloat16 gradients, then a copy."""
    own = masters_of(params, BF16)
    step, values = wd_kernels.AdamW(own, lr=1e-3).step, [p.detach() for p in params]
    from_values = [q.detach() for q in own]

    def run() -> None:
        step()
        torch._foreach_copy_(values, from_values)

    return run


def with_casts(make: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Callable[[], object]]:
    """Another's float32 step: gradients are cast before it, parameters copied after it."""

    def made(params: list[Any]) -> Callable[[], object]:
        own = masters_of(params, F32)
        step, values = make(own).step, [p.detach() for p in params]
        from_values, grads = [q.detach() for q in own], [q.grad for q in own]
        wide = [p.grad for p in params]

        def run() -> None:
            torch._foreach_copy_(grads, wide)
            step()
            torch._foreach_copy_(values, from_values)

        return run

    return made


def contenders() -> dict[str, Callable[[list[Any]], Callable[[], object]]]:
    found = {f"ours: {name}": ours(name) for name in OURS}
    found["ours: float32 parameters, no copies"] = float32
    found["ours: float32, then a copy"] = two_passes
    found["torch fused, casts before and after"] = with_casts(lambda own: torch.optim.AdamW(own, lr=1e-3, fused=True))
    try:
        theirs = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
    except ImportError:
        print("DeepSpeed is not installed (make peers)\n")
    else:
        found["DeepSpeedCPUAdam, casts before and after"] = with_casts(lambda own: theirs(own, lr=1e-3))
    return found


def bytes_of(name: str) -> str:
    """A parameter and step of ours."""
    own = OURS.get(name.removeprefix("ours: "))
    if own is None:
        return {"ours: float32 parameters, no copies": "28", "ours: float32, then a copy": "32"}.get(name, "40")
    return f"{step_bytes('adamw', BF16, BF16, own.get('state_dtype', F32), MASTERS[own['master_weights']]):g}"


def main() -> None:
    rounds = begin(str(__doc__))
    print(
        "AdamW, bfloat16 parameters and gradients; ms, median (quartiles) of", rounds, "rounds in turn with a float32"
    )
    print("master in one pass; B: bytes of a parameter and step\n")
    known = contenders()
    base = "ours: float32 master"
    for shape, shapes in SHAPES.items():
        rows: list[tuple[object, ...]] = [(shape, "B", "ms", "quartiles", "/ one pass")]
        for name in track(list(known), shape, transient=True):  # each by itself beside the base: all would not fit
            times: list[list[float]] = [[], []]
            for first in (0, 1):  # which is made first: where memory lies may cost some percent
                made = {k: known[(base, name)[k]](parameters(shapes, BF16)) for k in (first, 1 - first)}
                for turn in range(rounds // 2 + 2):
                    for k in (0, 1):
                        times[k] += [milliseconds(made[k])] * (turn >= 2)
                made.clear()
                gc.collect()
            low, middle, high = statistics.quantiles(times[1], n=4)
            ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
            rows.append((name, bytes_of(name), f"{middle:.2f}", f"{low:.2f} to {high:.2f}", f"{ratio:.2f}"))
        print(internals.aligned(rows, indent=""), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
