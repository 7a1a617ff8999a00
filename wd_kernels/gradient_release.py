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
from .layout import origins
from .optimizer import RELEASED, DecoupledOptimizer, plain_tensors
from .rules import Hyper
from .schedules import stepping
from .sharding import is_sharded, loaded, redistribute, redistribute_gradients
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

    The numbers are those of ordinary steps, to the bit, with the hyperparameters that the groups have when the first
    gradient comes. There are never more gradients than those of the blocks that the backward pass is in, so a model of
    n float32 parameters needs some 4n bytes less. `optimizer.step()` is still called after every backward pass: it
    steps what no hook has (a block of which a parameter took no part in the loss), and counts for schedules; LR
    schedulers and frameworks go on as before.

    - `fully_shard`: blocks are what it wraps, stepped as their gradients are reduced. Shard first.
    - DDP: give the wrapped model; blocks are its buckets. They stay allocated, as ever, so it saves no memory, but the
      step runs while other buckets are summed. In `no_sync()` nothing is stepped. Not with `find_unused_parameters` or
      `static_graph`, where buckets have zeros for what no rank has used, nor within `Join`.
    - Gradient accumulation: all micro-steps but the last one `with release.accumulating():`, or DDP's `no_sync()`, or
      `set_requires_gradient_sync(False)` of fully_shard.
    - A second gradient of a parameter that is stepped already, before `optimizer.step()`, is an error: a backward pass
      that is for another model's parameters (a GAN's) belongs into `accumulating()` with `zero_grad()` after it.
    - A backward pass that fails leaves the blocks that it has stepped; `zero_grad()` drops the rest, and the next pass
      begins anew. Its step does not count for schedules.
    - `torch.amp.GradScaler` does not go with this: blocks would be stepped with scaled gradients before it looks at
      them. bfloat16 needs no scaling. Nor does `torch.nn.utils.clip_grad_norm_`, which finds no gradients any more.

    Args:
        model: whose parameters; wrapped in DDP, if it is to be.
        optimizer: an optimizer of this package. Parameters of it that are not the model's are stepped by themselves.
        blocks: modules or lists of parameters that are stepped together. By default what fully_shard wraps, or else the
            entries of the outermost `nn.ModuleList`s and `nn.Sequential`s, and every other module that has parameters.
        clip_value: clamps gradients to [-clip_value, clip_value] before a step. The optimizer's `max_grad_value` does
            so within it.
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
    groups = optimizer.param_groups
    own = next((g for g, group in enumerate(groups) if group.get("max_grad_norm") is not None), None)
    if optimizer._clipping.asked or own is not None:
        what = "of the optimizer" if own is None else f"in param group {own}"
        raise ValueError(f"max_grad_norm, skip_nonfinite or skip_spikes {what} with gradient release: {RELEASED}")
    if optimizer._statistics is not None or optimizer.track_changes:
        raise ValueError(
            "statistics() or track_changes of the optimizer with gradient release, whose blocks are stepped apart: "
            "allowed is one of them"
        )
    if optimizer._capturable:
        raise ValueError(
            "capturable=True of the optimizer with gradient release, whose blocks are stepped by hooks of the backward "
            "pass: allowed is one of them"
        )
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
        if optimizer._accumulators.full:
            raise RuntimeError("gradients are accumulated that no step has taken: call step() before they are released")
        self._optimizer = weakref.ref(optimizer)  # which has this
        self._clip_value, self._clip_block_norm = clip_value, clip_block_norm
        self._lock = threading.RLock()
        self._hypers: Sequence[Hyper] | None = None  # of a round: from the first gradient to optimizer.step()
        self._ticks: Sequence[stepping.Tick] = ()
        self._arrived: set[int] = set()  # the ids of parameters whose gradients this pass has brought
        self._stepped: dict[int, bool] = {}  # of those that this round has stepped, written as the step is taken
        self._paused = self._warned = False
        self._places = _places(optimizer)
        params = self._params()
        self._origins = dict(zip(map(id, params), origins(params), strict=True))
        for p in params:
            what = self._label(p)
            if place_of(p) is not None:
                raise ValueError(f"{what} is flat: its gradient is part of a buffer, which stays; unflatten_ it first")
            if not p.is_leaf:
                raise ValueError(f"{what} is not a leaf of the autograd graph: a parameter is one")
            if _released(p):
                raise ValueError(f"{what} is released by another optimizer: only one of them would step it")
        ddp = _data_parallel(model, blocks)
        self._of_ddp = ddp is not None
        self._blocks: dict[tuple[int, ...], _Block] = {}
        self._hooks: dict[int, Any] = {}
        if ddp is None:
            _warn_of_sums(params)
            split = _split(model, blocks, params)
            self._block_of = {id(p): self._block(own) for own in split for p in own}
        else:
            _join(ddp, self)
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
            self._arrived.clear()

    def remove(self) -> None:
        """Ends the release: gradients stay for `optimizer.step()` again. Under DDP they are averaged as before."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}
        if self.attached:
            self._owner().release = None

    @property
    def attached(self) -> bool:
        own = self._optimizer()
        return own is not None and own.release is self

    # The way of a gradient --------------------------------------------------------------------------------------------

    def arrived(self, p: Tensor) -> None:
        """A gradient is whole: steps its block, and frees it, if it is the last one of it."""
        if not self.attached:
            return
        with self._lock:
            self._expect(p)
            if self._paused or self._of_ddp:
                return
            self._arrived.add(id(p))
            block = self._block_of[id(p)]
            if all(id(q) in self._arrived and q.grad is not None for q in block.params if q.requires_grad):
                self._step(block)
                for q in block.params:
                    q.grad = None

    def arrived_in_bucket(self, params: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """The averaged gradients of a bucket of DDP's, which goes on to look at those that its parameters have."""
        if self._paused or not self.attached:
            return
        with self._lock:
            known = [(p, grad) for p, grad in zip(params, gradients, strict=True) if id(p) in self._places]
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
        """What is left to `optimizer.step()`: parameters that no hook has stepped, and what schedules count."""
        with self._lock:
            self._settings()
            params = self._params()
            for p in params:
                if id(p) in self._stepped:
                    p.grad = None  # DDP leaves it, and so does an exception
            left = [p for p in params if p.grad is not None]
            blocks = [self._block(params)] if self._of_ddp and left else []
            if not self._of_ddp:
                blocks = list({id(own): own for own in (self._block_of[id(p)] for p in left)}.values())
            for block in blocks:
                self._step(block)
            for p in left:
                p.grad = None
            ticks = self._ticks
            for own, key, value in ticks:
                own[key] = value
            self._begin()
            self._listen(params)  # to what was unfrozen, too
            return ticks

    def zero_grad(self) -> None:
        """`optimizer.zero_grad()`: the next gradient begins a round, whatever became of this one."""
        with self._lock:
            if self._stepped and not self._warned:
                self._warned = True
                warn(
                    "zero_grad() comes after a backward pass that has stepped blocks, without optimizer.step(): "
                    "schedules have not counted it. Call optimizer.step() after every backward pass"
                )
            self._begin()

    def _begin(self) -> None:
        self._hypers = None
        self._arrived.clear()
        self._stepped.clear()

    def _settings(self) -> Sequence[Hyper]:
        """The hyperparameters of this round, as the groups had them when it began."""
        if self._hypers is None:
            opt = self._owner()
            if _places(opt) != self._places:
                raise RuntimeError(
                    "the optimizer has other parameters, or has them in other places, than when its gradients were "
                    "released: remove() the release and make another"
                )
            hypers = opt.rule.hypers(opt.param_groups, default=opt.defaults["decay"])
            limited = next((g for g, (own, *_) in enumerate(hypers) if own.max_grad_norm is not None), None)
            if limited is not None:
                raise RuntimeError(f"max_grad_norm in param group {limited}: {RELEASED}")
            self._hypers, self._ticks = stepping.follow(opt.param_groups, hypers)
        return self._hypers

    def _expect(self, p: Tensor) -> None:
        if id(p) in self._stepped:
            raise RuntimeError(
                f"a second gradient of {self._label(p)} has come after it was stepped: call optimizer.step() after "
                "every backward pass, or accumulate: with release.accumulating(), all but the last one"
            )

    def _step(self, block: _Block) -> None:
        """Steps what has a gradient. That it was stepped is written with its count, whatever interrupts it."""
        hypers, opt = self._settings(), self._owner()
        groups = block.groups_of(opt)
        if redistribute_gradients in opt._optimizer_step_pre_hooks.values():
            redistribute(block.params)
        if self._clip_value is not None:
            nn.utils.clip_grad_value_(block.params, self._clip_value)
        if self._clip_block_norm is not None:
            nn.utils.clip_grad_norm_(block.params, self._clip_block_norm)
        ticks = [(self._stepped, id(p), True) for p in block.params if p.grad is not None]
        table = block.table
        with table.lock, plain_tensors(table.sharded):
            opt._refuse_swapped("a gradient is released")
            table.step(groups, opt.state, [hypers[g] for g in block.of_groups], ticks)

    # What there is ----------------------------------------------------------------------------------------------------

    def _owner(self) -> DecoupledOptimizer:
        own = self._optimizer()
        assert own is not None
        return own

    def _params(self) -> list[Tensor]:
        return [p for group in self._owner().param_groups for p in group["params"]]

    def _label(self, p: Tensor) -> str:
        g, k = self._places[id(p)]
        return label(self._owner().param_groups[g], g, k)

    def _listen(self, params: Iterable[Any]) -> None:
        """Hooks of parameters; they hold no release, since the garbage collector does not see what has them."""
        hook = partial(_arrived, weakref.ref(self))
        for p in params:
            if p.requires_grad and id(p) not in self._hooks:
                self._hooks[id(p)] = p.register_post_accumulate_grad_hook(hook)

    def _block(self, params: Sequence[Tensor]) -> _Block:
        """Those parameters as a block, known or new."""
        key = tuple(map(id, params))
        if key not in self._blocks:
            self._blocks[key] = _Block(self._owner(), params, self._places)
            self._blocks[key].table.origins = self._origins
        return self._blocks[key]


