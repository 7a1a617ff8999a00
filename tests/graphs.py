"""Steps that are captured and replayed: in a CUDA graph on a GPU; elsewhere in one of launches, which are noted.

What a graph does of a step is what is launched, with the addresses it had; no line of Python runs in a replay. On the
CPU a launch is a closure over these, which is called again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from engines import Engine

from wd_kernels import backends
from wd_kernels.backends import BACKENDS, device
from wd_kernels.table import Watched

__all__ = ["graphs_of"]


class _Launches:
    """What is launched while it is captured is noted, not run."""

    def __init__(self) -> None:
        self.launches: list[Callable[[], None]] = []

    def replay(self) -> None:
        assert self.launches
        for go in self.launches:
            go()


class OfLaunches:
    """Captures them, of one backend."""

    def __init__(self, patch: pytest.MonkeyPatch, backend: str) -> None:
        self.graph: _Launches | None = None
        kind: Any = type(BACKENDS[backend])
        for name in ("launch", "squares", "begin"):
            patch.setattr(kind, name, self._noted(getattr(kind, name)))
        patch.setattr(Watched, "clearing", self._noted(Watched.clearing))
        for module in (device, backends):
            patch.setattr(module, "capturing", lambda of: self.graph is not None)

    def _noted(self, prepare: Callable[..., Callable[[], None]]) -> Callable[..., Callable[[], None]]:
        def prepared(*given: Any, **how: Any) -> Callable[[], None]:
            go = prepare(*given, **how)
            return lambda: go() if self.graph is None else self.graph.launches.append(go)

        return prepared

    @contextmanager
    def capture(self) -> Iterator[_Launches]:
        self.graph = made = _Launches()
        try:
            yield made
        finally:
            self.graph = None


class OfCUDA:
    """The same of torch.cuda.graph."""

    @contextmanager
    def capture(self) -> Iterator[torch.cuda.CUDAGraph]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            yield graph


def graphs_of(engine: Engine, patch: pytest.MonkeyPatch) -> Any:
    """`with graphs.capture() as graph: ...`, then `graph.replay()`."""
    return OfCUDA() if engine.device.type == "cuda" else OfLaunches(patch, engine.backend)
