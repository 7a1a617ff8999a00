"""Makes the contenders of a case, on the same memory where they can share it.

Parameters and gradients are shared and, on the CPU, states that are plain tensors: so none has the better pages.
Copies are: gradients of another dtype, flat parameters, the buffer of all for bare loop and ceiling, other states.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import math
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from internals import bare_launch, time_launches
from peers import FLAT, LR, OURS, Peer
from torch import Tensor
from workloads import BARE_LOOP, CEILING, REFERENCE, TIMED, Case

import wd_kernels
from wd_kernels.turns import Contender, filled, first_line, random_values

SOURCE = Path(__file__).parent / "stream.cpp"
PLAIN = ("float32", "float32 or wider", "own dtype")


@dataclass
class Tensors:
    """Parameters, the gradients that they get, and the states that optimizers on them share."""

    params: list[torch.nn.Parameter]
    slopes: list[Tensor]
    pool: dict[tuple[int, int, torch.dtype], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Case, grad: torch.dtype, device: torch.device) -> Tensors:
        """Tensors of a case, from one block of values."""
        values = random_values(device)
        params = [torch.nn.Parameter(filled(shape, case.dtype, values)) for shape in case.shapes]
        slopes = [filled(shape, grad, values) for shape in case.shapes]
        for p, slope in zip(params, slopes, strict=True):
            if grad != case.dtype:
                p.grad_dtype = grad
            p.grad = slope
        return cls(params, slopes)

    def share_states(self, peer: Peer, cls: Callable[..., Any], optimizer: torch.optim.Optimizer) -> None:
        """Gives an optimizer the shared states, laid out as it lays them out itself: a twin shows how."""
        p = torch.nn.Parameter(torch.ones(3, dtype=self.params[0].dtype))
        p.grad = torch.ones_like(p)
        twin = peer.make(cls, [{"params": [p]}])
        twin.step()
        for i, param in enumerate(self.params):
            state = optimizer.state[param] = copy.deepcopy(twin.state[p])
            plain = [n for n, value in state.items() if isinstance(value, Tensor) and value.shape == p.shape]
            for k, name in enumerate(plain):
                key = (i, k, state[name].dtype)
                if key not in self.pool:
                    self.pool[key] = torch.zeros_like(param, dtype=state[name].dtype)
                state[name] = self.pool[key]

    def between(self, case: Case, optimizer: torch.optim.Optimizer) -> Callable[[], None] | None:
        """What happens before each step of an optimizer, if anything."""
        if case.gradients == "kept" and case.lr == "constant":
            return None
        steps = itertools.count(1)

        def prepare() -> None:
            step = next(steps)
            if case.gradients == "new":  # all new ones are made before the old are freed: no address stays
                for p, grad in zip(self.params, torch._foreach_mul(self.slopes, 1.0), strict=True):
                    p.grad = grad
            for g, group in enumerate(optimizer.param_groups if case.lr == "changing" else ()):
                lr = LR * (1 + g / 1000) / (1 + step / 1000)  # another than before and than the others have
                group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr

        return prepare


# The measured ceiling of bandwidth: bench/stream.cpp, none of this package's code -------------------------------------


@cache
def library() -> Callable[..., int] | str:
    """The compiled stream, on torch's own OpenMP threads; or why it is not there."""
    compiler = os.environ.get("CXX", "c++")
    # A second OpenMP runtime would have threads of its own, waiting beside torch's: link torch's alone, if it has one.
    runtimes = sorted((Path(torch.__file__).parent / "lib").glob("lib[gi]*omp*.so*"))
    with tempfile.TemporaryDirectory() as folder:
        path, flags = f"{folder}/stream.so", ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
        command = [compiler, *flags, str(SOURCE), "-Wl,--as-needed", *map(str, runtimes[:1]), "-o", path]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            function: Callable[..., int] = ctypes.CDLL(path).wd_bench_stream
        except (OSError, subprocess.SubprocessError, AttributeError) as error:
            return f"{compiler}: {(getattr(error, 'stderr', '') or str(error)).strip().splitlines()[0][:160]}"
    return function


