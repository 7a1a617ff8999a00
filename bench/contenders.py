"""Makes the contenders of a case, on the same memory where they can share it.

Parameters and gradients are shared, and states of the formats that are plain tensors: so no contender has the better
pages. What must lie elsewhere has copies: flat parameters, the bare loop's buffer of many tensors (which the ceiling's
stream moves too), and states of other formats.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from byte_model import float32_states, our_states, own_dtype_states
from ceiling import stream
from cpu_cases import BARE_LOOP, CEILING, FLAT, REFERENCE, TIMED, Case
from peers import OURS, Peer, change_lr, first_line
from torch import Tensor

import wd_kernels

__all__ = ["Contender", "Tensors", "build"]

PLAIN = (float32_states, our_states, own_dtype_states)


@dataclass
class Contender:
    """One optimizer on tensors: `prepare` is what comes before each `step`, untimed.

    Attributes:
        inside: seconds that its launches took so far, where they are timed from within.
    """

    name: str
    groups: int
    bytes_per_parameter: float
    prepare: Callable[[], None]
    step: Callable[[], object]
    inside: Callable[[], float] | None = None


@dataclass
class Tensors:
    """Parameters, the gradients that they get, and the states that optimizers on them share."""

    params: list[torch.nn.Parameter]
    slopes: list[Tensor]
    pool: dict[tuple[int, int, torch.dtype], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Case) -> Tensors:
        """Tensors of a case, from one block of values: the largest take minutes to draw."""
        generator = torch.Generator().manual_seed(0)
        block = torch.randn(min(case.elements, 1 << 20), generator=generator).to(case.dtype)

        def tensor() -> Tensor:
            new = torch.empty(case.elements, dtype=case.dtype)
            for at in range(0, len(new), len(block)):
                part = new[at : at + len(block)]
                part.copy_(block[: len(part)])
            return new

        params = [torch.nn.Parameter(tensor()) for _ in range(case.tensors)]
        slopes = [tensor() for _ in range(case.tensors)]
        for p, slope in zip(params, slopes, strict=True):
            p.grad = slope
        return cls(params, slopes)

    def share_states(self, peer: Peer, cls: Callable[..., Any], optimizer: torch.optim.Optimizer) -> None:
        """Gives an optimizer the shared states, laid out as it lays them out itself: a twin shows how."""
        if peer.states not in PLAIN:
            return
        p = torch.nn.Parameter(torch.ones(3, dtype=self.params[0].dtype))
        p.grad = torch.ones_like(p)
        twin = peer.make(cls, [{"params": [p]}])
        twin.step()
        for i, param in enumerate(self.params):
            own: dict[str, Any] = {}
            for name, value in twin.state[p].items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    key = (i, sum(isinstance(v, Tensor) and v.shape == param.shape for v in own.values()), value.dtype)
                    if key not in self.pool:
                        self.pool[key] = torch.zeros_like(param, dtype=value.dtype)
                    own[name] = self.pool[key]
                else:
                    own[name] = copy.deepcopy(value)
            optimizer.state[param] = own

    def between(self, case: Case, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        """What happens before each step of an optimizer."""
        steps = 0

        def prepare() -> None:
            nonlocal steps
            steps += 1
            if case.gradients == "new":  # all new ones are made before the old are freed: no address stays
                for p, grad in zip(self.params, [slope.clone() for slope in self.slopes], strict=True):
                    p.grad = grad
            if case.lr == "changing":
                change_lr(optimizer, steps)

        return prepare


class Watched:
    """A backend whose launches are timed; else as the one that it stands for."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.seconds = backend, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def prepare(self, *arguments: Any) -> list[Callable[[], None]]:
        return [self._timed(launch) for launch in self.backend.prepare(*arguments)]

    def _timed(self, launch: Callable[[], None]) -> Callable[[], None]:
        def go() -> None:
            started = time.perf_counter()
            launch()
            self.seconds += time.perf_counter() - started

        return go


def watch(optimizer: Any) -> Callable[[], float]:
    """Times the launches of an optimizer that has taken no step yet; returns what tells their seconds so far."""
    watched: dict[int, Watched] = {}
    table = optimizer._table
    resolve = table.resolve

    def resolve_watched(spec: Any) -> Watched:
        backend = resolve(spec)
        return watched.setdefault(id(backend), Watched(backend))

    table.resolve = resolve_watched
    return lambda: sum(one.seconds for one in watched.values())


