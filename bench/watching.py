"""What watching a step costs: statistics, marks of changes, and reading them, beside the step alone, in turns.

python bench/watching.py [> bench/results/watching.txt]
python bench/watching.py --device cuda [> bench/results/watching-gpu.txt]

Beside them, how others come by the same: norms by torch's foreach functions after the step, with a copy of the weights
before it, and a snapshot that the weights are compared with.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from typing import Any

import internals
import torch
from clipping import in_turns, parameters, row
from torch import nn

import wd_kernels

#: tensors x elements, dtype: rounds
CASES = {
    (1, 64 << 20, torch.float32): 15, (1, 64 << 20, torch.bfloat16): 15, (300, 100_000, torch.float32): 25,
    (2000, 256, torch.float32): 51,
}  # fmt: skip


def with_norms(opt: Any, params: list[nn.Parameter]) -> Callable[[], object]:
    """A step, and the same norms by torch: of gradients, weights, and what the step has changed."""
    before = [p.detach().clone() for p in params]
    after: list[torch.Tensor] = list(params)
    grads = [p.grad for p in params if p.grad is not None]

    @torch.no_grad()
    def step() -> None:
        torch._foreach_copy_(before, after)
        opt.step()
        torch._foreach_norm(grads)
        torch._foreach_norm(after)
        torch._foreach_sub_(before, after)
        torch._foreach_norm(before)
        torch._foreach_max([own.abs() for own in before])

    return step


def with_snapshot(opt: Any, params: list[nn.Parameter]) -> Callable[[], object]:
    """A step, and which elements have changed since the last one, by comparing with a snapshot."""
    before = [p.detach().clone() for p in params]

    @torch.no_grad()
    def step() -> None:
        opt.step()
        for own, p in zip(before, params, strict=True):
            torch.nonzero(own != p)
            own.copy_(p)

    return step


def sides(make: Callable[[], list[nn.Parameter]]) -> dict[str, Callable[[], object]]:
    optimizer: Any = partial(wd_kernels.AdamW, lr=1e-3, weight_decay=0.1)
    measured, read, marked, sent = (optimizer(make()) for _ in range(4))
    measured.statistics()
    of_read = read.statistics()
    marked.track_changes = sent.track_changes = True

    def step_and_read() -> object:
        read.step()
        return of_read.tensors

    def step_and_send() -> object:
        sent.step()
        return sent.changes()

    params = make()
    others = make()
    return {
        "step": optimizer(make()).step,
        "statistics": measured.step,
        "and read": step_and_read,
        "torch's norms": with_norms(optimizer(params), params),
        "marks": marked.step,
        "and read ": step_and_send,
        "snapshot": with_snapshot(optimizer(others), others),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="*", help="these of the columns")
    parser.add_argument("--rehearse", action="store_true", help="tiny tensors, few rounds: it checks this program")
    arguments = parser.parse_args(argv)
    versions = ", ".join(f"{key} {value}" for key, value in internals.versions_here().items())
    where = f"; {torch.cuda.get_device_name()}" if arguments.device == "cuda" else ""
    print(f"{date.today()}; {versions}{where}\nAdamW, median ms (quartiles) of a step, watched or not\n")
    names: list[str] = []
    for (tensors, elements, dtype), most in CASES.items():
        rounds = 2 if arguments.rehearse else most
        elements = min(elements, 100) if arguments.rehearse else elements
        own = sides(partial(parameters, tensors, elements, dtype, arguments.device))
        own = {name: side for name, side in own.items() if not arguments.only or name in ("step", *arguments.only)}
        if not names:
            names = list(own)
            print(f"{'tensors':>14}  {'':<9}  " + "  ".join(f"{name:>22}" for name in names) + "  over a step")
        quartiles = in_turns(own, rounds, arguments.device)
        over = [f"{name.strip()} {quartiles[name][1] / quartiles['step'][1]:.2f}" for name in names[1:]]
        print(f"{row(tensors, elements, dtype, quartiles)}  {', '.join(over)}", flush=True)


if __name__ == "__main__":
    main()
