"""backend="triton" and "cuda" on CPU tensors, as compiled: their launches are those of the product, up to the kernel.

Table, chunks, grid and arguments are what a GPU would be given; the kernel is the compiler's PTX, executed on the CPU
(tests/ptx). What a launch may touch are the tensors themselves, not what the table says of them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import codegen
import ptx
import torch
from compiled import cuda_before, cuda_kernel, cuda_probe, triton_kernel, triton_probe
from internals import KINDS
from torch import Tensor

from wd_kernels import sums
from wd_kernels.backends import triton as triton_backend
from wd_kernels.backends.cuda import CUDA
from wd_kernels.backends.device_copy import There
from wd_kernels.backends.triton import THREADS, Triton
from wd_kernels.flat.buffers import attached, place_of
from wd_kernels.formats import SCALE, arithmetic_dtype, format_of
from wd_kernels.layout import PADDING, Bucket, Spec, Table, native_kernel
from wd_kernels.norms import Bank, Norms
from wd_kernels.rules import RULES, Rule

__all__ = ["ENGINES", "KIND_OF", "CUDAOnPTX", "Launch", "OnPTX", "TritonOnPTX", "kernel_of"]

#: backend, compiler's version, target.
ENGINES = (
    *(("triton", version, target) for version in ("newest", "oldest") for target in ("sm_80", "sm_90", "sm_100")),
    *(("cuda", "nvcc", target) for target in ("sm_80", "sm_90", "library")),
)


#: The key of internals.KINDS of a rule's name and its states.
KIND_OF = {(rule.name, states): kind for kind, (rule, states) in KINDS.items()}


def kernel_of(rule: Rule, spec: Spec) -> codegen.Kernel:
    """Which of the compiled kernels steps a bucket."""
    (param, grad), states = spec.formats[:2], [codegen.signed(fmt) for fmt in spec.formats[2 : 2 + len(spec.states)]]
    assert len(set(states)) <= 1, f"no kernel is compiled of the formats {[fmt.name for fmt in states]}"
    state = states[0] if states else format_of(arithmetic_dtype(param.dtype))
    names = tuple(own.name for own in spec.epilogues if own.name in codegen.EPILOGUES)
    return codegen.Kernel(KIND_OF[rule.name, spec.states], param, grad, state, names, spec.pull)


def is_probe(spec: Spec) -> bool:
    """Has it the epilogue that tests alone have?"""
    return any(own.name not in codegen.EPILOGUES for own in spec.epilogues)


class Launch:
    """One launch: its kernel, what it may touch, its arguments; `report` when it is over.

    Tests change what is here to plant a fault.
    """

    def __init__(
        self, kernel: ptx.Kernel, table: Table, bucket: Bucket, tables: list[Tensor], together: int = THREADS,
        marked_by: str = "or",
    ) -> None:  # fmt: skip
        self.kernel, self.table, self.bucket, self.together, self.marked_by = kernel, table, bucket, together, marked_by
        self.blocks = tables[0].numel()
        self.arguments: Callable[[list[Tensor]], list[Any]] = lambda tables: []
        self.report: ptx.Report | None = None
        self.use(tables)

    def use(self, tables: list[Tensor]) -> None:
        """Chunks, places, moving, rows, control: what describes the launch, as the kernel is given it."""
        self.tables = tables
        self.memory = ptx.Memory()
        _allow(self.memory, self.table, self.bucket, self.together, self.marked_by)
        for name, tensor in zip(("chunks", "places", "moving", "rows", "control"), tables, strict=True):
            self.memory.add(name, tensor.data_ptr(), tensor.nbytes, 8)

    def run(self) -> None:
        arguments = self.arguments(self.tables)
        reduces = any(own.numbers for own in self.bucket.spec.epilogues)
        self.report = ptx.launch(self.kernel, self.blocks, arguments, self.memory, threads=THREADS, unwritten=reduces)


def _allow(memory: ptx.Memory, table: Table, bucket: Bucket, together: int, marked_by: str) -> None:
    """What the tensors of a bucket are: parameters and states may be written, gradients are only read.

    A scale is read by the threads of its tile, of so many neighbours, and one writes what they found. Words of marks
    are changed in the one way that `marked_by` names, or, if it is "", each is read and written by one thread. The
    padding between neighbours in a flat buffer may be touched too: they are stepped as one.
    """
    found: dict[int, tuple[str, int, int, bool]] = {}  # by address: name, bytes, bytes with padding, writable
    for i in bucket.members:
        if not table.active[i]:
            continue
        own = table.tensors(i)
        theta, grad, states, outputs, master, scales, reference = (
            own.theta, own.grad, own.states, own.outputs, own.master, own.scales, own.reference,
        )  # fmt: skip
        place = place_of(theta) if isinstance(theta, torch.nn.Parameter) else None
        roles = [("parameter", theta, True), ("gradient", grad, False)]
        roles += [(f"state {k}", state, True) for k, state in enumerate(states.values())]
        roles += [("master", master, True)] * (master is not None)
        roles += [("reference", reference, False)] * (reference is not None)
        roles += [(f"output {k}", output, True) for k, output in enumerate(outputs.values())]
        roles += [(f"scale {k}", scale, True) for k, scale in enumerate(scales.values())]
        if own.numbers is not None:
            memory.add("numbers", own.numbers.data_ptr(), own.numbers.nbytes, own.numbers.itemsize, writable=True)
        if own.marks is not None:
            memory.add("marks", own.marks.data_ptr(), own.marks.nbytes, 4, writable=True, atomic=marked_by)
        for name, tensor, writable in roles:
            size = padded = tensor.numel() * tensor.element_size()
            if place is not None and (name != "gradient" or attached(theta)):
                padded = -(-tensor.numel() // PADDING) * PADDING * tensor.element_size()
                padded = size if name.startswith("scale") else padded
            if size:
                found[tensor.data_ptr()] = (name, size, padded, writable)
    ends = sorted(found)
    for address, following in zip(ends, [*ends, 1 << 62][1:], strict=True):
        name, size, padded, writable = found[address]
        formats = bucket.spec.formats
        state = formats[2] if name.startswith("state") else formats[-1]
        kind = "scale" if name.startswith("scale") else name
        known = {"parameter": formats[0], "gradient": formats[1], "master": formats[0].part, "scale": SCALE}
        known["reference"] = formats[-1]
        fmt = known.get(kind, state)
        part = fmt.dtype.itemsize if fmt is not None else 0
        end = min(address + padded, following) if padded > size else address + size
        memory.add(
            name, address, end - address, part, writable, noted=True, together=together if kind == "scale" else 1
        )


def _sum_of(bucket: Bucket, accumulates: bool) -> codegen.Before:
    return codegen.Before("accumulate" if accumulates else "squares", bucket.spec.formats[1].name)


def _memory_of_squares(
    table: Table, sums: Tensor, bucket: Bucket, tables: list[Tensor], accumulates: bool
) -> ptx.Memory:
    """What adding up squares may touch: gradients are read, sums are added to, and what gradients are added to."""
    memory = ptx.Memory()
    for i in bucket.members:
        if table.active[i]:
            grad, place = table.tensors(i).grad, place_of(table.tensors(i).theta)
            padded = -(-grad.numel() // PADDING) * PADDING if place is not None else grad.numel()
            memory.add("gradient", grad.data_ptr(), padded * grad.element_size(), grad.element_size())
            theta = table.tensors(i).theta
            if accumulates:
                memory.add("accumulator", theta.data_ptr(), theta.nbytes, theta.element_size(), writable=True)
    for name, tensor in zip(("chunks", "places", "moving"), tables, strict=True):
        memory.add(name, tensor.data_ptr(), tensor.nbytes, 8)
    memory.add("sums", sums.data_ptr(), sums.nbytes, 8, writable=True, atomic="add")
    return memory


#: Of the tensors that a step is begun with, those that are written.
WRITTEN = (
    "sums", "totals", "steps", "fresh", "schedule_steps", "etas", "groups", "rows", "clips", "control", "found", "last",
    "seen",
)  # fmt: skip
BEGIN = (
    "sums", "totals", "slots_of", "limits", "grad_scale", "found_inf", "settings", "sources", "keys", "active", "steps",
    "fresh", "schedule_steps", "etas", "groups", "rows", "clips", "control", "found", "last",
    "seen", "loss",
)  # fmt: skip


def _memory_of_begin(tensors: list[Tensor], norms: Norms, bank: Bank) -> ptx.Memory:
    """Beside what it is given, the tensors of groups and the tables of schedules."""
    memory = ptx.Memory(ordered=True)
    for name, tensor in zip(BEGIN, tensors, strict=True):
        memory.add(name, tensor.data_ptr(), tensor.nbytes, tensor.itemsize, writable=name in WRITTEN)
    lent = norms.lent + [t.values for _, t in bank.tables.values()]
    for tensor in {t.data_ptr(): t for t in lent}.values():
        memory.add("a setting", tensor.data_ptr(), tensor.nbytes, tensor.itemsize)
    return memory


class _Run:
    """In the place of a @triton.jit function that is run before a step."""

    def __init__(self, run: Callable[[int, tuple[Any, ...]], None]) -> None:
        self.run = run

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **how: Any) -> Any:
        return SimpleNamespace(run=None)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **how: self.run(grid[0], arguments)


class OnPTX:
    """What both have in common: they wait for nothing, and every launch is noted."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.reports: list[ptx.Report] = []  # of what is run before steps
        self.before: Callable[[Launch], None] = lambda launch: None  # a test's hand

    def why_not(self) -> str | None:
        return None

    def refuses(self, spec: Spec) -> str | None:
        return None if spec.device.type == "cpu" else "only CPU tensors"

    def step(self, launch: Launch, arguments: Callable[[list[Tensor]], list[Any]]) -> None:
        launch.arguments = arguments
        self.before(launch)
        self.launches.append(launch)
        launch.run()


