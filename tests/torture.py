"""What else may run during a step: exceptions at every line and allocation, signals, collections, threads, forks.

Run as a program, it does all of it at length, ours and torch's in turn, and prints a table (`make torture`); the suite
does a little of each (`test_torture.py`). Every count is of places or steps, never of time.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import gc
import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import wd_kernels
from wd_kernels import native
from wd_kernels.schedules import Cosine

OURS = Path(wd_kernels.__file__).parent
THEIRS = Path(torch.optim.__file__).parent
RULES = ("adamw", "sgdw", "adagradw")


class Injected(BaseException):
    """Raised where nobody expects it, as a signal's handler may."""


# What is tried -------------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """Parameters and their optimizer."""

    params: list[nn.Parameter]
    optimizer: Any


def make_params(mixed: bool) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in ((5, 3), (7,), (4, 4))]
    if mixed:  # another dtype, gaps, complex numbers
        tensors.append(torch.randn(6, generator=generator).bfloat16())
        tensors.append(torch.randn(4, 6, generator=generator)[:, ::2])
        tensors.append(torch.randn(3, dtype=torch.complex64, generator=generator))
    return [nn.Parameter(t) for t in tensors]


def make(rule: str, mixed: bool = False, flat: bool = False) -> Subject:
    """Two groups, a schedule, and what each rule keeps; "torch" is its AdamW, foreach or, if mixed, one by one."""
    params = make_params(mixed)
    if flat:
        wd_kernels.flatten_(params)
    groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}]
    common: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
    if rule == "torch":
        return Subject(params, torch.optim.AdamW(groups, **common, amsgrad=True, foreach=not mixed))
    common["schedule"] = Cosine(20)
    if rule == "adamw":
        return Subject(params, wd_kernels.AdamW(groups, **common, amsgrad=True))
    if rule == "sgdw":
        return Subject(params, wd_kernels.SGDW(groups, **common, momentum=0.9, dampening=0.5))
    return Subject(params, wd_kernels.AdagradW(groups, **common, initial_accumulator_value=0.5))


def set_gradients(subject: Subject, t: int, skip: tuple[int, ...] = ()) -> None:
    """In place where a gradient is there, as a backward pass does."""
    for i, p in enumerate(subject.params):
        if i in skip:
            p.grad = None
            continue
        generator = torch.Generator().manual_seed(100 * t + i)
        dtype = torch.complex64 if p.is_complex() else torch.float32
        values = torch.randn(p.shape, dtype=dtype, generator=generator).to(p.dtype)
        if p.grad is None:
            p.grad = values
        else:
            p.grad.copy_(values)


def snapshot(subject: Subject) -> dict[Any, Any]:
    """Parameters, states, and what groups count."""
    found: dict[Any, Any] = {}
    for i, p in enumerate(subject.params):
        found[i] = p.detach().clone()
        for name, value in subject.optimizer.state.get(p, {}).items():
            found[i, name] = value.clone() if isinstance(value, Tensor) else value
    for g, group in enumerate(subject.optimizer.param_groups):
        found["group", g] = (group.get("eta"), group.get("schedule_step"), len(group["params"]))
    return found


def same(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    if a.keys() != b.keys():
        return False
    for key, value in a.items():
        if isinstance(value, Tensor):
            if value.dtype != b[key].dtype or not torch.equal(value, b[key]):
                return False
        elif value != b[key]:
            return False
    return True


# Exceptions ----------------------------------------------------------------------------------------------------------


@contextmanager
def injected_at_line(k: int, package: Path) -> Iterator[list[str]]:
    """Raises Injected at the k-th line of the package's that is executed; gives the line, if it came to it."""
    seen, where = 0, list[str]()

    def local(frame: Any, event: str, _: object) -> Any:
        nonlocal seen
        if event == "line":
            seen += 1
            if seen == k:
                where.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
                sys.settrace(None)
                raise Injected
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: local if frame.f_code.co_filename.startswith(str(package)) else None)
    try:
        yield where
    finally:
        sys.settrace(before)


#: What makes tensors in the package; memory may be short at each.
ALLOCATE = ("zeros", "empty", "tensor", "zeros_like", "empty_like", "full", "frombuffer")


