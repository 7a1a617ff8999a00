"""Gradient release: parameters are stepped while the backward pass runs, and their gradients are freed at once.

A block is what is stepped together: a layer, what fully_shard wraps, a bucket of DDP's. Each has a table of its own, so
that its step is one native call and one launch like any other; states, groups and schedules stay the optimizer's.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import backends
from .caller import warn
from .flat import place_of
from .optimizer import DecoupledOptimizer, plain_tensors
from .rules import Hyper
from .schedules import stepping
from .sharding import is_fully_sharded, is_sharded
from .table import TensorTable
from .validation import PLACES, label

__all__ = ["GradientRelease", "release_gradients"]

Blocks = Iterable[nn.Module | Iterable[Tensor]]


def release_gradients(
    model: nn.Module,
    optimizer: DecoupledOptimizer,
    *,
    blocks: Blocks | None = None,
    clip_value: float | None = None,
    clip_block_norm: float | None = None,
    max_grad_norm: float | None = None,
) -> GradientRelease:
    """From now on each block of parameters is stepped as soon as its gradients are there, and they are freed.

    The numbers are those of ordinary steps, to the bit. There are never more gradients than those of the blocks that
    the backward pass is in, so a model of n float32 parameters needs some 4n bytes less. `optimizer.step()` is still
    called after every backward pass: it steps what no hook has (a block of which a parameter took no part in the loss),
    and counts for schedules; LR schedulers, frameworks and `zero_grad()` go on as before.

    - `fully_shard`: blocks are what it wraps, stepped as their gradients are reduced. Shard first.
    - DDP: give the wrapped model; blocks are its buckets. They stay allocated, as ever, so it saves no memory, but the
      step runs while other buckets are summed. In `no_sync()` nothing is stepped. Not with `find_unused_parameters` or
      `static_graph`, where buckets have zeros for what no rank has used.
    - Gradient accumulation: all micro-steps but the last one `with release.accumulating():`, or DDP's `no_sync()`, or
      `set_requires_gradient_sync(False)` of fully_shard.
    - A second gradient of a parameter that is stepped already, before `optimizer.step()`, is an error.
    - `torch.amp.GradScaler` skips a step where any gradient has overflowed, which is not known before the last one is
      there: it does not go with this (it finds no gradients, and says so). bfloat16 needs no scaling.

    Args:
        model: whose parameters; wrapped in DDP, if it is to be.
        optimizer: an optimizer of this package. Parameters of it that are not the model's are stepped by themselves.
        blocks: modules or lists of parameters that are stepped together. By default what fully_shard wraps, or else the
            entries of the outermost `nn.ModuleList`s and `nn.Sequential`s, and every other module that has parameters.
        clip_value: clamps gradients to [-clip_value, clip_value] before a step.
        clip_block_norm: scales the gradients of a block where their norm is larger.
        max_grad_norm: refused: the norm of all gradients is known when the last one is there, and the first are gone.

    Returns:
        The release, whose `remove()` ends it.

    Raises:
        TypeError, ValueError, RuntimeError: naming what cannot be released; nothing was changed.

    Example:
        >>> import torch, wd_kernels
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))
        >>> opt = wd_kernels.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        >>> release = wd_kernels.release_gradients(model, opt)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> [p.grad for p in model.parameters()]
        [None, None, None, None]
        >>> opt.step()

    Source: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources", ACL 2024,
        section 3.1 (fused backward and update).
    """
    if not isinstance(optimizer, DecoupledOptimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}: allowed are those of wd_kernels")
    if max_grad_norm is not None:
        raise ValueError(
            f"max_grad_norm={max_grad_norm!r} with gradient release: the norm of all gradients is known when the last "
            "one is there, and by then the first are stepped and gone. What can be had: clip_value=, which clamps each "
            "element, or clip_block_norm=, which limits the norm of each block"
        )
    for name, value in (("clip_value", clip_value), ("clip_block_norm", clip_block_norm)):
        if value is not None and not (isinstance(value, (int, float)) and value > 0):
            raise ValueError(f"{name}={value!r}: allowed are numbers > 0, or None")
    if optimizer.release is not None:
        raise RuntimeError("gradients of this optimizer are released already: remove() that release first")
    return GradientRelease(model, optimizer, blocks, clip_value, clip_block_norm)


class GradientRelease:
    """What `release_gradients` returns.

    Attributes:
        blocks: the parameters that are stepped together. Under DDP its buckets, once they were there.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: DecoupledOptimizer,
        blocks: Blocks | None,
        clip_value: float | None,
        clip_block_norm: float | None,
    ) -> None:
        self.optimizer, self.clip_value, self.clip_block_norm = optimizer, clip_value, clip_block_norm
        self._lock = threading.RLock()
        self._hypers: Sequence[Hyper] | None = None  # of a round: from the first gradient to optimizer.step()
        self._ticks: Sequence[stepping.Tick] = ()
        self._stepped: set[int] = set()  # the ids of parameters that this round has stepped
        self._paused = False
        groups = optimizer.param_groups
        self.places = {id(p): (g, k) for g, group in enumerate(groups) for k, p in enumerate(group["params"])}
        params = [p for group in groups for p in group["params"]]
        for p in params:
            what = self.label(p)
            if place_of(p) is not None:
                raise ValueError(f"{what} is flat: its gradient is part of a buffer, which stays; unflatten_ it first")
            if not p.is_leaf:
                raise ValueError(f"{what} is not a leaf of the autograd graph: a parameter is one")
        self._of_ddp = isinstance(model, nn.parallel.DistributedDataParallel)
        self._blocks: dict[tuple[int, ...], _Block] = {}
        self._hooks: dict[int, Any] = {}
        if self._of_ddp:
            if blocks is not None:
                raise ValueError("blocks with a model in DDP: its buckets are the blocks (of bucket_cap_mb=)")
            for name in ("find_unused_parameters", "static_graph"):
                if getattr(model, name):
                    raise ValueError(
                        f"DistributedDataParallel(..., {name}=True) with gradient release: which parameters no rank "
                        "has used is known when the backward pass ends; they would be stepped, and decayed, with zeros"
                    )
            group: Any = model.process_group
            model.register_comm_hook(  # type: ignore[operator]
                weakref.ref(self), lambda state, bucket: _reduce_and_step(state, group, bucket)
            )
        else:
            _warn_of_sums(params)
            self._block_of = {id(p): self._block(own) for own in _split(model, blocks, params) for p in own}
            self._listen(params)
        optimizer.release = self

    @property
    def blocks(self) -> list[list[Tensor]]:
        return [list(block.params) for block in self._blocks.values()]

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Within it backward passes add to gradients, and nothing is stepped."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def remove(self) -> None:
        """Ends the release: gradients stay for `optimizer.step()` again. What DDP has been given averages as before."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}
        if self.optimizer.release is self:
            self.optimizer.release = None

    @property
    def active(self) -> bool:
        return not self._paused and self.optimizer.release is self

    def label(self, p: Tensor) -> str:
        g, k = self.places[id(p)]
        return label(self.optimizer.param_groups[g], g, k)

    # The way of a gradient --------------------------------------------------------------------------------------------

    def arrived(self, p: Tensor) -> None:
        """A gradient is whole: steps its block, and frees it, if it is the last one of it."""
        with self._lock:
            self._expect(p)
            block = self._block_of[id(p)]
            block.waiting.discard(id(p))
            if not block.waiting:
                self._step(block)
                for q in block.params:
                    q.grad = None

    def arrived_in_bucket(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """The averaged gradients of a bucket of DDP's, which goes on to look at those that its parameters have."""
        with self._lock:
            known = [(p, grad) for p, grad in zip(params, gradients, strict=True) if id(p) in self.places]
            before = [p.grad for p, _ in known]
            for p, _ in known:
                self._expect(p)
            try:
                for p, grad in known:
                    p.grad = grad
                self._step(self._block([p for p, _ in known]))
            finally:
                for (p, _), own in zip(known, before, strict=True):
                    p.grad = own

    def finish(self) -> Sequence[stepping.Tick]:
        """What is left to `optimizer.step()`: blocks that no hook has stepped, and what schedules count."""
        with self._lock:
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            if [id(p) for p in params] != list(self.places):
                raise RuntimeError(
                    "the optimizer has other parameters than when its gradients were released: remove() the release "
                    "and make another"
                )
            left = [p for p in params if p.grad is not None and id(p) not in self._stepped]
            if self._of_ddp and left:
                self._step(self._block(left))
            for block in {id(p): self._block_of[id(p)] for p in left if not self._of_ddp}.values():
                if any(p.grad is not None and id(p) not in self._stepped for p in block.params):
                    self._step(block)
            for p in params:
                if id(p) in self._stepped:
                    p.grad = None
            self.hypers()
            for own, key, value in self._ticks:
                own[key] = value
            self._hypers = None
            self._stepped.clear()
            for block in self._blocks.values():
                block.waiting = block.trained()
            if not self._of_ddp:
                self._listen(params)  # to what was unfrozen, too
            return self._ticks

    def hypers(self) -> Sequence[Hyper]:
        """The hyperparameters of this round, as the groups had them when it began."""
        if self._hypers is None:
            opt = self.optimizer
            hypers = opt.rule.hypers(opt.param_groups, default=opt.defaults["decay"])
            self._hypers, self._ticks = stepping.follow(opt.param_groups, hypers)
        return self._hypers

    def _listen(self, params: Iterable[Any]) -> None:
        """Hooks of parameters; they hold no release, since the garbage collector does not see what has them."""
        hook = partial(_arrived, weakref.ref(self))
        for p in params:
            if p.requires_grad and id(p) not in self._hooks:
                self._hooks[id(p)] = p.register_post_accumulate_grad_hook(hook)

    def _expect(self, p: Tensor) -> None:
        if id(p) in self._stepped:
            raise RuntimeError(
                f"a second gradient of {self.label(p)} has come after it was stepped: call optimizer.step() after "
                "every backward pass, or accumulate: with release.accumulating(), all but the last one"
            )

    def _step(self, block: _Block) -> None:
        block.step(self.hypers())
        self._stepped.update(map(id, block.params))

    def _block(self, params: Sequence[Tensor]) -> _Block:
        """Those parameters as a block, known or new."""
        key = tuple(map(id, params))
        if key not in self._blocks:
            self._blocks[key] = _Block(self, params)
        return self._blocks[key]