class TritonOnPTX(OnPTX, Triton):
    """The Triton backend with the PTX of one version and target."""

    def __init__(self, version: str, target: str) -> None:
        OnPTX.__init__(self)
        Triton.__init__(self)
        self.version, self.target = version, target

    def launch(self, table: Table, bucket: Bucket, size: int, there: There) -> Callable[[], None]:
        """The product's own, whose kernels are these."""
        kernel = kernel_of(table.rule, bucket.spec)
        of = triton_kernel if not is_probe(bucket.spec) else triton_probe
        own = _TritonKernel(self, of(self.version, self.target, kernel), kernel, table, bucket)
        names = SimpleNamespace(
            step_kernel=own, root="root", scaled_root="scaled_root", **{rule: rule for rule in RULES}
        )
        return self._patched(names, lambda: super(TritonOnPTX, self).launch(table, bucket, size, there))

    def squares(
        self, table: Table, sums: Tensor, bucket: Bucket, size: int, there: There, accumulates: bool = False
    ) -> Callable[[], None]:
        kernel = _sum_of(bucket, accumulates)

        def run(programs: int, arguments: tuple[Any, ...]) -> None:
            chunks, places, moving, *numbers, code, adds, rows = arguments
            assert (code, adds, rows) == (kernel.of.code, accumulates, triton_backend.SQUARED)
            memory = _memory_of_squares(table, sums, bucket, [chunks, places, moving], accumulates)
            self._run(kernel, programs, [chunks, places, moving], numbers, memory)

        names = SimpleNamespace(squares_kernel=_Run(run))
        given = table, sums, bucket, size, there, accumulates
        return self._patched(names, lambda: super(TritonOnPTX, self).squares(*given))

    def begin(self, rule: Rule, norms: Norms, bank: Bank, there: There) -> Callable[[], None]:
        kernel = codegen.Before("begin", rule.name)

        def run(programs: int, arguments: tuple[Any, ...]) -> None:
            tensors, numbers, constants = list(arguments[:22]), list(arguments[22:27]), arguments[27:]
            position, widths = rule.scalars.index("grad_scale"), (len(rule.group_scalars), len(rule.count_scalars))
            assert constants == (rule.name, rule.name, len(rule.own), *widths, position)
            self._run(kernel, programs, tensors, numbers, _memory_of_begin(tensors, norms, bank))

        functions = {f"{what}_{own}": own for what in ("group", "count") for own in RULES}
        names = SimpleNamespace(begin_kernel=_Run(run), **functions)
        return self._patched(names, lambda: super(TritonOnPTX, self).begin(rule, norms, bank, there))

    def _run(
        self, kernel: codegen.Before, programs: int, tensors: list[Tensor], numbers: list[int], memory: ptx.Memory
    ) -> None:
        made = triton_kernel(self.version, self.target, kernel)
        scratch = [0] * (len(made.parameters) - len(tensors) - len(numbers))
        arguments = [*(t.data_ptr() for t in tensors), *numbers, *scratch]
        self.reports.append(ptx.launch(made, programs, arguments, memory, threads=THREADS, unwritten=True))

    def _patched(self, names: Any, prepare: Callable[[], Callable[[], None]]) -> Callable[[], None]:
        with _patched(names):
            go = prepare()

        def launched() -> None:
            with _patched(names):
                go()

        return launched