class _Block:
    """Parameters that are stepped together: a table, whose groups are what it has of the optimizer's groups."""

    def __init__(self, opt: DecoupledOptimizer, params: Sequence[Tensor], places: dict[int, tuple[int, int]]) -> None:
        self.params = tuple(params)
        self.table = TensorTable(opt.rule, cache(partial(backends.resolve, opt.backend)))
        self.table.references = opt._references
        self.of_groups: dict[int, list[tuple[Tensor, int]]] = {}
        for p in sorted(params, key=lambda p: places[id(p)]):
            g, k = places[id(p)]
            self.of_groups.setdefault(g, []).append((p, k))
        self.groups: list[dict[str, Any]] = [{"params": [p for p, _ in own]} for own in self.of_groups.values()]

    def groups_of(self, opt: DecoupledOptimizer) -> list[dict[str, Any]]:
        """Its parts of the groups, as they are now."""
        for (g, own), group in zip(self.of_groups.items(), self.groups, strict=True):
            live = opt.param_groups[g]
            group.update(live, params=group["params"], **{PLACES: [(g, k) for _, k in own]})
            if "param_names" in live:
                group["param_names"] = [live["param_names"][k] for _, k in own]
        return self.groups


def _places(opt: DecoupledOptimizer) -> dict[int, tuple[int, int]]:
    return {id(p): (g, k) for g, group in enumerate(opt.param_groups) for k, p in enumerate(group["params"])}