class _Block:
    """Parameters that are stepped together: a table, whose groups are what it has of the optimizer's groups."""

    def __init__(self, release: GradientRelease, params: Sequence[Tensor]) -> None:
        self.release, self.params = release, tuple(params)
        opt = release.optimizer
        self.table = TensorTable(opt.rule, cache(partial(backends.resolve, opt.backend)))
        self.of_groups: dict[int, list[tuple[Tensor, int]]] = {}
        for p in sorted(params, key=lambda p: release.places[id(p)]):
            g, k = release.places[id(p)]
            self.of_groups.setdefault(g, []).append((p, k))
        self.groups: list[dict[str, Any]] = [{"params": [p for p, _ in own]} for own in self.of_groups.values()]
        self.waiting = self.trained()

    def trained(self) -> set[int]:
        return {id(p) for p in self.params if p.requires_grad}

    def step(self, hypers: Sequence[Hyper]) -> None:
        opt, release = self.release.optimizer, self.release
        for (g, own), group in zip(self.of_groups.items(), self.groups, strict=True):
            live = opt.param_groups[g]
            group.update(live, params=group["params"], **{PLACES: [(g, k) for _, k in own]})
            if "param_names" in live:
                group["param_names"] = [live["param_names"][k] for _, k in own]
        if release.clip_value is not None:
            nn.utils.clip_grad_value_(self.params, release.clip_value)
        if release.clip_block_norm is not None:
            nn.utils.clip_grad_norm_(self.params, release.clip_block_norm)
        with self.table.lock, plain_tensors(self.table.sharded):
            self.table.step(self.groups, opt.state, [hypers[g] for g in self.of_groups], ())


