"""The Triton backend: one launch a bucket, on the tensors' device and current stream, never waiting for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..epilogues import Epilogue
from ..layout import BLOCK, Bucket, Spec, Table
from ..norms import Bank, Norms
from ..rules import Rule
from .device import OnDevice, arguments, current, machine, refuse_loading
from .device_copy import There

__all__ = ["OLDEST", "Triton", "block", "interpreted", "options", "version", "with_sizes"]

OLDEST = (3, 6)
THREADS = 128
SQUARED = 4  # blocks of 1024 whose squares are added up at once: 16-byte loads that keep a processor busy
REGISTERS = 65536  # of an NVIDIA multiprocessor


def _triton() -> Any:
    """Triton, or the error of its import."""
    try:
        return importlib.import_module("triton")
    except ImportError as error:
        return error


def version() -> str | None:
    """Triton's version, None where it is not there."""
    return getattr(_triton(), "__version__", None)


@cache
def _kernels() -> Any:
    """The module of the kernels, or a sentence that says why it is not there."""
    known = version()
    if known is None:
        return f"Triton is not there ({_triton()}); torch's wheels for CUDA and ROCm bring it, else: pip install triton"
    if tuple(int(part) for part in known.split(".")[:2]) < OLDEST:
        return f"Triton {known} is too old: {'.'.join(map(str, OLDEST))} is the oldest that is known here"
    return importlib.import_module(".triton_kernels", __package__)


def _begin() -> Any:
    """The module of what is launched before steps, where `_kernels` is one."""
    return importlib.import_module(".triton_begin", __package__)


def interpreted() -> bool:
    """Do the kernels run in Triton's interpreter (TRITON_INTERPRET=1 when they were first used)?"""
    module = _kernels()
    return not isinstance(module, str) and type(module.step_kernel).__name__ == "InterpretedFunction"


def block(formats: tuple[Any, ...], numbers: int = 0) -> int:
    """Elements of a block: 8 a thread, or 4 of float64; where epilogues have numbers of blocks, such a block."""
    return BLOCK // 2 if formats[0].dtype == torch.float64 and not numbers else BLOCK


def with_sizes(epilogues: Sequence[Epilogue]) -> tuple[tuple[Any, ...], tuple[tuple[Any, ...], ...]]:
    """The functions of epilogues, and what the kernel must know of each (`step_kernel`)."""
    functions = tuple(own.in_triton() for own in epilogues)
    sizes = []
    for own, function in zip(epilogues, functions, strict=True):
        known_by = str(getattr(function, "cache_key", ""))
        sizes.append((len(own.scalars), len(own.outputs), len(own.numbers), len(own.sums), int(own.marks), known_by))
    return functions, tuple(sizes)


