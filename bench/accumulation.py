"""Adding gradients to float32 accumulators, with the norm of the sums: ours and torch's, in turns. Prints a table.

python bench/accumulation.py [> bench/results/accumulation.txt]
python bench/accumulation.py --device cuda [> bench/results/accumulation-gpu.txt]

"add" is torch._foreach_add_, "add, norm" that and torch.nn.utils.get_total_norm. Bytes of an element: 10 with bfloat16
gradients, 12 with float32 ones; a norm of its own reads 4 more.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from datetime import date

import internals
import torch
from clipping import in_turns, row

from wd_kernels.functional import accumulate_

#: tensors x elements, dtype of gradients: rounds
CASES = {
    (1, 64 << 20, torch.bfloat16): 11, (300, 100_000, torch.bfloat16): 25, (2000, 256, torch.bfloat16): 101,
    (1, 64 << 20, torch.float32): 11, (300, 100_000, torch.float32): 25, (2000, 256, torch.float32): 101,
}  # fmt: skip
NAMES = ("torch, add", "torch, add, norm", "ours")


def sides(tensors: int, elements: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], object]]:
    grads = [torch.randn(elements, device=device).to(dtype) for _ in range(tensors)]
    ours, theirs, others = ([torch.zeros(elements, device=device) for _ in range(tensors)] for _ in range(3))

    def add_and_norm() -> torch.Tensor:
        torch._foreach_add_(others, grads)
        return torch.nn.utils.get_total_norm(others)

    calls = (lambda: torch._foreach_add_(theirs, grads), add_and_norm, lambda: accumulate_(ours, grads))
    return dict(zip(NAMES, calls, strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rehearse", action="store_true", help="tiny tensors, few rounds: it checks this program")
    arguments = parser.parse_args(argv)
    device = arguments.device
    versions = ", ".join(f"{key} {value}" for key, value in internals.versions_here().items())
    where = f"; {torch.cuda.get_device_name()}" if device == "cuda" else ""
    print(f"{date.today()}; {versions}{where}\nfloat32 accumulators, median ms (quartiles)\n")
    print(
        f"{'tensors':>14}  {'gradients':<9}  " + "  ".join(f"{n:>22}" for n in NAMES) + "  add / ours  add, norm / ours"
    )
    for (tensors, elements, dtype), most in CASES.items():
        rounds = 2 if arguments.rehearse else most
        elements = min(elements, 100) if arguments.rehearse else elements
        quartiles = in_turns(sides(tensors, elements, dtype, device), rounds, device)
        ratios = [quartiles[name][1] / quartiles["ours"][1] for name in NAMES[:2]]
        print(f"{row(tensors, elements, dtype, quartiles)}  {ratios[0]:>10.2f}  {ratios[1]:>16.2f}", flush=True)


if __name__ == "__main__":
    main()