@contextmanager
def _patched(names: Any) -> Iterator[None]:
    """The Triton backend as it is beside a GPU, with other kernels."""
    kept = triton_backend._kernels, triton_backend._begin, triton_backend.interpreted, triton_backend.current
    triton_backend._kernels = triton_backend._begin = lambda: names
    triton_backend.interpreted = lambda: False
    triton_backend.current = lambda device: nullcontext()
    try:
        yield
    finally:
        triton_backend._kernels, triton_backend._begin, triton_backend.interpreted, triton_backend.current = kept


class _TritonKernel:
    """In the place of a @triton.jit function: `warmup`, and `[grid](...)`."""

    def __init__(
        self, backend: TritonOnPTX, kernel: ptx.Kernel, which: codegen.Kernel, table: Table, bucket: Bucket
    ) -> None:
        self.backend, self.kernel, self.which, self.table, self.bucket = backend, kernel, which, table, bucket

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **how: Any) -> Any:
        return SimpleNamespace(run=None)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def go(*arguments: Any, **how: Any) -> None:
            tables = list(arguments[:5])
            words, row_words, size, rule, root, scalars, states, formats, epilogues, sizes, block, pull = arguments[5:]
            # What the PTX was compiled for (bench/codegen.py, tests/compiled.py) is what the launch says.
            own, spec = self.table.rule, self.bucket.spec
            assert (rule, root, scalars, states) == (own.name, "root", own.scalars, spec.states)
            assert words == tables[1].shape[1]
            assert pull == spec.pull
            assert row_words == tables[3].shape[1] >= len(scalars) + sum(of_one[0] for of_one in sizes)
            assert epilogues == tuple(own.in_triton() for own in spec.epilogues)
            if not is_probe(spec):
                assert formats == tuple(fmt.code for fmt in self.which.formats)
                assert block == triton_backend.block(self.which.formats, sum(of_one[2] for of_one in sizes))
            else:
                assert formats[:-2] == tuple(fmt.code for fmt in self.which.formats)
                assert sizes[0][:5] == (2, 2, 3, 2, 1)
                assert block == 1024
            assert how == {"num_warps": THREADS // 32, "enable_fp_fusion": False}
            assert all(tensor.data_ptr() % 16 == 0 for tensor in tables)  # Triton looks, and compiles for it
            assert size % 16 == 0
            launch = Launch(self.kernel, self.table, self.bucket, tables)
            launch.blocks = grid[0]
            scratch = [0] * (len(self.kernel.parameters) - 8)  # Triton's own, which these kernels do not use
            numbers = [words, row_words, size, *scratch]
            self.backend.step(launch, lambda tables: [*(t.data_ptr() for t in tables), *numbers])

        return go


class CUDAOnPTX(OnPTX, CUDA):
    """The CUDA backend with the PTX of one target; ops.cpp, which would launch it, is executed by `on_cpu.py`."""

    device_type = "cpu"
    token = 2**62 + 1

    def __init__(self, version: str, target: str) -> None:
        OnPTX.__init__(self)
        CUDA.__init__(self)
        self.target = target

    def launch(self, table: Table, bucket: Bucket, size: int, there: There) -> Callable[[], None]:
        of = cuda_kernel if not is_probe(bucket.spec) else cuda_probe
        self._own = of(self.target, kernel_of(table.rule, bucket.spec)), table, bucket
        return super().launch(table, bucket, size, there)

    def squares(
        self, table: Table, sums: Tensor, bucket: Bucket, size: int, there: There, accumulates: bool = False
    ) -> Callable[[], None]:
        self._squared = table, sums, bucket
        return super().squares(table, sums, bucket, size, there, accumulates)

    def begin(self, rule: Rule, norms: Norms, bank: Bank, there: There) -> Callable[[], None]:
        self._begun_by = norms, bank
        return super().begin(rule, norms, bank, there)

    @property
    def ops(self) -> Any:
        """Of the bucket that is prepared."""

        def op(function: Callable[..., None]) -> Any:
            return SimpleNamespace(default=function)

        found = {}
        if hasattr(self, "_begun_by"):
            found["cuda_begin_"] = op(partial(self._begin, *self._begun_by))
        if hasattr(self, "_own"):
            found["cuda_step_"] = op(partial(self._step, *self._own))
        if hasattr(self, "_squared"):
            found["cuda_squares_"] = op(partial(self._squares, *self._squared))
        loads = ("cuda_load", "cuda_load_squares", "cuda_load_begin")
        return SimpleNamespace(**found, **dict.fromkeys(loads, lambda *given: ""))

    def _step(self, kernel: ptx.Kernel, table: Table, bucket: Bucket, *given: Any) -> None:
        token, chunks, places, moving, control, size, *which, rows = given
        assert token == self.token
        assert tuple(which) == native_kernel(table.rule, bucket.spec)
        launch = Launch(kernel, table, bucket, [chunks, places, moving, rows, control], together=32, marked_by="")
        sizes = places.shape[1], rows.shape[1], size
        # The struct Launch of csrc/layout.h, by value.
        self.step(launch, lambda tables: [struct.pack("<5Qiii4x", *(t.data_ptr() for t in tables), *sizes)])

    def _squares(self, table: Table, sums: Tensor, bucket: Bucket, *given: Any) -> None:
        token, chunks, places, moving, size, param, grad, accumulates, copies, stride = given
        assert token == self.token
        assert (param, grad) == (1 if bucket.spec.formats[0].dtype == torch.float64 else 2, bucket.spec.formats[1].code)
        kernel = cuda_before(self.target, _sum_of(bucket, accumulates))
        launch = struct.pack(
            "<5Qiii4x", *(t.data_ptr() for t in (chunks, places, moving)), 0, 0, places.shape[1], 0, size
        )
        memory = _memory_of_squares(table, sums, bucket, [chunks, places, moving], accumulates)
        self.reports.append(ptx.launch(kernel, chunks.numel(), [launch, copies, stride], memory, threads=THREADS))

    def _begin(
        self, norms: Norms, bank: Bank, token: int, rule: int, tensors: list[Tensor]
    ) -> None:  # fmt: skip
        assert token == self.token
        kernel = cuda_before(self.target, codegen.Before("begin", list(RULES)[rule]))
        sums_, _, _, _, _, _, settings, _, keys, active, *_ = tensors
        sizes = (*sums_.shape[:2], settings.shape[0], keys.shape[0], active.numel())
        assert sums_.shape[2] == sums.WORDS
        begin = struct.pack("<22Q5i4x", *(t.data_ptr() for t in tensors), *sizes)
        memory = _memory_of_begin(tensors, norms, bank)
        self.reports.append(ptx.launch(kernel, 1, [begin], memory, threads=THREADS))
