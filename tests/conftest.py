"""Fixtures that the tests share, and how Triton's kernels are run: interpreted, or compiled for `-m gpu`."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import compiled
import pytest
import torch
from engines import CPU, GPU, MIRRORED, TEST_DEVICE, Engine

import wd_kernels.backends
from wd_kernels.backends.cuda import CUDA
from wd_kernels.backends.triton import Triton

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several: a thread for each, and for each program that a test starts
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Chooses once and for all, before the kernels are used: interpreted, or compiled where GPU tests were selected."""
    of_gpu = {item.get_closest_marker("gpu") is not None for item in session.items}
    if True not in of_gpu or TEST_DEVICE == "cpu":
        interpret()
    elif False in of_gpu:
        raise pytest.UsageError("tests marked gpu run compiled kernels, all others interpreted ones: run -m gpu apart")
    elif not torch.cuda.is_available():
        raise pytest.UsageError(
            "tests marked gpu were selected, and torch finds no GPU here "
            "(WD_KERNELS_TEST_DEVICE=cpu rehearses those that can do without, in Triton's interpreter)"
        )
    elif "TRITON_INTERPRET" in os.environ:
        raise pytest.UsageError("tests marked gpu run compiled kernels: unset TRITON_INTERPRET")


def interpret() -> None:
    """TRITON_INTERPRET=1 for this process, not for the programs that tests start.

    The interpreter patches Triton's language anew for every call of a function inside a kernel, which is more than half
    of its time; once a launch, as it does too, is enough for kernels of one module.
    """
    if importlib.util.find_spec("triton") is None:
        return
    knobs = importlib.import_module("triton").knobs
    propagates, knobs.propagate_env = knobs.propagate_env, False
    knobs.runtime.interpret = True
    knobs.propagate_env = propagates
    interpreted: Any = importlib.import_module("triton.runtime.interpreter").InterpretedFunction
    interpreted.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Names the folder where all workers of this run find what was compiled."""
    base = tmp_path_factory.getbasetemp()
    compiled.folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend`: every backend for GPUs, on one in tests marked gpu, else as it runs on the CPU."""
    own = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    taken = {name.strip() for names in own for name in (names.split(",") if isinstance(names, str) else names)}
    if "backend" in metafunc.fixturenames and "backend" not in taken:
        on_gpu = metafunc.definition.get_closest_marker("gpu") is not None
        engines = GPU if on_gpu else MIRRORED
        metafunc.parametrize("backend", engines, ids=[e.backend if on_gpu else str(e) for e in engines], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of each backend for GPUs."""
    engine: Engine = request.param
    engine.provide(monkeypatch)
    return engine.backend


@pytest.fixture
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The engine of a row (or the parameter itself), provided."""
    of = request.getfixturevalue("of") if "of" in request.fixturenames else request.param
    found: Engine = of["engine"] if isinstance(of, dict) else of
    found.provide(monkeypatch)
    return found


@pytest.fixture
def both_backends(monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The names of both, on a GPU."""
    for engine in GPU:
        engine.provide(monkeypatch)
    return "triton", "cuda"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of programs of each kernel for GPUs that the test launches, in order."""
    found: list[int] = []

    def counted(launch: Any) -> Any:
        def prepared(self: Any, table: Any, bucket: Any, size: int, there: Any) -> Any:
            go, programs = launch(self, table, bucket, size, there), there[bucket.index].numel()

            def counting() -> None:
                found.append(programs)
                go()

            return counting

        return prepared

    for kind in (Triton, CUDA):
        monkeypatch.setattr(kind, "launch", counted(kind.launch))
    return found


@pytest.fixture
def promises(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Checks every hint of alignment that an interpreted kernel gives; returns them."""
    found: list[int] = []
    if importlib.util.find_spec("triton") is None:
        return found
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_core

    def watched(lang: Any, scope: Any) -> None:
        patch(lang, scope)
        give = lang.multiple_of

        def multiple_of(value: Any, divisor: Any, **more: Any) -> Any:
            first = int(value.handle.data.flat[0])
            assert first % int(divisor) == 0, f"{first} was promised to be a multiple of {divisor}"
            found.append(int(divisor))
            return give(value, divisor, **more)

        scope.set_attr(lang, "multiple_of", multiple_of)

    monkeypatch.setattr(interpreter, "_patch_lang_core", watched)
    return found


@pytest.fixture(params=CPU, ids=lambda engine: engine.form)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this processor has, forced."""
    request.param.provide(monkeypatch)
    return str(request.param.form)


@pytest.fixture
def own_garbage() -> Iterator[None]:
    """gc.collect() walks what the test itself makes, not the whole suite's tests and parsed kernels (3 s each time)."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _settings_restored() -> Iterator[None]:
    """Puts back what is global: thread count, flushing of subnormals, the one-time warning of the fallback."""
    threads, warned = torch.get_num_threads(), wd_kernels.backends._warned
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    wd_kernels.backends._warned = warned