def stream(param: Tensor, grad: Tensor, states: Sequence[Tensor], threads: int) -> Callable[[], None]:
    """A call that reads all, and writes all but the gradient, with the values that they have; no arithmetic."""
    function = library()
    if isinstance(function, str):
        raise RuntimeError(function)
    tensors = (param.detach(), grad, *states)
    width = states[0].element_size() if states else param.element_size()
    addresses = (ctypes.c_void_p * 3)(*(s.data_ptr() for s in states), *([None] * (3 - len(states))))
    places = ctypes.c_void_p(param.data_ptr()), ctypes.c_void_p(grad.data_ptr()), addresses
    size = ctypes.c_int64(param.numel())

    def run(held: Sequence[Tensor] = tensors) -> None:  # which are known only by address below
        if function(param.element_size(), grad.element_size(), width, len(states), *places, size, 0, threads):
            raise RuntimeError(f"no stream of {param.dtype}, {grad.dtype} and {[s.dtype for s in states]} is there")

    return run


class Maker:
    """Makes the contenders of one case, and what they share when it is first needed."""

    def __init__(self, case: Case, peers: dict[Peer, Callable[..., Any]], device: torch.device) -> None:
        self.case, self.device = case, device
        self.peers = {peer.name: (peer, cls) for peer, cls in peers.items() if peer.rule == case.rule}
        self.tensors = cache(lambda grad: Tensors.of(case, grad, device))

    def make(self, name: str, groups: int) -> Contender:
        if name in (BARE_LOOP, CEILING):
            return self.floor(name)
        own = {longer: own for own, longer in TIMED.items()}.get(name, name)
        peer, cls = self.peers[OURS if own in (FLAT, REFERENCE) else own]
        grad = peer.grad_dtype(self.case.dtype, self.case.grad)
        tensors: Tensors = Tensors.of(self.case, grad, self.device) if own == FLAT else self.tensors(grad)
        split = [{"params": tensors.params[i::groups]} for i in range(groups)]
        if own == FLAT:  # laid end to end; their gradients are views, written and never replaced
            wd_kernels.flatten_(split)
        optimizer = peer.make(cls, split, **({"backend": "reference"} if own == REFERENCE else {}))
        inside = time_launches(optimizer) if own != name else None
        if own != FLAT and self.device.type == "cpu" and peer.states in PLAIN:
            tensors.share_states(peer, cls, optimizer)
        sizes = {math.prod(shape) for shape in self.case.shapes}
        moved = peer.bytes_per_parameter(self.case.dtype, grad, sizes.pop() if len(sizes) == 1 else None)
        return Contender(name, groups, moved, optimizer.step, tensors.between(self.case, optimizer), inside)

    @cached_property
    def flat_step(self) -> tuple[Any, Callable[[], object] | None]:
        """An optimizer of one flat buffer of all elements, after a step; and what comes between two of them."""
        tensors, again = self.tensors(self.case.dtype), None
        if len(tensors.params) > 1:
            values, slope = (torch.cat([t.detach().view(-1) for t in own]) for own in (tensors.params, tensors.slopes))
            tensors = Tensors([torch.nn.Parameter(values)], [slope])
            tensors.params[0].grad = slope
            if self.case.gradients == "new":  # as warm as the others' new gradients
                again = slope.clone()
        peer, cls = self.peers[OURS]
        optimizer = peer.make(cls, [{"params": tensors.params}])
        tensors.share_states(peer, cls, optimizer)
        optimizer.step()
        return optimizer, None if again is None else lambda: tensors.slopes[0].copy_(again)

    def floor(self, name: str) -> Contender:
        """On one flat buffer of as many elements: the backend's launch alone, or the stream that moves as much."""
        optimizer, prepare = self.flat_step
        (p,) = optimizer.param_groups[0]["params"]
        if name == BARE_LOOP:
            step = bare_launch(optimizer)
        else:
            states = [s for key, s in optimizer.state[p].items() if key != "step" and isinstance(s, Tensor)]
            step = stream(p, p.grad, states, self.case.threads or torch.get_num_threads())
        moved = self.peers[OURS][0].bytes_per_parameter(self.case.dtype, self.case.dtype)
        return Contender(name, 1, moved, step, prepare)


def build(
    case: Case, peers: dict[Peer, Callable[..., Any]], names: Sequence[tuple[str, int]], device: torch.device
) -> tuple[list[Contender], dict[str, str]]:
    """The contenders by (name, groups), each after its first step; and why others were left out, by name."""
    maker, them, skipped = Maker(case, peers, device), list[Contender](), dict[str, str]()
    for name, groups in names:
        try:
            one = maker.make(name, groups)
            if one.prepare:
                one.prepare()
            one.step()  # makes states, compiles
            them.append(one)
        except Exception as error:  # out of memory, or another library's own
            skipped[name] = first_line(error)
    return them, skipped
