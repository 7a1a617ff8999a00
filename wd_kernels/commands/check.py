"""`check`: what is here, what was chosen, does it compute right. It is what `python -m wd_kernels` alone does.

Every backend that is there is compared with the reference, bit for bit, and each step of it with the same step in
float64 from the same values. The exit status is 1 on a mismatch, or where nothing could be checked.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import time
from collections.abc import Sequence

import torch

from .. import native
from ..backends import BACKENDS, FASTEST, triton
from ..layout import Spec
from ..printing import aligned
from ..self_check import LIMIT, STEPS, Outcome, all_cases, check, device_of
from ..version import __version__

__all__ = ["HELP", "add_arguments", "choices", "run", "versions"]

HELP = "what is installed, what was chosen, and does it compute right"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def refusal(name: str) -> str | None:
    """Why a backend that is there does not step tensors of the GPU that it would be checked on."""
    device = device_of(name)
    return None if device.type == "cpu" else BACKENDS[name].refuses(Spec(device, (), ()))


def versions() -> list[tuple[str, str]]:
    """Names and versions of what takes part."""
    numpy = "not installed"
    if importlib.util.find_spec("numpy") is not None:
        import numpy as np

        numpy = np.__version__
    return [
        ("wd_kernels", __version__),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("numpy", numpy),
        ("triton", triton.version() or "not installed"),
        ("platform", platform.platform()),
    ]


def fastest(kind: str) -> str:
    """What backend="auto" takes for tensors of a type of device."""
    return next((name for name in FASTEST.get(kind, ()) if BACKENDS[name].why_not() is None), "reference")


def choices() -> list[tuple[str, str]]:
    """What was chosen on this machine."""
    if native.C is None:
        instructions = "none: the native extension is not there"
    else:
        try:
            instructions = native.C.instruction_set()
        except RuntimeError as raised:
            instructions = str(raised).splitlines()[0]
        forced = os.environ.get("WD_KERNELS_ISA")
        instructions += f" (WD_KERNELS_ISA={forced})" if forced else ""
    check = "native"
    if not native.CHECKS:
        check = "Python (slower: the native extension is missing, or torch is one that it does not know)"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    name = "none" if accelerator is None else str(accelerator)
    if name.startswith("cuda"):
        name = torch.cuda.get_device_name()
    threads = str(torch.get_num_threads())
    kinds = [("CPU tensors", "cpu"), *([("GPU tensors", "cuda")] if accelerator is not None else [])]
    chosen = [(what, f"stepped with {fastest(kind)!r} by backend='auto'") for what, kind in kinds]
    chosen += [("instruction set", instructions), ("threads", threads), ("check", check), ("accelerator", name)]
    return chosen + ([("CUDA kernels", native.OPS.cuda_built())] if native.load_cuda() is None else [])


def print_self_check(names: Sequence[str]) -> int:
    """Checks the backends, prints the table and what is wrong; returns the exit status."""
    started = time.perf_counter()
    table: dict[tuple[str, str, torch.dtype], Outcome] = {}
    for case in all_cases():
        for name, outcome in check(case, names).items():
            row = table.setdefault((name, case.optimizer, case.dtype), Outcome())
            row.cases += outcome.cases
            row.wrong += outcome.wrong
            row.param_error = max(row.param_error, outcome.param_error)
            row.state_error = max(row.state_error, outcome.state_error)
    rows: list[tuple[object, ...]] = [
        ("backend", "optimizer", "dtype", "cases", "parameter error", "state error", "result")
    ]
    for (name, optimizer, dtype), outcome in sorted(table.items(), key=lambda item: names.index(item[0][0])):
        no_oracle = dtype == torch.float64 and not outcome.wrong
        errors = ("-", "-") if no_oracle else (f"{outcome.param_error:.2f}", f"{outcome.state_error:.2f}")
        right = "within the limit" if name == "reference" else "equal to the reference"
        result = f"WRONG in {len(outcome.wrong)}" if outcome.wrong else right
        rows.append((name, optimizer, str(dtype).removeprefix("torch."), outcome.cases, *errors, result))
    print(aligned(rows))
    print(f"  error: of one step against float64, in units of eps * max(|before|, |after|, rms); limit {LIMIT:g}")

    wrong = [f"{name}: {what}" for (name, _, _), outcome in table.items() for what in outcome.wrong]
    seconds = time.perf_counter() - started
    for line in wrong[:20]:
        print(f"  WRONG  {line}")
    if len(wrong) > 20:
        print(f"  and {len(wrong) - 20} more")
    summary = f"{len(wrong)} cases are wrong" if wrong else "all backends compute right"
    print(f"\n{summary} ({sum(o.cases for o in table.values())} cases of {STEPS} steps, {seconds:.1f} s)")
    return 1 if wrong else 0


def run(arguments: argparse.Namespace) -> int:
    """Prints the sections; returns the exit status."""
    why_not = {name: backend.why_not() or refusal(name) for name, backend in BACKENDS.items()}
    backends = [(name, f"not available: {why}" if why else "available") for name, why in why_not.items()]
    for title, section in (("Versions", versions()), ("Backends", backends), ("Chosen", choices())):
        print(f"{title}\n{aligned(section)}\n")
    print("Self-check")
    if why_not["reference"]:
        print(f"  Nothing can be checked without the reference: {why_not['reference']}")
        return 1
    return print_self_check(
        ["reference", *(name for name, why in why_not.items() if why is None and name != "reference")]
    )
