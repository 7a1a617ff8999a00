"""What gradient release saves: the peak memory of training with it and without, and that the weights are the same.

    python examples/gradient_release.py
    python examples/gradient_release.py --width 1024 --layers 24

Each run is a process of its own, on a GPU where there is one (memory as torch's allocator counts it), else on the CPU
(resident memory beyond what the process had before the model was made).
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import resource
from collections.abc import Callable
from datetime import date
from typing import Any

import torch
from torch import nn

import wd_kernels

STEPS, BATCH = 4, 8
MIB = 2**20


def block(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def sgdw(params: Any) -> wd_kernels.SGDW:
    return wd_kernels.SGDW(params, lr=0.01, momentum=0.9, weight_decay=1e-4, decay="independent")


def adamw(params: Any) -> wd_kernels.AdamW:
    return wd_kernels.AdamW(params, lr=1e-3, weight_decay=0.1)


MAKERS: dict[str, Callable[[Any], Any]] = {"AdamW": adamw, "SGDW": sgdw}


def run(maker: str, release: bool, width: int, layers: int, answers: Any) -> None:
    """Trains, and answers with (bytes of the parameters, peak beyond the start, digest of the weights)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    block(8).to(device)(torch.ones(1, 8, device=device)).sum().backward()  # what libraries allocate once
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = nn.Sequential(*(block(width) for _ in range(layers))).to(device)
    optimizer = MAKERS[maker](model.parameters())
    if release:
        wd_kernels.release_gradients(model, optimizer)
    for t in range(STEPS):
        x = torch.randn(BATCH, width, generator=torch.Generator().manual_seed(t)).to(device)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().cpu().numpy().tobytes())
    answers.put((sum(p.numel() * 4 for p in model.parameters()), peak, digest.hexdigest()))


def in_a_process(*args: Any) -> tuple[int, int, str]:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=run, args=(*args, answers))
    process.start()
    found: tuple[int, int, str] = answers.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory with and without gradient release.")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=24)
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{date.today()}, torch {torch.__version__}, {device}, {options.layers} layers of width {options.width}")
    print(f"{'':<8}  {'parameters':>10}  {'ordinary':>10}  {'released':>10}  {'saved':>10}  of the gradients")
    for maker in MAKERS:
        (size, ordinary, a), (_, released, b) = (
            in_a_process(maker, release, options.width, options.layers) for release in (False, True)
        )
        if a != b:
            raise SystemExit(f"{maker}: OTHER WEIGHTS")
        cells = "  ".join(f"{n / MIB:>6.0f} MiB" for n in (size, ordinary, released, ordinary - released))
        print(f"{maker:<8}  {cells}  {(ordinary - released) / size:>6.0%}, the same weights to the bit")


if __name__ == "__main__":
    main()