@contextmanager
def injected_at_allocation(k: int, _: Path) -> Iterator[list[str]]:
    """Raises MemoryError at the k-th tensor that is allocated."""
    seen, where = 0, list[str]()
    originals = {name: getattr(torch, name) for name in ALLOCATE}

    def counted(name: str) -> Callable[..., Any]:
        def allocate(*args: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == k:
                where.append(name)
                raise MemoryError(f"the {k}-th allocation (a test)")
            return originals[name](*args, **options)

        return allocate

    for name in ALLOCATE:
        setattr(torch, name, counted(name))
    try:
        yield where
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


@contextmanager
def injected_in_native_code(k: int, _: Path) -> Iterator[list[str]]:
    """The k-th allocation of Python's own, in each native call that takes a step, finds no memory.

    In all of `step()` torch's own code crashes so: `record_function`, say, which its optimizers are wrapped in.
    """
    from _testcapi import remove_mem_hooks, set_nomemory  # a module that Python comes with, of its own tests

    where, own = list[str](), native.C

    def step(*args: Any) -> Any:
        set_nomemory(k, k + 1)
        try:
            found = own.step(*args)
        except BaseException as error:
            where.append(f"{type(error).__name__} at allocation {k}")
            raise
        finally:
            remove_mem_hooks()
        return found

    native.C = types.SimpleNamespace(**{name: getattr(own, name) for name in dir(own)} | {"step": step})
    try:
        yield where
    finally:
        native.C = own


Injection = Callable[[int, Path], Any]


def try_everywhere(
    prepare: Callable[[], Subject],
    action: Callable[[Subject], None],
    injection: Injection,
    package: Path = OURS,
    stride: int = 1,
    first: int = 1,
) -> tuple[int, Counter[str]]:
    """Interrupts an action at every `stride`-th place: it must have done nothing, or all; done again, it is the same.

    Returns:
        How many places were tried, and where it went wrong.
    """

    def finish(subject: Subject) -> dict[Any, Any]:
        for t in (50, 51):
            set_gradients(subject, t)
            subject.optimizer.step()
        return snapshot(subject)

    subject = prepare()
    before = snapshot(subject)
    action(subject)
    after, last = snapshot(subject), finish(subject)
    tried, bad, k = 0, Counter[str](), first
    while True:
        subject = prepare()
        with injection(k, package) as where:
            try:
                action(subject)
            except (Injected, MemoryError, RuntimeError):  # torch calls some failures by another name
                assert where
        if not where:
            return tried, bad
        tried += 1
        k += stride
        try:
            now = snapshot(subject)
            if not same(now, after):
                if not same(now, before):
                    bad[f"half done: {where[0]}"] += 1
                    continue
                action(subject)
                if not same(snapshot(subject), after):
                    bad[f"done again, it differs: {where[0]}"] += 1
                    continue
            if not same(finish(subject), last):
                bad[f"what follows differs: {where[0]}"] += 1
        except Exception as error:
            bad[f"{type(error).__name__} {error}: {where[0]}"] += 1


def after_steps(rule: str, mixed: bool, flat: bool, steps: int, skip: tuple[int, ...]) -> Callable[[], Subject]:
    def prepare() -> Subject:
        subject = make(rule, mixed, flat)
        for t in range(steps):
            set_gradients(subject, t)
            subject.optimizer.step()
        set_gradients(subject, steps, skip)
        return subject

    return prepare


def step(subject: Subject) -> None:
    subject.optimizer.step()


def load(subject: Subject) -> None:
    subject.optimizer.load_state_dict(copy.deepcopy(SAVED[type(subject.optimizer)]))  # torch keeps what it is given


def flatten(subject: Subject) -> None:
    wd_kernels.flatten_(subject.params)


def add_group(subject: Subject) -> None:
    """A group of one parameter, which is made once."""
    spare = getattr(subject, "spare", None)
    if spare is None:
        spare = nn.Parameter(torch.arange(3.0))
        spare.grad = torch.ones(3)
        subject.spare = spare  # type: ignore[attr-defined]
    subject.optimizer.add_param_group({"params": [spare], "lr": 0.5})


ACTIONS = {"step": step, "load_state_dict": load, "flatten_": flatten, "add_param_group": add_group}
SAVED: dict[type, Any] = {}
for _rule in (*RULES, "torch"):
    _donor = after_steps(_rule, True, False, 3, ())()
    with warnings.catch_warnings(action="ignore"):  # of what torch does not know
        SAVED[type(_donor.optimizer)] = _donor.optimizer.state_dict()


# Storms --------------------------------------------------------------------------------------------------------------


class Mutator:
    """Exchanges what a step reads and writes, whenever it is called."""

    def __init__(self, params: list[nn.Parameter], optimizer: Any, kinds: str, seed: int = 0) -> None:
        self.params, self.optimizer, self.kinds = params, optimizer, kinds
        self.random, self.count, self.busy = random.Random(seed), 0, False

    def __call__(self, *_: object) -> None:
        if self.busy:
            return
        self.busy = True
        try:
            self.count += 1
            getattr(self, self.random.choice(self.kinds.split()))()
        finally:
            self.busy = False

    def data(self) -> None:
        for p in self.params:
            p.data = p.data.clone()

    def clear(self) -> None:
        self.optimizer.state.clear()

    def states(self) -> None:
        for p in self.params:
            own = self.optimizer.state.get(p)
            if own and "exp_avg" in own:
                own["exp_avg"] = own["exp_avg"].clone()

    def pop(self) -> None:
        for p in self.params[::2]:
            self.optimizer.state.pop(p, None)

    def gradients(self) -> None:
        for p in self.params:
            p.grad = torch.randn_like(p)

    def gradients_data(self) -> None:
        for p in self.params:
            if p.grad is not None:
                p.grad.data = p.grad.data.clone()

    def flatten(self) -> None:
        try:
            (wd_kernels.flatten_ if self.random.random() < 0.5 else wd_kernels.unflatten_)(self.params)
        except ValueError as error:
            if "flat already" not in str(error):
                raise


EXCHANGES = "data clear states pop gradients gradients_data"


def storm(library: str, how: str, kinds: str, tensors: int, elements: int, steps: int) -> dict[str, Any]:
    """Steps while a signal's handler, the garbage collector or another thread exchanges everything.

    As many as there are to be, and up to ten times more until there were as many exchanges.
    """
    params = [nn.Parameter(torch.randn(elements)) for _ in range(tensors)]
    if library == "torch":
        optimizer: Any = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1, fused=True)
    else:
        optimizer = wd_kernels.AdamW(params, lr=1e-3, weight_decay=0.1)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    mutate, errors, stop = Mutator(params, optimizer, kinds), Counter[str](), threading.Event()

    def handle(*_: object) -> None:
        mutate()
        signal.setitimer(signal.ITIMER_REAL, 0.002)

    def work() -> None:
        while not stop.is_set():
            mutate()
            time.sleep(0.0003)

    thread = threading.Thread(target=work)
    if how == "signal":
        signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.002)
    elif how == "gc":
        gc.callbacks.append(lambda phase, _: mutate() if phase == "start" else None)
        gc.set_threshold(20)
    else:
        thread.start()
    taken = 0
    while taken < steps or (mutate.count < steps and taken < 10 * steps):
        taken += 1
        try:
            optimizer.step()
        except Exception as error:
            errors[f"{type(error).__name__}: {error}"[:120]] += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    gc.callbacks.clear()
    stop.set()
    if thread.ident is not None:
        thread.join()
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    finite = all(bool(torch.isfinite(p).all()) for p in params)
    return {
        "steps": taken,
        "exchanges": mutate.count,
        "bad": sum(errors.values()) + (not finite),
        "errors": dict(errors),
    }