class Maker:
    """Makes the contenders of one case, and what they share when it is first needed."""

    def __init__(self, case: Case, peers: dict[Peer, Callable[..., Any]]) -> None:
        self.case = case
        self.peers = {peer.name: (peer, cls) for peer, cls in peers.items() if peer.rule == case.rule}
        self.tensors = Tensors.of(case)
        self.flats: Tensors | None = None
        self.floor: tuple[Any, Callable[[], None]] | None = None

    def make(self, name: str, groups: int) -> Contender:
        if name == CEILING:
            return self.ceiling()
        if name == BARE_LOOP:
            return self.bare_loop()
        timed = name in TIMED.values()
        if timed:
            name = next(own for own, longer in TIMED.items() if longer == name)
        peer, cls = self.peers[OURS if name in (FLAT, REFERENCE) else name]
        tensors = self.flat_tensors(groups) if name == FLAT else self.tensors
        split = [{"params": tensors.params[i::groups]} for i in range(groups)]
        optimizer = peer.make(cls, split, **({"backend": "reference"} if name == REFERENCE else {}))
        inside = watch(optimizer) if timed else None
        if name != FLAT:
            tensors.share_states(peer, cls, optimizer)
        moved = peer.bytes_per_parameter(self.case.dtype, self.case.dtype, self.case.elements)
        prepare = tensors.between(self.case, optimizer)
        return Contender(TIMED[name] if timed else name, groups, moved, prepare, optimizer.step, inside)

    def flat_tensors(self, groups: int) -> Tensors:
        """Copies that `wd_kernels.flatten_` laid end to end; their gradients are views, written and never replaced."""
        params = [torch.nn.Parameter(p.detach().clone()) for p in self.tensors.params]
        flatten_ = getattr(wd_kernels, "flatten_", None)
        if flatten_ is None:
            raise ImportError("this version has no wd_kernels.flatten_")
        flatten_([{"params": params[i::groups]} for i in range(groups)] if groups > 1 else params)
        for p, slope in zip(params, self.tensors.slopes, strict=True):
            assert p.grad is not None
            p.grad.copy_(slope)
        return Tensors(params, [])

    def flat_step(self) -> tuple[Any, Callable[[], None]]:
        """An optimizer of one flat buffer of all elements, after a step; and what comes between two of them."""
        if self.floor is None:
            peer, cls = self.peers[OURS]
            if self.case.tensors == 1:
                tensors, again = self.tensors, None
            else:
                tensors = Tensors([torch.nn.Parameter(torch.cat([p.detach() for p in self.tensors.params]))], [])
                slope = torch.cat(self.tensors.slopes)
                tensors.params[0].grad = slope
                again = slope.clone() if self.case.gradients == "new" else None
            optimizer: Any = peer.make(cls, [{"params": tensors.params}])
            tensors.share_states(peer, cls, optimizer)
            grad = tensors.params[0].grad
            assert grad is not None

            def prepare() -> None:
                if again is not None:  # as warm as the others' new gradients
                    grad.copy_(again)

            optimizer.step()
            self.floor = optimizer, prepare
        return self.floor

    def bare_loop(self) -> Contender:
        """The floor: the backend's launch alone, on one flat buffer of as many elements; nothing is checked."""
        optimizer, prepare = self.flat_step()
        table = optimizer._table
        (bucket,) = table.buckets
        rows = optimizer.rule.rows(optimizer.rule.hypers(optimizer.param_groups), [(0, 2, False)])
        (launch,) = bucket.backend.prepare(table, [bucket], rows)

        def step(held: Any = optimizer) -> None:  # of which the launch has only addresses
            launch()

        return Contender(BARE_LOOP, 1, self._our_bytes(), prepare, step)

    def ceiling(self) -> Contender:
        """The stream, over the buffers that the bare loop steps."""
        optimizer, prepare = self.flat_step()
        (p,) = optimizer.param_groups[0]["params"]
        states = [s for name, s in optimizer.state[p].items() if name != "step" and isinstance(s, Tensor)]
        run = stream(p, p.grad, states, self.case.threads or torch.get_num_threads())
        return Contender(CEILING, 1, self._our_bytes(), prepare, run)

    def _our_bytes(self) -> float:
        return self.peers[OURS][0].bytes_per_parameter(self.case.dtype, self.case.dtype)


def build(
    case: Case, peers: dict[Peer, Callable[..., Any]], names: Sequence[tuple[str, int]]
) -> tuple[list[Contender], dict[str, str]]:
    """The contenders by (name, groups), each after its first step; and why others were left out, by name."""
    maker = Maker(case, peers)
    them: list[Contender] = []
    skipped: dict[str, str] = {}
    for name, groups in names:
        try:
            one = maker.make(name, groups)
            one.prepare()
            one.step()  # makes states, compiles
        except Exception as error:  # out of memory, or another library's own
            skipped[name] = first_line(error)
        else:
            them.append(one)
    return them, skipped
