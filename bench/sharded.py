"""What a step of DTensors costs beside one of ordinary tensors: ours, and torch's, in turns. Prints a table.

python bench/sharded.py [> bench/results/sharded.txt]
"""

from __future__ import annotations

import statistics
import time
from datetime import date
from functools import partial
from typing import Any

import internals
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import wd_kernels

CASES = {(300, 16): 400, (300, 1000): 200, (300, 100_000): 15}  # tensors x elements: rounds
TORCH: Any = torch.optim.AdamW
OURS: Any = {"wd_kernels": wd_kernels.AdamW}
TORCHS: Any = {f"torch {how}": partial(TORCH, **{how: True}) for how in ("fused", "foreach")}


def parameters(tensors: int, elements: int, sharded: bool) -> list[Any]:
    mesh = init_device_mesh("cpu", (1,))
    made = [torch.randn(elements) for _ in range(tensors)]
    return [torch.nn.Parameter(distribute_tensor(t, mesh, [Shard(0)]) if sharded else t) for t in made]


def give_gradients(params: list[Any]) -> None:
    """New ones, as a backward pass of fully_shard's leaves them."""
    for p in params:
        g = torch.randn(p.shape)
        p.grad = DTensor(g, p._spec, requires_grad=False) if isinstance(p, DTensor) else g  # type: ignore[no-untyped-call]


def main() -> None:
    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    versions = ", ".join(f"{key} {value}" for key, value in internals.versions_here().items())
    print(f"{date.today()}; {versions}\nfloat32 AdamW, new gradients in every step, median us of step() (quartiles)\n")
    print(f"{'tensors':>13}  {'':<14}  {'ordinary':>28}  {'DTensor':>28}  ratio")
    for (tensors, elements), rounds in CASES.items():
        sides = [(name, make, s) for name, make in {**OURS, **TORCHS}.items() for s in (False, True)]
        them = [(params := parameters(tensors, elements, s), make(params, lr=1e-3)) for _, make, s in sides]
        times: list[list[float]] = [[] for _ in sides]
        for t in range(rounds + 3):
            for own, (params, opt) in zip(times, them, strict=True):
                give_gradients(params)
                start = time.perf_counter()
                opt.step()
                own += [1e6 * (time.perf_counter() - start)] * (t >= 3)
        quartiles = [statistics.quantiles(own, n=4) for own in times]
        for (name, *_), a, b in zip(sides[::2], quartiles[::2], quartiles[1::2], strict=True):
            cells = "  ".join(f"{q[1]:>10.1f} ({q[0]:.0f} to {q[2]:.0f})".rjust(28) for q in (a, b))
            print(f"{f'{tensors} x {elements}':>13}  {name:<14}  {cells}  {b[1] / a[1]:>5.2f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
