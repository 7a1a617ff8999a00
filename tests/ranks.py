"""Functions that run in several processes of one gloo group: started once, for all tests of a process that want them.

    def trains(kind: str) -> None: ...  # in a test module; runs in each of them
    ranks.run(4, trains, "fsdp")

A function that fails in one of them fails in the test, with what it raised there. One that does not return in time
ends all; the next test starts others.
"""

from __future__ import annotations

import atexit
import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["MOST", "run"]

MOST = 4
PATIENCE = 60.0  # seconds
_processes: list[tuple[Any, Connection]] = []
_groups: list[tuple[int, str]] = []  # sizes, and the files where their ranks meet; the last one's is there


def run(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns on each of so many ranks. Raises where one raises; ends all where one hangs."""
    if not _processes:
        _start()
    if not _groups or _groups[-1][0] != world:
        _groups.append((world, str(Path(tempfile.gettempdir()) / f"wd-kernels-{os.getpid()}-{len(_groups)}")))
    meeting = _groups[-1][1]
    for _, connection in _processes[:world]:
        connection.send((world, meeting, function, args))
    ends = time.monotonic() + PATIENCE
    found: list[Any] = []
    failed: list[str] = []
    for rank, (_, connection) in enumerate(_processes[:world]):
        if not connection.poll(max(0.0, ends - time.monotonic())):
            failed.append(f"rank {rank} did not return within {PATIENCE:.0f} s")
            continue
        try:
            fine, packed = connection.recv()
        except EOFError:
            failed.append(f"rank {rank} ended")
            continue
        if fine:
            found.append(torch.load(io.BytesIO(packed), weights_only=False))
        else:
            failed.append(f"rank {rank}: {packed}")
    if failed:
        stop()  # their collectives may not fit together any more
        raise AssertionError(f"of {world} ranks failed:\n" + "\n".join(failed))
    return found


def stop() -> None:
    """Ends the processes that `run` has started."""
    for process, connection in _processes:
        connection.close()
        process.terminate()
        process.join()
    _processes.clear()
    _groups.append((0, ""))


def _start() -> None:
    context = multiprocessing.get_context("spawn")
    for rank in range(MOST):
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(rank, there), daemon=True)
        process.start()
        there.close()
        _processes.append((process, here))
    atexit.register(stop)


def _forget_meshes() -> None:
    """DTensors remember what came of operators by their meshes, of which a new one of the same ranks is the same."""
    from torch.distributed.tensor._redistribute import _gen_transform_infos
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()
    _gen_transform_infos.cache_clear()


def _serve(rank: int, connection: Connection) -> None:
    """Runs what it is told, until nobody tells it any more. The group stays as long as its size does."""
    torch.set_num_threads(1)
    now = ""
    while True:
        try:
            world, meeting, function, args = connection.recv()
        except EOFError:
            return
        try:
            if meeting != now:
                if now:
                    dist.destroy_process_group()
                    _forget_meshes()
                store = dist.FileStore(meeting, world)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
                now = meeting
            file = io.BytesIO()
            torch.save(function(*args), file)
            answer: tuple[bool, Any] = (True, file.getvalue())
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send(answer)
