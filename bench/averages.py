"""An average of the weights beside a step: ours, within the pass, and torch's AveragedModel after it, in turns.

python bench/averages.py [> bench/results/averages.txt]
python bench/averages.py --device cuda [> bench/results/averages-gpu.txt]

Bytes of an AdamW step in float32: 28 an element; ours reads and writes the average too (36), AveragedModel reads the
weights once more (40).
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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import wd_kernels

#: tensors x elements, dtype: rounds
CASES = {
    (1, 64 << 20, torch.float32): 15, (300, 100_000, torch.float32): 25, (2000, 256, torch.float32): 51,
    (1000, 1000, torch.float32): 51, (300, 100_000, torch.bfloat16): 25,
}  # fmt: skip
DECAY = 0.999


def model_of(make: Callable[[], list[nn.Parameter]]) -> nn.Module:
    """A model whose parameters these are, with their gradients."""
    own = nn.Module()
    own.weights = nn.ParameterList(make())
    return own


def averaged(optimizer: Any, make: Callable[[], list[nn.Parameter]]) -> Callable[[], object]:
    """A step, and the update of torch's average after it."""
    model = model_of(make)
    opt = optimizer(model.parameters())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))  # type: ignore[no-untyped-call]

    def step() -> None:
        opt.step()
        average.update_parameters(model)

    return step


def sides(make: Callable[[], list[nn.Parameter]]) -> dict[str, Callable[[], object]]:
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}
    torchs: Any = partial(torch.optim.AdamW, fused=True, **options)
    plain: Any = partial(wd_kernels.AdamW, **options)
    found: dict[str, Callable[[], object]] = {
        "torch": averaged(torchs, make),
        "ours + torch's": averaged(plain, make),
        "ours": plain(make(), ema_decay=DECAY).step,
        "torch, step": torchs(make()).step,
        "ours, step": plain(make()).step,
    }
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rehearse", action="store_true", help="tiny tensors, few rounds: it checks this program")
    arguments = parser.parse_args(argv)
    versions = ", ".join(f"{key} {value}" for key, value in internals.versions_here().items())
    where = f"; {torch.cuda.get_device_name()}" if arguments.device == "cuda" else ""
    print(
        f"{date.today()}; {versions}{where}\nAdamW, median ms (quartiles): a step and its average, and a step alone\n"
    )
    names = ["torch", "ours + torch's", "ours", "torch, step", "ours, step"]
    print(f"{'tensors':>14}  {'':<9}  " + "  ".join(f"{name:>22}" for name in names) + "  torch / ours")
    for (tensors, elements, dtype), most in CASES.items():
        rounds = 2 if arguments.rehearse else most
        elements = min(elements, 100) if arguments.rehearse else elements
        own = sides(partial(parameters, tensors, elements, dtype, arguments.device))
        quartiles = in_turns({name: own[name] for name in names}, rounds, arguments.device)
        ratio = quartiles["torch"][1] / quartiles["ours"][1]
        print(f"{row(tensors, elements, dtype, quartiles)}  {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
