"""The CPU backend with the portable mover, compiled for any processor, in a process of its own (mover.cpp).

`python tests/portable.py --compiler aarch64-linux-gnu-g++ --run qemu-aarch64-static --save aarch64` steps on an
emulated Arm processor, and keeps what was found in bench/results.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import codegen_cuda
import pytest
import torch
from bits import assert_same, assert_same_bits
from cases import Case, run
from test_kernels import KERNELS, case_of
from torch import Tensor

from wd_kernels import SGDW, backends
from wd_kernels.backends.cpu import CHUNK, CPU
from wd_kernels.backends.prepared import Prepared
from wd_kernels.formats import SCALE, TILE
from wd_kernels.layout import Bucket, Moving, Place, Table, cut, native_kernel
from wd_kernels.rules import DECAY_MODES
from wd_kernels.table import lists

ROOT = Path(__file__).resolve().parent.parent


def compiled(folder: Path, compiler: str = "c++", optimize: str = "-O1") -> Path:
    """The mover as a program. Whole and static: an emulator needs no libraries of that processor."""
    flags = [own for own in codegen_cuda.setup()["FLAGS"].split() if own not in ("-O3", "-fPIC")] + ["-Wno-psabi"]
    program = folder / "mover"
    command = [*shlex.split(compiler), *flags, optimize, "-static", str(ROOT / "tests" / "mover.cpp"), "-o"]
    done = subprocess.run([*command, str(program)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{compiler} failed: {done.stderr}")
    return program


class Portable(CPU):
    """The backend as it is, but for who steps: a program that is given the launch and the memory."""

    def __init__(self, command: Sequence[str | Path]) -> None:
        self.command = [str(word) for word in command]
        self.launches = 0

    def refuses(self, spec: Any) -> str | None:
        return None

    def prepare(self, table: Table, buckets: list[Bucket]) -> Prepared:
        def ready(table: Table, rows: Tensor) -> list[Any]:
            own = [bucket for bucket in table.buckets if bucket.backend is self]
            return [partial(self.step, table, bucket, rows) for bucket in own]

        return Prepared([], ready)

    def step(self, table: Table, bucket: Bucket, rows: Tensor) -> None:
        rule, variant, epilogues, codes = native_kernel(table.rule, bucket.spec)
        chunks, segments = cut(table, bucket, CHUNK).words, table.segments
        words = [rule, variant, epilogues, len(codes), *codes, CHUNK, len(chunks), *chunks.tolist()]
        words += [segments.places.shape[1], len(segments.places)]
        stretches = dict(self._stretches(table, bucket))
        message = [
            _bytes(words), _raw(segments.places), _raw(segments.moving), _bytes([rows.shape[1], len(rows)]), _raw(rows),
            _raw(table.control), _bytes([len(stretches), *(word for pair in stretches.items() for word in pair)]),
            *(ctypes.string_at(address, size) for address, size in stretches.items()),
        ]  # fmt: skip
        done = subprocess.run(self.command, input=b"".join(message), capture_output=True)
        if done.returncode or len(done.stdout) != sum(stretches.values()):
            raise RuntimeError(f"{shlex.join(self.command)} ended with {done.returncode}: {done.stderr.decode()}")
        self.launches += 1
        at = 0
        for address, size in stretches.items():
            ctypes.memmove(address, done.stdout[at : at + size], size)
            at += size

    def _stretches(self, table: Table, bucket: Bucket) -> Any:
        """(address, bytes) of every role of every segment of the bucket."""
        param, grad, *rest = bucket.spec.formats
        parts = [fmt.part for fmt in bucket.spec.formats if fmt.part is not None]
        first, count = table.span(bucket)
        for moving, place in zip(
            table.segments.moving[first : first + count].tolist(),
            table.segments.places[first : first + count].tolist(),
            strict=True,
        ):
            numel = moving[Moving.NUMEL]
            if numel == 0:  # its addresses may be those of an earlier step
                continue
            yield moving[Moving.GRAD], numel * grad.dtype.itemsize
            for fmt, address in zip([param, *rest, *parts], place[Place.ADDRESSES :], strict=False):
                elements = -(-numel // TILE) if fmt is SCALE else numel
                yield address, elements * fmt.dtype.itemsize


def _bytes(words: Sequence[int]) -> bytes:
    return b"".join(word.to_bytes(8, "little", signed=True) for word in words)


def _raw(tensor: Tensor) -> bytes:
    return ctypes.string_at(tensor.contiguous().data_ptr(), tensor.numel() * tensor.element_size())


def provide(patch: Any, command: Sequence[str | Path]) -> Portable:
    """Makes backend="cpu" the portable one, for a while."""
    backend = Portable(command)
    patch.setitem(backends.BACKENDS, "cpu", backend)
    patch.setattr(lists, "_resolve", backends.resolve)
    return backend


def every_kernel() -> list[Case]:
    """Of each kernel body with each format one case; the decay modes and variants take turns."""
    modes = len(DECAY_MODES)
    turns = enumerate(KERNELS)
    return [case_of({"kernel": kernel, "decay": DECAY_MODES[k % modes], "variant": k // modes}) for k, kernel in turns]


def compare(case: Case, steps: int = 4) -> None:
    """Steps of parameters that lie in many ways: the portable mover's bits are the reference's."""
    assert_same(run(case, "cpu", steps=steps), run(case, "reference", steps=steps))


def subnormal_run(backend: str) -> Tensor:
    """A weight after three steps among subnormal numbers; on Arm the program's thread flushes them (mover.cpp)."""
    p = torch.nn.Parameter(torch.linspace(-2, 3, 1031) * 1e-39)
    opt = SGDW([p], lr=0.1, momentum=0.9, weight_decay=0.3, backend=backend)
    for t in range(3):
        p.grad = torch.linspace(1, -t - 1, 1031) * 1e-39
        opt.step()
    assert 0 < float(p.detach().abs().max()) < torch.finfo(torch.float32).tiny
    return p.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiler", default="c++", help="of that processor")
    parser.add_argument("--run", default="", help="what runs its programs, where this processor does not")
    parser.add_argument("--save", metavar="NAME", help="keep what was found as bench/results/NAME.md")
    args = parser.parse_args()
    compiler = subprocess.run([args.compiler, "--version"], capture_output=True, text=True, check=True).stdout
    machine = subprocess.run([args.compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        backend = provide(patch, [*shlex.split(args.run), compiled(Path(folder), args.compiler, "-O3")])
        assert_same_bits(subnormal_run("cpu"), subnormal_run("reference"))
        for case in every_kernel():
            compare(case)
            print(f"the reference's bits: {case}", flush=True)
    emulator = f", run by {args.run}" if args.run else ""
    found = [
        f"# The portable mover on {machine}",
        "",
        f"{datetime.date.today()}, {compiler.splitlines()[0]}, -O3{emulator}.",
        "",
        f"{len(every_kernel())} kernels, {backend.launches} launches; parameters, states, scales and masters after 4 "
        "steps have the bits of the reference, on this machine's own processor; so have subnormal numbers, where the "
        "thread that steps flushes them.",
        "",
        *(f"- {case}" for case in every_kernel()),
        "",
    ]
    if args.save:
        (ROOT / "bench" / "results" / f"{args.save}.md").write_text("\n".join(found))
    print("\n".join(found[2:5]))


if __name__ == "__main__":
    main()