def interrupted(library: str, tensors: int, elements: int, steps: int) -> dict[str, Any]:
    """A handler raises during steps: each is taken wholly, with its counts, or not at all."""
    params = [nn.Parameter(torch.zeros(elements)) for _ in range(tensors)]
    options = {"fused": True} if library == "torch" else {}
    kind: Any = torch.optim.AdamW if library == "torch" else wd_kernels.AdamW
    optimizer = kind(params, lr=1.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, **options)
    for p in params:
        p.grad = torch.ones_like(p)  # so that each step takes 1 from every element
    optimizer.step()
    bad = raised = 0
    behind = [0.0] * (3 * tensors)

    def handle(*_: object) -> None:
        raise Injected

    signal.signal(signal.SIGALRM, handle)
    pause = random.Random(1)
    for _ in range(steps):
        try:
            signal.setitimer(signal.ITIMER_REAL, pause.uniform(2e-5, 8e-3))
            for _ in range(100):
                optimizer.step()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Injected:
            raised += 1
        taken = [float(optimizer.state[p]["step"]) for p in params]
        taken += [float(-value) for p in params for value in (p.detach().min(), p.detach().max())]
        now = [own - taken[0] for own in taken]
        bad += now != behind  # what is half done once stays apart
        behind = now
    return {"steps": steps, "raised": raised, "bad": bad}


