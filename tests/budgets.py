"""What a kernel may cost, whatever compiled it (bench/codegen.py reads it back)."""

from __future__ import annotations

import codegen

from wd_kernels.formats import arithmetic_dtype
from wd_kernels.layout import BLOCK

#: What an element's share in a block takes beside the step, which the budget is for: a number with its own arithmetic,
#: and a mark, of which comparing two bfloat16 takes most (numbers measured with the CUDA compiler, which needs more).
OF_A_NUMBER, OF_A_MARK = 7, 19


def assert_in_budget(kernel: codegen.Kernel, cost: codegen.Cost) -> None:
    """Nothing on the stack, nothing inexact, the widest accesses, no byte too many, and time to spare."""
    assert cost.stack == 0, f"{cost.kernel}: {cost.stack} bytes of stack"
    # Triton stores what a row of a block has through shared memory: the scales of states in 8 bits.
    shared = 1024 if kernel.scaled else 0
    # Numbers go from warp to warp through it: in CUDA C++ those of each vector of two blocks; 1 KiB is CUDA's own.
    # Triton brings words of marks, and their masks, to the threads that set them, in both loops.
    if kernel.numbers or kernel.marks:
        vectors = 2 * BLOCK * max(kernel.moved) // 16
        shared = 1024 + kernel.numbers * vectors * arithmetic_dtype(kernel.param.dtype).itemsize
    assert cost.shared <= shared, f"{cost.kernel}: {cost.shared} bytes of shared memory"
    layouts = 2 * (len(kernel.formats) - 2) if kernel.scaled else 4 if kernel.marks else 0
    assert cost.layouts <= layouts, f"{cost.kernel}: values change their layout {cost.layouts} times"
    assert cost.inexact == 0, f"{cost.kernel}: {cost.inexact} operations are not rounded on their own"
    # The widest format is moved 16 bytes at a time, and a 2-byte one beside a 4-byte one 8.
    param, grad, *states = (fmt.dtype.itemsize for fmt in kernel.formats)
    part = [] if kernel.param.part is None else [kernel.param.part.dtype.itemsize]
    widest = max(param, grad, *states, *part)
    widths = {16 * size // widest for size in kernel.moved}
    scales = {1} if kernel.scaled else set()  # read and written one by one
    widths |= scales
    assert set(cost.loads) == widths, f"{cost.kernel}: loads of {sorted(set(cost.loads))} bytes"
    written = {16 * size // widest for size in (param, *states, *part)} | scales
    assert set(cost.stores) == written, f"{cost.kernel}: stores of {sorted(set(cost.stores))} bytes"
    more = 2 * len(states) / 4 if kernel.scaled else 0  # each thread reads the scale of its 4 or 8 neighbours
    assert cost.model == kernel.model
    beyond = cost.bytes_per_element - cost.of_blocks - cost.model
    assert 0 <= beyond <= more, f"{cost.kernel}: {cost.bytes_per_element} B an element"
    # A budget is half of what could be issued. States in bfloat16 leave too few bytes to move for that, and random bits
    # take instructions and registers: such kernels must stay below what can be issued, with three eighths on their way.
    special = not kernel.plain or any(fmt.stochastic for fmt in kernel.formats)
    # States in 8 bits take a hundred for few bytes.
    allowed = cost.budget * (2.9 if kernel.scaled else 1.95 if special else 1)
    allowed += OF_A_NUMBER * kernel.numbers + OF_A_MARK * kernel.marks
    # What pulls takes a difference, a product, a comparison and a choice more, and no byte.
    allowed += 4 if kernel.pull else 0
    assert cost.instructions <= allowed, f"{cost.kernel}: {cost.instructions} instructions an element"
    # What an epilogue writes takes registers, and a program from some: 60 KiB on their way where 64 are wanted. Marks
    # leave half of the programs. Numbers of a block are held beside all roles, for 3 programs or 2, and the oldest
    # Triton's code then waits for half of the loads before it asks for the others. For sm_100, nvcc has what pulls of
    # SGDW begin before its last load: 48.
    few = 3 / 16 if kernel.numbers else 0.5 if kernel.marks else 0.9 if kernel.outputs else 0.75 if kernel.pull else 1.0
    least = codegen.IN_FLIGHT.get(cost.target, 0) * min(0.375 if special else 1, few)
    assert cost.in_flight >= least, f"{cost.kernel}: {cost.in_flight} KiB in flight"
