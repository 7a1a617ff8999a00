"""Flat optimizers beside those of the reference on ordinary copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from bits import assert_same_optimizers
from semantics import build, parameters, plain
from torch import Tensor, nn

from wd_kernels import flatten_, native
from wd_kernels.flat import buffers as flat
from wd_kernels.flat import place_of
from wd_kernels.layout import Moving

SHAPES = ((4, 4), (7, 5), (33,), (), (2, 3, 2, 3), (1,), (129,))
ALIKE = ((16,),) * 5


def fill(params: Sequence[Tensor], seed: int) -> None:
    """New values in the gradients that are there, which stay the tensors that they are."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        values = torch.randn(p.shape, generator=generator, dtype=torch.complex64 if p.is_complex() else torch.float32)
        if p.grad is not None:
            p.grad.copy_(values)


class Pair:
    """A flat optimizer, and one of the reference on ordinary copies; both are given the same, and must show the same.

    Args:
        split: which group each parameter is in.
    """

    def __init__(
        self, rule: str, params: Sequence[nn.Parameter] | None = None, split: Sequence[int] = (), backend: str = "auto",
        **options: Any,
    ) -> None:  # fmt: skip
        self.params = list(parameters(SHAPES) if params is None else params)
        self.twins = [nn.Parameter(plain(p)) for p in self.params]
        self.buffers = flatten_(self.params)
        self.rule, split = rule, split or [0] * len(self.params)
        self.opt, self.twin = (
            build(
                rule,
                [{"params": [p for p, g in zip(own, split, strict=True) if g == k]} for k in range(max(split) + 1)],
                backend=chosen,
                **options,
            )
            for own, chosen in ((self.params, backend), (self.twins, "reference"))
        )

    def step(self, seed: int, runs: int | None = None, new: bool = True) -> None:
        """One step of both. Gradients that the flat one has get new values, the other copies of them."""
        if new:
            fill(self.params, seed)
        for p, q in zip(self.params, self.twins, strict=True):
            q.grad = None if p.grad is None else plain(p.grad).to(q.dtype)
        for opt in (self.opt, self.twin):
            for g, group in enumerate(opt.param_groups):
                group["lr"] = 0.05 / (1 + seed % 7 + 2 * g)
        before = [(p._version, p.grad is not None, plain(p)) for p in self.params]
        self.opt.step()
        self.twin.step()
        assert_same_optimizers(self.opt, self.twin, f"step {seed}")
        for p, (version, on, old) in zip(self.params, before, strict=True):
            assert (p._version > version) == on
            if p.numel() > 3 and on:
                assert not torch.equal(p, old)
        if runs is not None:
            assert_runs(self.opt, runs)

    def both(self) -> tuple[tuple[Any, list[Any]], tuple[Any, list[Any]]]:
        return (self.opt, self.params), (self.twin, self.twins)


def count_runs(opt: Any) -> int:
    """How many pieces the launches of the last step had."""
    return int((opt._table.segments.moving[:, Moving.NUMEL] != 0).sum())


def assert_runs(opt: Any, runs: int) -> None:
    """Fails unless the launches of the last step had so many pieces; native code alone makes one of neighbours."""
    if native.C is not None:
        assert count_runs(opt) == runs


def attached(p: Tensor) -> bool:
    place = place_of(p)
    return place is not None and p.grad is not None and flat.attached(p)


def swap_states(opt: Any, params: Sequence[Tensor]) -> None:
    for p in params[1:4]:
        for name, value in opt.state[p].items():
            if name != "step":
                value.data = value.data.clone()