def together(library: str, threads: int, elements: int, steps: int) -> dict[str, Any]:
    """Threads step optimizers of their own at the same time: each gets the bits that it gets alone."""
    options = {"fused": True} if library == "torch" else {}
    kind: Any = torch.optim.AdamW if library == "torch" else wd_kernels.AdamW
    start = torch.linspace(-1, 1, elements)
    results: dict[int, Tensor] = {}

    def work(own: int) -> None:
        p = nn.Parameter(start * (own % threads + 1))
        optimizer = kind([p], lr=0.1, weight_decay=0.1, **options)
        p.grad = start.clone()
        for _ in range(steps):
            optimizer.step()
        results[own] = p.detach()

    running = [threading.Thread(target=work, args=(own,)) for own in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for own in range(threads):
        work(own + threads)
    bad = sum(not torch.equal(results[own], results[own + threads]) for own in range(threads))
    return {"steps": steps, "bad": bad}


def forks(library: str, children: int) -> dict[str, Any]:
    """Children that are forked while another thread steps: they step too, and end."""
    params = [nn.Parameter(torch.randn(200_000)) for _ in range(10)]
    optimizer: Any = (torch.optim.AdamW if library == "torch" else wd_kernels.AdamW)(params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    stop, bad = threading.Event(), 0

    def work() -> None:
        while not stop.is_set():
            optimizer.step()

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(children):
        time.sleep(0.002)
        child = os.fork()
        if child == 0:
            if library == "torch":
                torch.set_num_threads(1)  # with more it waits for threads that are not there
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - a warning that it takes one thread
            optimizer.step()
            optimizer.step()
            os._exit(0)
        for _ in range(4000):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                bad += status != 0
                break
            time.sleep(0.005)
        else:
            bad += 1
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    stop.set()
    thread.join()
    return {"children": children, "bad": bad}


def _live_on(optimizer: Any) -> None:
    """What a started process does with an optimizer that it was given."""
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 2


def started(library: str, method: str, children: int, sharing: str = "file_descriptor") -> dict[str, Any]:
    """Processes that are started by another method while a thread steps, and given an optimizer with its state.

    Args:
        sharing: how torch hands tensors over.
    """
    torch.multiprocessing.set_sharing_strategy(sharing)
    params = [nn.Parameter(torch.randn(200_000)) for _ in range(3)]
    kind: Any = torch.optim.AdamW if library == "torch" else wd_kernels.AdamW
    busy = kind(params)
    for p in params:
        p.grad = torch.randn_like(p)
    stop, bad = threading.Event(), 0

    def work() -> None:
        while not stop.is_set():
            busy.step()

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(children):
        optimizer = kind([nn.Parameter(torch.ones(100))])  # anew: torch's states are shared with the process
        optimizer.param_groups[0]["params"][0].grad = torch.ones(100)
        optimizer.step()
        process: Any = multiprocessing.get_context(method).Process(target=_live_on, args=(optimizer,))
        process.start()
        process.join(60)
        bad += process.exitcode != 0
        process.kill()
    stop.set()
    thread.join()
    return {"children": children, "bad": bad}


def apart(function: str, *arguments: object) -> dict[str, Any]:
    """Calls one of the above in a process of its own, which may crash."""
    here = str(Path(__file__).parent)
    call = f"import sys; sys.path.insert(0, {here!r}); import torture; print(torture.{function}{arguments!r})"
    done = subprocess.run([sys.executable, "-X", "faulthandler", "-c", call], capture_output=True, text=True)
    if done.returncode:
        return {"bad": 1, "crash": done.returncode, "errors": done.stderr[-2000:]}
    found: dict[str, Any] = eval(done.stdout.splitlines()[-1])
    return found


# A long life ---------------------------------------------------------------------------------------------------------

CANARY, MARGIN = 12345.0, 8


class Guarded:
    """Tensors with canaries on both sides of their memory."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def copy(self, t: Tensor, offset: int = 0) -> Tensor:
        """The values of `t`, so many elements off alignment."""
        buffer = torch.full((2 * MARGIN + offset + t.numel(),), CANARY, dtype=t.dtype)
        self.buffers.append((buffer, MARGIN + offset))
        own = buffer.as_strided(t.shape, t.stride(), MARGIN + offset)
        return own.copy_(t).detach()

    def whole(self) -> bool:
        """Are all canaries alive?"""
        return all(
            bool((b[:begin] == CANARY).all()) and bool((b[len(b) - MARGIN :] == CANARY).all())
            for b, begin in self.buffers
        )


class Model:
    """AdamW and SGDW in float64, written down from the papers."""

    def __init__(self, rule: str, options: dict[str, Any], p: Tensor) -> None:
        self.rule, self.options, self.t = rule, options, 0
        self.p, self.m, self.v = p.detach().double(), torch.zeros_like(p).double(), torch.zeros_like(p).double()

    def step(self, grad: Tensor, lr: float) -> None:
        self.t += 1
        g, decay = grad.double(), self.options["weight_decay"]
        shrink = decay if self.options["decay"] == "independent" else lr * decay
        if self.rule == "adamw":
            b1, b2 = self.options["betas"]
            self.m = b1 * self.m + (1 - b1) * g
            self.v = b2 * self.v + (1 - b2) * g * g
            mean, square = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
            move = lr * mean / (square.sqrt() + self.options["eps"])
        else:
            mu, tau = self.options["momentum"], self.options["dampening"]
            self.m = g if self.t == 1 else mu * self.m + (1 - tau) * g
            move = lr * self.m
        self.p = self.p - shrink * self.p - move


def fuzz(steps: int, seed: int = 0) -> dict[str, Any]:
    """Lives of some forty steps: missing gradients, exchanged memory and states, flat buffers, copies, reloads."""
    choose, taken, bad, lives = random.Random(seed), 0, Counter[str](), 0
    torch.manual_seed(seed)
    while taken < steps:
        lives += 1
        rule = choose.choice(("adamw", "sgdw"))
        options: dict[str, Any] = {
            "weight_decay": choose.choice((0.01, 0.1)),
            "decay": choose.choice(("lr_scaled", "independent")),
        }
        if rule == "adamw":
            options |= {"betas": choose.choice(((0.9, 0.99), (0.5, 0.8))), "eps": 1e-3}
        else:
            options |= {"momentum": 0.9, "dampening": choose.choice((0.0, 0.5))}
        shapes = [
            choose.choice(((), (1,), (7,), (4, 5), (33, 2), (257,), (1030,))) for _ in range(choose.randint(1, 5))
        ]
        guarded = Guarded()
        params = [nn.Parameter(guarded.copy(torch.randn(s), choose.randint(0, 3))) for s in shapes]
        optimizer: Any = (wd_kernels.AdamW if rule == "adamw" else wd_kernels.SGDW)(params, lr=0.01, **options)
        models = [Model(rule, options, p) for p in params]
        for _ in range(choose.randint(10, 70)):
            lr = optimizer.param_groups[0]["lr"] = choose.choice((0.01, 0.002))
            for p, model in zip(params, models, strict=True):
                if choose.random() < 0.15:
                    p.grad = None
                    continue
                values = torch.randn(p.shape)
                if p.grad is not None and choose.random() < 0.5:
                    p.grad.copy_(values)
                else:
                    p.grad = guarded.copy(values, choose.randint(0, 3))
                model.step(values, lr)
            optimizer.step()
            taken += 1
            what = choose.random()
            p = choose.choice(params)
            if what < 0.05:
                p.data = guarded.copy(p.data, choose.randint(0, 3))
            elif what < 0.10 and p in optimizer.state:
                own = optimizer.state[p]
                for name in [name for name in own if name != "step"]:
                    own[name] = guarded.copy(own[name], choose.randint(0, 3))
            elif what < 0.12 and p in optimizer.state:
                optimizer.state[p] = {name: t.clone() for name, t in optimizer.state[p].items()}
            elif what < 0.14:
                with warnings.catch_warnings(action="ignore"):
                    optimizer.load_state_dict(optimizer.state_dict())
            elif what < 0.16:
                for q in params:
                    q.data = q.data.clone()
                wd_kernels.flatten_(params)
            elif what < 0.17:
                wd_kernels.unflatten_(params)
            if not guarded.whole():
                bad["a canary"] += 1
        for p, model in zip(params, models, strict=True):
            if not torch.allclose(p.detach().double(), model.p, rtol=1e-4, atol=1e-4):
                bad[f"{rule} differs from float64 by {float((p.detach() - model.p).abs().max()):.1e}"] += 1
            counts = optimizer.rule.torch.counts_steps  # else what is saved has none
            if counts and p in optimizer.state and float(optimizer.state[p]["step"]) != model.t:
                bad["a count"] += 1
    return {"steps": taken, "lives": lives, "bad": sum(bad.values()), "errors": dict(bad)}


# Leaks ---------------------------------------------------------------------------------------------------------------


def _step_new_gradients(subject: Subject, t: int) -> None:
    for p in subject.params:
        p.grad = torch.ones_like(p)
    subject.optimizer.step()


def _step_exchanged(subject: Subject, t: int) -> None:
    p = subject.params[t % 3]
    p.data = p.data.clone()
    subject.optimizer.state[p] = {name: value.clone() for name, value in subject.optimizer.state[p].items()}
    subject.optimizer.step()


def _step_cleared(subject: Subject, t: int) -> None:
    if t % 2:
        subject.optimizer.state.clear()
    else:
        del subject.optimizer.state[subject.params[t % 3]]
    subject.optimizer.step()
    subject.optimizer.step()


def _step_flat(subject: Subject, t: int) -> None:
    wd_kernels.unflatten_(subject.params) if t % 2 else wd_kernels.flatten_(subject.params)
    _step_new_gradients(subject, t)


def _step_failed(subject: Subject, t: int) -> None:
    p = subject.params[t % 3]
    good, p.grad = p.grad, torch.ones_like(p).to_sparse()
    try:
        subject.optimizer.step()
    except (TypeError, ValueError, RuntimeError):
        p.grad = good
    else:
        raise AssertionError("a sparse gradient was stepped")


def _step_interrupted(subject: Subject, t: int) -> None:
    subject.params[0].data = subject.params[0].data.clone()
    with injected_at_line(1 + 7 * t % 400, OURS):
        try:
            subject.optimizer.step()
        except Injected:
            subject.optimizer.step()


def _made_anew(subject: Subject, t: int) -> None:
    kind = type(subject.optimizer)
    options = {"schedule": Cosine(20)} if "schedule" in subject.optimizer.param_groups[0] else {}
    new = kind([{"params": subject.params[:2]}, {"params": subject.params[2:]}], lr=0.1, **options)
    new.step()
    with warnings.catch_warnings(action="ignore"):
        new.load_state_dict(new.state_dict())
    new.step()


def _functional(subject: Subject, t: int) -> None:
    p = [q.detach() for q in subject.params]
    zeros = [torch.zeros_like(q) for q in p]
    wd_kernels.functional.sgdw_(p, [torch.ones_like(q) for q in p], zeros, step=1, lr=0.1, momentum=0.9)


#: What is done over and over.
LIVES: dict[str, Callable[[Subject, int], None]] = {
    "steps": lambda subject, _: subject.optimizer.step(),
    "new gradients": _step_new_gradients,
    "exchanged memory and states": _step_exchanged,
    "states cleared": _step_cleared,
    "flattened and unflattened": _step_flat,
    "failed steps": _step_failed,
    "interrupted steps": _step_interrupted,
    "optimizers made, saved and loaded": _made_anew,
    "the functional API": _functional,
}

OURS_ALONE = ("flattened and unflattened", "interrupted steps", "the functional API")


def leaks(rule: str, life: str, iterations: int) -> dict[str, Any]:
    """How much more memory there is after so many iterations than after a quarter of them.

    Bad: an eighth of a Python object, or 100 bytes of the process's memory, for an iteration, and what comes and goes.
    """
    torch.set_num_threads(1)
    subject = make(rule)
    set_gradients(subject, 0)
    subject.optimizer.step()

    def now() -> tuple[int, int]:
        gc.collect()
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return sys.getallocatedblocks(), memory

    blocks = memory = 0
    for t in range(iterations):
        if t == iterations // 4:
            blocks, memory = now()
        LIVES[life](subject, t)
    after, afterwards = now()
    more = {"objects": after - blocks, "bytes": afterwards - memory}
    timed = iterations - iterations // 4
    bad = more["objects"] > 500 + timed // 8 or more["bytes"] > 2**18 + 100 * timed
    return {"iterations": iterations, "bad": int(bad), "errors": more if bad else {}}


def all_leaks(rule: str, iterations: int) -> dict[str, Any]:
    """The same of every life."""
    found = {life: leaks(rule, life, iterations)["errors"] for life in LIVES}
    errors = {life: more for life, more in found.items() if more}
    return {"lives": len(found), "bad": len(errors), "errors": errors}


# Sanitizers ----------------------------------------------------------------------------------------------------------

UNDER_A_SANITIZER = """
import sys, torture
sys.stderr = open(sys.argv[1], "w")  # what Python warns of; a sanitizer writes to the process's own
bad = torture.fuzz({steps})["bad"]
for how in ("signal", "gc", "thread"):
    bad += torture.storm("ours", how, torture.EXCHANGES + " flatten", 20, 300, {steps} // 10)["bad"]
bad += torture.storm("ours", "thread", torture.EXCHANGES, 220, 40_000, 4 + {steps} // 40)["bad"]
bad += torture.together("ours", 2, 9 << 20, 3)["bad"]
for action in ("step", "flatten_", "add_param_group"):
    prepare = torture.after_steps("sgdw", False, False, 2, ())
    bad += sum(torture.try_everywhere(prepare, torture.ACTIONS[action], torture.injected_at_line, stride=3)[1].values())
print({{"steps": {steps}, "bad": bad}})
"""


def sanitized(sanitizers: str, libraries: tuple[str, ...], steps: int) -> dict[str, Any]:
    """The same with native code that is built under sanitizers, in a copy of the package; what they say is an error.

    The thread sanitizer does not know what OpenMP waits for: a launch is one thread's there.
    """
    root, compiler = OURS.parent, os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("csrc", "wd_kernels", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
            source = root / name
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            if source.is_dir():
                shutil.copytree(source, Path(folder) / name, ignore=ignored)
            else:
                shutil.copy(source, folder)
        flags = f"-fsanitize={sanitizers} -fno-omit-frame-pointer -fno-sanitize-recover=undefined -g1"
        # What optimising leaves out a sanitizer does not see; it is three quarters of the compiler's time, too.
        setup = Path(folder) / "setup.py"
        setup.write_text(setup.read_text().replace("-O3 ", "-O1 ", 1))
        built = {**os.environ, "CXX": f"{compiler} {flags}", "WD_KERNELS_CUDA": "0"}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=folder, env=built, capture_output=True, text=True)
        if done.returncode:
            return {"bad": 1, "errors": done.stdout[-1000:] + done.stderr[-1000:]}
        paths = [
            subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
            for name in libraries
        ]
        options = "detect_leaks=0:verify_asan_link_order=0:halt_on_error=1"
        ran = {**os.environ, "LD_PRELOAD": ":".join(paths), "ASAN_OPTIONS": options, "UBSAN_OPTIONS": "halt_on_error=1"}
        if sanitizers == "thread":
            ran["OMP_NUM_THREADS"] = "1"
        ran["PYTHONPATH"] = f"{folder}:{folder}/tests"
        command = [sys.executable, "-c", UNDER_A_SANITIZER.format(steps=steps), os.devnull]
        done = subprocess.run(command, cwd=folder, env=ran, capture_output=True, text=True)
    if done.returncode or any(word in done.stderr for word in ("ERROR: ", "runtime error", "WARNING: Thread")):
        return {"bad": 1, "errors": done.stderr[-2000:]}
    found: dict[str, Any] = eval(done.stdout.splitlines()[-1])
    return found


# At length -----------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What was tried: of a kind, whose, how often, and what went wrong how often."""

    kind: str
    what: str
    whose: str
    tried: int
    bad: int
    errors: object = ""


def row(kind: str, what: str, whose: str, found: dict[str, Any], tried: str) -> Row:
    errors = str(found.get("errors") or "").strip().splitlines()
    return Row(kind, what, whose, found.get(tried, 1), found["bad"], errors[0][:150] if errors else "")


def every_place() -> Iterator[Row]:
    ways: tuple[tuple[str, Injection], ...] = (
        ("Python line", injected_at_line),
        ("allocation of a tensor", injected_at_allocation),
        ("allocation of Python's in native code", injected_in_native_code),
    )
    for name, injection in ways:
        for action, function in ACTIONS.items():
            for rule in (*RULES, "torch"):
                if rule == "torch" and (action == "flatten_" or injection is injected_in_native_code):
                    continue
                if injection is injected_in_native_code and action != "step":
                    continue
                package, tried, bad = THEIRS if rule == "torch" else OURS, 0, Counter[str]()
                for mixed, flat in ((True, False), (False, False), (False, True)):
                    if (rule == "torch" and flat) or (action == "flatten_" and (mixed or flat)):
                        continue
                    if action == "load_state_dict" and not mixed:
                        continue
                    for steps, skip in ((0, ()), (2, ()), (2, (1,)), (0, (1,))):
                        prepare = after_steps(rule, mixed, flat, steps, skip)
                        n, wrong = try_everywhere(prepare, function, injection, package)
                        tried += n
                        bad += wrong
                errors = dict(bad.most_common(3)) or ""
                yield Row(f"an exception at every {name}, in `{action}`", rule, rule, tried, sum(bad.values()), errors)


def everything(steps: int, fuzzed: int, loops: int) -> Iterator[Row]:
    yield from every_place()
    for library in ("ours", "torch"):
        for tensors, elements in ((20, 300), (300, 40_000)):
            n, of = steps if elements < 1000 else steps // 20, f"{tensors} tensors of {elements}"
            for how, who in (("signal", "a signal's handler"), ("gc", "a collection"), ("thread", "another thread")):
                kinds = EXCHANGES + (" flatten" if library == "ours" else "")
                for kind in (*kinds.split(), kinds):
                    found = apart("storm", library, how, kind, tensors, elements, n)
                    what = f"{'all of it' if ' ' in kind else kind}, {of}"
                    yield row(f"{who} exchanges memory, gradients, states", what, library, found, "exchanges")
            found = apart("interrupted", library, tensors // 10, elements * 10, n)
            yield row("a signal's handler raises", of, library, found, "raised")
        found = apart("together", library, 3, 9 << 20, 20)
        yield row("threads step optimizers of their own", "3 threads", library, found, "steps")
        yield row("forked while a thread steps", "", library, apart("forks", library, 40), "children")
        for method in ("forkserver", "spawn"):
            found = apart("started", library, method, 3)
            yield row("started anew while a thread steps, with a state", method, library, found, "children")
        for life in LIVES:
            if library == "ours" or life not in OURS_ALONE:
                found = apart("leaks", "adamw" if library == "ours" else library, life, loops)
                yield row("does memory grow, after so many", life, library, found, "iterations")
    yield row("random lives against float64, between canaries", "", "ours", fuzz(fuzzed), "steps")
    for sanitizers, libraries in (("address,undefined", ("libasan.so", "libubsan.so")), ("thread", ("libtsan.so",))):
        found = sanitized(sanitizers, libraries, 1000)
        yield row("a little of all under sanitizers", sanitizers, "ours", found, "steps")


def table(rows: list[Row]) -> str:
    """Of each kind, ours beside torch's."""

    def cells(kind: str, torchs: bool) -> tuple[str, str]:
        own = [r for r in rows if r.kind == kind and (r.whose == "torch") == torchs]
        return (f"{sum(r.tried for r in own):,}", f"{sum(r.bad for r in own):,}") if own else ("", "")

    kinds = [r.kind for r in rows if r.tried > 0]
    lines = [(kind, *cells(kind, False), *cells(kind, True)) for kind in dict.fromkeys(kinds)]
    head = ("what runs meanwhile", "tried", "bad", "torch: tried", "bad")
    widths = [max(len(line[k]) for line in (head, *lines)) for k in range(5)]

    def text(line: tuple[str, ...]) -> str:
        return "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *(f"{'-' * (width + 1)}:" for width in widths[1:])]) + "|"
    return "\n".join([text(head), rule, *map(text, lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of each storm")
    parser.add_argument("--fuzz", type=int, default=100_000, help="steps of random lives")
    parser.add_argument("--loops", type=int, default=10_000, help="after which memory is to be what it was")
    asked = parser.parse_args()
    faulthandler.enable()
    print(f"wd_kernels {wd_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{'whose':8} {'tried':>6} {'bad':>5}")
    rows = []
    for found in everything(asked.steps, asked.fuzz, asked.loops):
        rows.append(found)
        print(f"{found.whose:8} {found.tried:6} {found.bad:5}  {found.kind}: {found.what} {found.errors}", flush=True)
    print(f"\n{table(rows)}")
    sys.exit(any(r.bad for r in rows if r.whose != "torch"))


if __name__ == "__main__":
    main()
