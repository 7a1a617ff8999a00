"""The measurement of a case, by the turns of wd_kernels.turns: what is kept of them, and what memory must hold."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from contenders import build
from peers import Peer
from workloads import Case

from wd_kernels.turns import CLOCK, LEAST_ROUNDS, MOST_MEMORY, ROUNDS, Contender, Timer, free_memory, plan, rounds

__all__ = ["CLOCK", "LEAST_ROUNDS", "ROUNDS", "Timer", "entry", "free_memory", "measure", "plan", "rounds"]


def entry(case: Case, contender: Contender, steps: int, turns: list[dict[str, float]]) -> dict[str, Any]:
    """What is kept of a contender's turns, as pytest-benchmark's JSON has it; seconds are per step."""
    tensors, elements = len(case.shapes), case.elements
    info = {
        **({"model": case.size} if case.model else {}),
        "tensors": tensors,
        "elements": elements / tensors if elements % tensors else elements // tensors,  # of a tensor, on average
        "dtype": "+".join(str(d).removeprefix("torch.") for d in dict.fromkeys((case.dtype, case.grad))),
        **{name: getattr(case, name) for name in ("gradients", "rule", "lr", "sweep")},
        "threads": case.threads or torch.get_num_threads(),
        "contender": contender.name,
        **{name: getattr(contender, name) for name in ("groups", "bytes_per_parameter")},
        "steps_per_round": steps,
        **{way: [turn[way] for turn in turns] for way in turns[0] if way != "wall"},
    }
    return {"group": str(case), "extra_info": info, "stats": {"data": [turn["wall"] for turn in turns]}}


def measure(
    case: Case, peers: dict[Peer, Callable[..., Any]], names: Sequence[tuple[str, int]], seconds: float, timer: Timer
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The entry of each contender of a case after about `seconds` of turns; and why others have none, by name."""
    free = free_memory()
    if not timer.on_device and free is not None and case.bytes_needed > MOST_MEMORY * free:
        needed = f"needs {case.bytes_needed / 2**30:.3g} GiB, free are {free / 2**30:.3g}"
        return [], {name: needed for name, _ in names}
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads or threads)
    gc.disable()
    try:
        them, skipped = build(case, peers, names, timer.where)
        entries = [entry(case, *one) for one in rounds(them, skipped, seconds, timer, case.elements)]
        del them
    finally:
        gc.enable()
        torch.set_num_threads(threads)
        timer.free()
    return entries, skipped
