"""What a kernel may cost, whatever compiled it (bench/codegen.py reads it back)."""

from __future__ import annotations

import codegen
import torch


def assert_in_budget(kernel: codegen.Kernel, cost: codegen.Cost) -> None:
    """Nothing on the stack, nothing inexact, the widest accesses, no byte too many, and time to spare."""
    assert cost.stack == 0, f"{cost.kernel}: {cost.stack} bytes of stack"
    # Triton stores what a row of a block has through shared memory: the scales of states in 8 bits.
    shared = 1024 if kernel.scaled else 0
    assert cost.shared <= shared, f"{cost.kernel}: {cost.shared} bytes of shared memory"
    layouts = 2 * (len(kernel.formats) - 2) if kernel.scaled else 0
    assert cost.layouts <= layouts, f"{cost.kernel}: values change their layout {cost.layouts} times"
    assert cost.inexact == 0, f"{cost.kernel}: {cost.inexact} operations are not rounded on their own"
    # The widest format is moved 16 bytes at a time, and a 2-byte one beside a 4-byte one 8.
    param, grad, *states = (fmt.dtype.itemsize for fmt in kernel.formats)
    part = [] if kernel.param.part is None else [kernel.param.part.dtype.itemsize]
    copied = kernel.param.part is not None and kernel.param.part.dtype == torch.float32
    widest = max(param, grad, *states, *part)
    widths = {16 * size // widest for size in (*([] if copied else [param]), grad, *states, *part)}
    scales = {1} if kernel.scaled else set()  # read and written one by one
    widths |= scales
    assert set(cost.loads) == widths, f"{cost.kernel}: loads of {sorted(set(cost.loads))} bytes"
    written = {16 * size // widest for size in (param, *states, *part)} | scales
    assert set(cost.stores) == written, f"{cost.kernel}: stores of {sorted(set(cost.stores))} bytes"
    more = 2 * len(states) / 4 if kernel.scaled else 0  # each thread reads the scale of its 4 or 8 neighbours
    assert cost.model == kernel.model
    assert 0 <= cost.bytes_per_element - cost.model <= more, f"{cost.kernel}: {cost.bytes_per_element} B an element"
    # A budget is half of what could be issued. States in bfloat16 leave too few bytes to move for that, and random bits
    # take instructions and registers: such kernels must stay below what can be issued, with three eighths on their way.
    special = not kernel.plain or any(fmt.stochastic for fmt in kernel.formats)
    # States in 8 bits take a hundred for few bytes.
    allowed = cost.budget * (2.9 if kernel.scaled else 1.95 if special else 1)
    assert cost.instructions <= allowed, f"{cost.kernel}: {cost.instructions} instructions an element"
    # What an epilogue writes takes registers, and a program from some: 60 KiB on their way where 64 are wanted.
    few = 0.9 if kernel.outputs else 1.0
    least = codegen.IN_FLIGHT.get(cost.target, 0) * (0.375 if special else few)
    assert cost.in_flight >= least, f"{cost.kernel}: {cost.in_flight} KiB in flight"