def _arrived(release: weakref.ref[GradientRelease], p: Tensor) -> None:
    own = release()
    if own is not None and own.active:
        own.arrived(p)


def _reduce_and_step(release: weakref.ref[GradientRelease], group: Any, bucket: Any) -> torch.futures.Future[Tensor]:
    """DDP's all-reduce of a bucket, and the step when it is done."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook  # not in every build

    params, gradients = bucket.parameters(), bucket.gradients()  # views: the mean is written where they lie

    def step(done: torch.futures.Future[Tensor]) -> Tensor:
        mean, own = done.value(), release()
        if own is not None and own.active:
            own.arrived_in_bucket(params, gradients)
        return mean

    return allreduce_hook(group, bucket).then(step)


def _warn_of_sums(params: Iterable[Tensor]) -> None:
    """Says that nothing sums gradients of parameters that are on every rank."""
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world > 1 and not all(map(is_sharded, params)):
        warn(
            f"ordinary parameters are stepped with the gradients of this process alone, of {world}: if they are on "
            "every rank, wrap the model in DistributedDataParallel first and give that to release_gradients"
        )


def _split(model: nn.Module, blocks: Blocks | None, params: Sequence[Tensor]) -> list[list[Tensor]]:
    """The parameters by blocks; each in one of them."""
    left = {id(p): p for p in params}

    def take(those: Iterable[Tensor]) -> list[Tensor]:
        return [left.pop(id(p)) for p in those if id(p) in left]

    given = _default_blocks(model) if blocks is None else list(blocks)
    found = [take(own.parameters() if isinstance(own, nn.Module) else own) for own in given]
    return [own for own in (*found, *([p] for p in left.values())) if own]


def _default_blocks(model: nn.Module) -> list[Iterable[Tensor]]:
    wrapped = [m for m in model.modules() if is_fully_sharded(m)]
    if wrapped:
        return [list(m.parameters()) for m in reversed(wrapped)]  # inner ones first: they take what is theirs
    found: list[Iterable[Tensor]] = []

    def visit(module: nn.Module) -> None:
        found.append(list(module.parameters(recurse=False)))
        for child in module.children():
            if isinstance(module, (nn.ModuleList, nn.Sequential)):
                found.append(list(child.parameters()))
            else:
                visit(child)

    visit(model)
    return found
