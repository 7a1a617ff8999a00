"""The native CPU backend: one plan (csrc/cpu/plan.h) a bucket."""

from __future__ import annotations

import os
import threading
import warnings
from functools import partial

import torch
from torch import Tensor

from .. import native
from ..layout import Bucket, Spec, Table, cut, cut_whole, native_kernel
from .prepared import Launch, Prepared

__all__ = ["CPU"]

_threads_at_fork = 1
_serial = False


def _before_fork() -> None:
    """Counts the threads of this process, where the system tells; else there may be some."""
    global _threads_at_fork
    try:
        _threads_at_fork = len(os.listdir("/proc/self/task"))
    except OSError:
        _threads_at_fork = 2


def _after_fork() -> None:
    """OpenMP's threads are not there in a child, and whoever waits for them waits for ever."""
    global _serial
    if _threads_at_fork > 1 and native.C is not None:
        _serial = True
        native.C.be_serial()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)

#: Elements of a chunk: a scalar row is read once in so many.
CHUNK = 8192


class CPU:
    """AVX-512, AVX2 or baseline code, chosen at run time (WD_KERNELS_ISA forces one), on torch's threads."""

    name = "cpu"
    needs_tensors = False
    counts_there = False

    def why_not(self) -> str | None:
        return native.WHY_NOT

    def refuses(self, spec: Spec) -> str | None:
        if spec.device.type != "cpu":
            return f"the tensors are on {spec.device}, and this backend steps CPU tensors"
        native.C.instruction_set()  # raises if WD_KERNELS_ISA names one that is not here
        return None

    def prepare(self, table: Table, buckets: list[Bucket]) -> Prepared:
        global _serial
        if _serial and torch.get_num_threads() > 1:
            _serial = False
            warnings.warn(
                "this process was forked from one with several threads, and those of OpenMP are not here: its steps on "
                "the CPU take one thread. Start processes by 'spawn' or 'forkserver', or call torch.set_num_threads(1)",
                RuntimeWarning,
                stacklevel=2,
            )
        segments, whole, plans, squares = table.segments, table.whole, [], []
        for bucket in buckets:
            words = cut(table, bucket, CHUNK).words
            kernel = native_kernel(table.rule, bucket.spec)
            plan = native.C.plan(words, segments.places, segments.moving, table.control, CHUNK, *kernel)
            plans.append(plan)
            if whole is not segments:
                words = cut_whole(table, bucket, CHUNK)
                plan = native.C.plan(words, whole.places, whole.moving, table.control, CHUNK, *kernel)
            squares.append(plan)
        return Prepared(plans, None, squares=tuple(squares))

    def add_up(self, table: Table, buckets: list[Bucket], sums: Tensor, rows: Tensor) -> list[Launch]:
        plans, others = self.prepare(table, buckets).plans, threading.active_count() > 1
        return [partial(native.C.accumulate, plans, rows, sums[0], others)]  # no Python code runs once it is done