def options(
    formats: tuple[Any, ...], warp: int, capability: int | None, epilogues: Sequence[Epilogue] = (), pull: int = 0
) -> dict[str, Any]:
    """How a kernel is compiled: exact arithmetic and, where it holds much, the registers that some programs leave it.

    Left to itself, ptxas puts a register on the stack now and then, so that one program more fits on a processor. The
    numbers are the best of which it keeps all in registers, with the oldest and the newest Triton (`make codegen`).
    `capability`: of an NVIDIA GPU, 90, say; None of another. `pull`: of the `Spec`; a reference counts as a state.
    """
    how: dict[str, Any] = {"num_warps": THREADS // warp, "enable_fp_fusion": False}
    if capability is not None and (programs := _programs(formats, capability, epilogues, pull)) is not None:
        how["maxnreg"] = min(REGISTERS // (programs * THREADS) // 16 * 16, 255)
    several = len(epilogues) > 1 and any(own.numbers for own in epilogues)
    if warp == 64 and several:  # AMD's: the oldest Triton would put some on the stack, to have more waves
        how["waves_per_eu"] = 2
    return how


def _programs(formats: tuple[Any, ...], capability: int, epilogues: Sequence[Epilogue], pull: int) -> int | None:
    """How many are to be on a processor at once; None: ptxas finds as many as it should."""
    param, grad, *others = (fmt.dtype.itemsize for fmt in formats)  # states, and what epilogues write
    outputs, numbers, marks = (
        any(getattr(own, what) for own in epilogues) for what in ("outputs", "numbers", "marks")
    )  # fmt: skip
    programs = 4 if param == 8 else 8 - len(others) - (pull == 1)
    if len(others) >= 2:
        copied = formats[0].part is not None and formats[0].part.dtype == torch.float32
        full = param == others[0] == 2 and capability >= (90 if len(others) == 2 else 100)
        if any(fmt.stochastic for fmt in formats):
            programs -= 3 if full and formats[0].part is not None and capability >= 100 else 2 if full else 1
            programs -= 1 if any(fmt.binades for fmt in formats) else 0
        elif len(others) == 2 and (grad < param or copied) and capability < 90:
            programs -= 1
        wide, narrow = param == 8 and len(others) > 2, param == 2 == len(others) and capability >= 100
        if outputs and capability >= 90 and (wide or narrow):
            programs -= 1
    elif not numbers:
        return None
    # What an epilogue makes of a block takes registers too: marks those of one program; numbers are held of all
    # elements until they are added up, in float64 of a block that is twice as long as others, and beside the rest.
    if numbers:
        return 2 if (param == 8 and len(others) >= 2) or outputs or marks else 3
    return programs - 1 if marks else programs


def options_before(kernel: str, warp: int, capability: int | None) -> dict[str, Any]:
    """How the kernels are compiled that are run before a step: "squares", "accumulate", "begin"."""
    how: dict[str, Any] = {"num_warps": THREADS // warp, "enable_fp_fusion": False}
    if kernel != "squares" and capability is not None:  # left to itself, ptxas puts some on the stack to spare them
        how["maxnreg"] = 128 if kernel == "begin" else 160
    return how


@cache
def _capability(device: torch.device) -> int | None:
    """Of an NVIDIA GPU: 90 for 9.0."""
    if device.type != "cuda" or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def _no_driver() -> str | None:
    """Why Triton cannot compile for the GPU that is there, None where it can: it wants a C compiler, say."""
    try:
        importlib.import_module("triton.runtime").driver.active.get_current_target()
    except Exception as error:
        return f"Triton cannot use this GPU ({type(error).__name__}: {error})"
    return None


def _load(compiled: Any) -> None:
    """Brings a compiled kernel to the current device: Triton does it where `run` is read."""
    _ = compiled.run


class Triton(OnDevice):
    """Kernels of `triton_kernels.py`, for CUDA and ROCm tensors; under TRITON_INTERPRET=1 for CPU tensors."""

    name = "triton"

    def __init__(self) -> None:
        self._compiled: set[tuple[Any, ...]] = set()

    def why_not(self) -> str | None:
        module = _kernels()
        if isinstance(module, str):
            return module
        if interpreted():
            return None
        if not torch.accelerator.is_available():
            return "no GPU is there (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)"
        return _no_driver()

    def refuses(self, spec: Spec) -> str | None:
        device = spec.device
        if interpreted():
            if device.type != "cpu":
                return f"the tensors are on {device}, and TRITON_INTERPRET=1 runs the kernels on CPU tensors only"
            return None
        if device.type not in ("cuda", "xpu"):
            return (
                f"the tensors are on {device}, and this backend steps tensors of a GPU "
                "(TRITON_INTERPRET=1, set before the start, runs its kernels on CPU tensors, slowly)"
            )
        return None

    def launch(self, table: Table, bucket: Bucket, size: int, there: There) -> Callable[[], None]:
        kernels, spec, chunks = _kernels(), bucket.spec, there[bucket.index]
        epilogues, sizes = with_sizes(spec.epilogues)
        own_arguments = (
            chunks, there["places"], there["moving"], there["rows"], there["control"], there["places"].shape[1],
            there["rows"].shape[1], size, getattr(kernels, table.rule.name),
            kernels.scaled_root if torch.version.hip else kernels.root, table.rule.scalars, spec.states,
            tuple(fmt.code for fmt in spec.formats), epilogues, sizes,
            block(spec.formats, spec.numbers), spec.pull,
        )  # fmt: skip
        how = options(spec.formats, machine(spec.device)[1], _capability(spec.device), spec.epilogues, spec.pull)
        key = (table.rule.name, spec)
        return self._launch(kernels.step_kernel, key, spec.device, chunks.numel(), own_arguments, how)

    def squares(
        self, table: Table, sums: Tensor, bucket: Bucket, size: int, there: There, accumulates: bool = False
    ) -> Callable[[], None]:
        chunks, grad, device = there[bucket.index], bucket.spec.formats[1], bucket.spec.device
        own = (
            chunks, there["places"], there["moving"], there["places"].shape[1], size, len(sums), sums.stride(0),
            grad.code, accumulates, SQUARED,
        )  # fmt: skip
        key = ("squares", grad.code, accumulates)
        return self._launch(
            _begin().squares_kernel, key, device, chunks.numel(), own,
            self._how("accumulate" if accumulates else "squares", device),
        )  # fmt: skip

    def begin(self, rule: Rule, norms: Norms, bank: Bank, there: There) -> Callable[[], None]:
        kernels = _begin()
        own = (
            *arguments(norms, bank, there), *bank.sums.shape[:2], len(bank.clips), there["rows"].shape[0],
            bank.steps.numel(), getattr(kernels, f"group_{rule.name}"),
            getattr(kernels, f"count_{rule.name}"), len(rule.own), len(rule.group_scalars), len(rule.count_scalars),
            rule.scalars.index("grad_scale"),
        )  # fmt: skip
        return self._launch(
            kernels.begin_kernel, ("begin", rule.name), bank.device, 1, own, self._how("begin", bank.device)
        )

    def _how(self, kernel: str, device: torch.device) -> dict[str, Any]:
        return options_before(kernel, machine(device)[1], _capability(device))

    def _launch(
        self, kernel: Any, key: tuple[Any, ...], device: torch.device, programs: int, arguments: tuple[Any, ...],
        how: dict[str, Any],
    ) -> Callable[[], None]:  # fmt: skip
        if interpreted():
            return partial(kernel[programs,], *arguments, **how)
        if (device, *key) not in self._compiled:  # and loaded here, where a failure leaves every tensor as it was
            refuse_loading(device)
            with current(device):
                _load(kernel.warmup(*arguments, grid=(1,), **how))
            self._compiled.add((device, *key))

        def go() -> None:
            with current(device):
                kernel[programs,](*arguments, **how)

        return go