def _arrived(release: weakref.ref[GradientRelease], p: Tensor) -> None:
    own = release()
    if own is not None:
        own.arrived(p)


def _released(p: Tensor) -> bool:
    """By an optimizer that is still there?"""
    hooks = getattr(p, "_post_accumulate_grad_hooks", None) or {}
    found = [own.args[0]() for own in hooks.values() if isinstance(own, partial) and own.func is _arrived]
    return any(own is not None and own.attached for own in found)


# DistributedDataParallel ----------------------------------------------------------------------------------------------

#: The release of each model that has been given a hook, which it may be given once.
_releases: weakref.WeakKeyDictionary[nn.Module, weakref.ref[GradientRelease]] = weakref.WeakKeyDictionary()


def _data_parallel(model: nn.Module, blocks: Blocks | None) -> Any:
    """The DDP of a model, compiled or within another one; None where there is none. Raises for what cannot be."""
    fsdp1 = loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    if any(isinstance(m, fsdp1) for m in model.modules()):
        raise TypeError(
            "FullyShardedDataParallel with gradient release: its gradients are there before they are reduced; "
            "allowed is torch.distributed.fsdp.fully_shard"
        )
    found = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(f"the model holds {len(found)} DistributedDataParallel: allowed is one, around all of it")
    if blocks is not None:
        raise ValueError("blocks with a model in DDP: its buckets are the blocks (of bucket_cap_mb=)")
    for name in ("find_unused_parameters", "static_graph"):
        if getattr(found[0], name):
            raise ValueError(
                f"DistributedDataParallel(..., {name}=True) with gradient release: which parameters no rank has used "
                "is known when the backward pass ends; they would be stepped, and decayed, with zeros"
            )
    return found[0]


def _join(ddp: Any, release: GradientRelease) -> None:
    if ddp not in _releases:
        here = weakref.ref(ddp)
        ddp.register_comm_hook(None, lambda state, bucket: _reduce_and_step(here, bucket))
    _releases[ddp] = weakref.ref(release)


def _reduce_and_step(ddp: weakref.ref[Any], bucket: Any) -> torch.futures.Future[Tensor]:
    """DDP's all-reduce of a bucket, and the step when it is done."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook  # not in every build

    model: Any = ddp()
    release = _releases[model]
    own = release()
    if own is not None and own.attached and model._join_config.enable:
        raise RuntimeError("Join with gradient release: ranks without data left would step too; remove() it first")
    params, gradients = bucket.parameters(), bucket.gradients()  # views: the mean is written where they lie

    def step(done: torch.futures.Future[Tensor]) -> Tensor:
        mean, own = done.value(), release()
        if own is not None:
            own.arrived_in_bucket(params, gradients)
        return mean

    return allreduce_hook(model.process_group, bucket).then(step)


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

    given = _default_blocks(model) if blocks is None else [_members(own) for own in blocks]
    found = [take(own) for own in given]
    return [own for own in (*found, *([p] for p in left.values())) if own]


def _members(block: Any) -> list[Tensor]:
    """The parameters of a block. What can be iterated and still is none, a tensor or a name, is an error."""
    if isinstance(block, (str, Tensor)):
        block = [block]
        allowed: Any = ()
    else:
        block, allowed = list(block.parameters() if isinstance(block, nn.Module) else block), Tensor
    for p in block:
        if not isinstance(p, allowed):
            raise TypeError(f"blocks holds a {type(p).__name__}: expected modules, or lists of parameters")
    return list(block)


def _default_blocks(model: nn.Module) -> list[Iterable[Tensor]]:
    wrapped = [m for m in model.modules() if isinstance(m, loaded("torch.distributed.fsdp", "FSDPModule"))]
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
