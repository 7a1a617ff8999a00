"""Schedules by themselves: their formulas, compositions, and how they are drawn."""

from __future__ import annotations

import copy
import math
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from wd_kernels import NormalizedDecay, normalized_weight_decay, schedules
from wd_kernels.schedules import (
    Constant,
    Cosine,
    Product,
    Sequential,
    StepDrop,
    WarmRestarts,
    Warmup,
    WarmupStableDecay,
)

#: One of each kind, with its first values worked by hand.
WORKED: list[tuple[Callable[[int], float], list[float]]] = [
    (Constant(), [1, 1, 1]),
    (Constant(0.25, steps=2), [0.25, 0.25, 0.25]),
    (StepDrop((1, 3), 0.5), [1, 0.5, 0.5, 0.25, 0.25]),
    (Warmup(4), [0.25, 0.5, 0.75, 1, 1]),
    (Warmup(2, start=0.5), [0.75, 1, 1]),
    (Cosine(2), [1, 0.5, 0, 0]),
    (Cosine(4, end=0.5), [1, 0.5 + 0.25 * (1 + math.sqrt(0.5)), 0.75, 0.5 + 0.25 * (1 - math.sqrt(0.5)), 0.5, 0.5]),
    (WarmRestarts(2), [1, 0.5, 1, 0.5, 1]),
    (WarmRestarts(1, mult=2), [1, 1, 0.5, 1, 0.5 * (1 + math.sqrt(0.5)), 0.5, 0.5 * (1 - math.sqrt(0.5)), 1]),
    (WarmRestarts(2, end=0.2), [1, 0.6, 1]),
    (WarmupStableDecay(2, 1, 2), [0.5, 1, 1, 1, 0.5, 0, 0]),
    (WarmupStableDecay(0, 0, 4, "1-sqrt"), [1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0]),
    (WarmupStableDecay(1, 0, 2, "cosine", end=0.5), [1, 1, 0.75, 0.5]),
    (Sequential(Warmup(2), Constant(0.5, steps=1), Cosine(2)), [0.5, 1, 0.5, 1, 0.5, 0, 0]),
    (Sequential(lambda t: 2.0 + t), [2, 3, 4]),
    (Product(WarmRestarts(2), Warmup(4)), [0.25, 0.25, 0.75, 0.5, 1]),
    (NormalizedDecay(Cosine(2)), [1, 0.5, 0]),
]  # fmt: skip


def test_numbers_of_any_kind() -> None:
    """numpy's are taken, and kept as Python's."""
    assert repr(Cosine(np.int64(10), end=np.float32(0.5))) == "Cosine(steps=10, end=0.5)"
    assert StepDrop(np.array([3, 6]), factor=1).milestones == (3, 6)
    assert normalized_weight_decay(np.float64(0.5), np.int64(100), 1000, 10) == 0.05
    with pytest.raises(ValueError, match="steps=True of Cosine"):
        Cosine(True)


# Formulas -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "worked"), WORKED, ids=lambda x: type(x).__name__ if callable(x) else "")
def test_worked_by_hand(schedule: Callable[[int], float], worked: list[float]) -> None:
    assert [schedule(t) for t in range(len(worked))] == pytest.approx(worked, abs=1e-15)


def torchs(make: Callable[[Any], Any], steps: int) -> list[float]:
    """The lr of each step under one of torch's schedulers, with a first lr of 1."""
    opt = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler, found = make(opt), []
    for _ in range(steps):
        found.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Cosine(30, end=0.1), lambda opt: lr_scheduler.CosineAnnealingLR(opt, 30, eta_min=0.1)),
        (WarmRestarts(3, 2, end=0.05), lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3, 2, eta_min=0.05)),
        (WarmRestarts(7), lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 7)),
        (StepDrop((4, 9, 20), 0.3), lambda opt: lr_scheduler.MultiStepLR(opt, [4, 9, 20], 0.3)),
        (Constant(), lambda opt: lr_scheduler.ConstantLR(opt, 1.0, 5)),
        # torch's n-th value is that of n - 1 of n steps: one step less makes them the same
        (Warmup(8, start=0.0), lambda opt: lr_scheduler.LinearLR(opt, 1 / 8, 1.0, 7)),
        (
            Sequential(StepDrop((2,), 0.5, steps=5), Cosine(25)),
            lambda opt: lr_scheduler.SequentialLR(
                opt, [lr_scheduler.MultiStepLR(opt, [2], 0.5), lr_scheduler.CosineAnnealingLR(opt, 25)], [5]
            ),
        ),
    ],
    ids=["cosine", "restarts", "restarts-1", "drop", "constant", "warmup", "sequential"],
)
@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_as_torchs_schedulers(ours: Callable[[int], float], theirs: Callable[[Any], Any]) -> None:
    assert [ours(t) for t in range(30)] == pytest.approx(torchs(theirs, 30), abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(period=st.integers(1, 9), mult=st.integers(1, 3), t=st.integers(0, 2000))
def test_restarts_are_where_the_periods_end(period: int, mult: int, t: int) -> None:
    """T_cur and T_i against the sum of the periods, one by one."""
    first, length = 0, period
    while t >= first + length:
        first, length = first + length, length * mult
    assert WarmRestarts(period, mult).where(t) == (t - first, length)
    eta = WarmRestarts(period, mult)(t)
    assert eta == 0.5 * (1 + math.cos(math.pi * ((t - first) / length)))
    assert (eta == 1.0) == (t == first)


parts = st.one_of(
    st.builds(Warmup, st.integers(1, 6)),
    st.builds(Cosine, st.integers(1, 6), st.sampled_from([0.0, 0.25])),
    st.builds(Constant, st.sampled_from([0.5, 1.0]), st.integers(1, 6)),
    st.builds(WarmupStableDecay, st.integers(0, 3), st.integers(0, 3), st.integers(1, 3)),
)


@settings(max_examples=200, deadline=None)
@given(own=st.lists(parts, min_size=1, max_size=4), factor=parts, period=st.integers(1, 4))
def test_compositions(own: list[Any], factor: Any, period: int) -> None:
    """One after another is the concatenation, times another the product; the period counts what led to it."""
    joined = [part(t) for part in own for t in range(part.steps)]
    whole = Sequential(*own)
    assert whole.steps == len(joined)
    assert [whole(t) for t in range(len(joined))] == joined
    assert whole(len(joined) + 5) == own[-1](own[-1].steps + 5)
    assert [Product(whole, factor)(t) for t in range(len(joined))] == [x * factor(t) for t, x in enumerate(joined)]
    assert [whole.where(t) for t in range(len(joined) + 3)] == [
        (min(t, len(joined)), len(joined)) for t in range(len(joined) + 3)
    ]
    ends = [factor.steps, *(part.steps for part in own)]
    assert Product(factor, *own).steps == max(ends)
    restarting = Sequential(*own, WarmRestarts(period, 2))
    for product in (Product(factor, restarting), Product(restarting, factor)):  # in whatever order they are written
        assert product.steps is None
        assert [product.where(t) for t in range(50)] == [restarting.where(t) for t in range(50)]
    lead = len(joined)
    expected = [(t, lead + period) for t in range(lead + period)] + [(t, 2 * period) for t in range(2 * period)]
    assert [restarting.where(t) for t in range(lead + 3 * period)] == expected
    assert restarting.steps is None
    assert pickle.loads(pickle.dumps(restarting)) == restarting
    assert eval(repr(restarting), vars(schedules)) == restarting
    assert hash(copy.deepcopy(restarting)) == hash(restarting)


# Drawing --------------------------------------------------------------------------------------------------------------


def test_plot(tmp_path: Path) -> None:
    """The numbers of the curves are those of the schedules; a second panel shows what happens to the decay."""
    drawn = {"AdamWR": NormalizedDecay(WarmRestarts(4, 2)), "cosine": Cosine(28)}
    figure = schedules.plot(drawn, path=tmp_path / "plot.png")
    left, right = figure.axes
    assert [line.get_label() for line in left.lines] == ["AdamWR", "cosine"]
    for line, schedule in zip(left.lines, drawn.values(), strict=True):
        assert list(line.get_ydata()) == [schedule(t) for t in range(28)]
    (line,) = right.lines
    assert list(line.get_ydata()) == [0.5] * 4 + [1 / math.sqrt(8)] * 8 + [0.25] * 16
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = schedules.plot(math.exp, steps=3).axes
    assert axes.lines[0].get_label() == "exp"
    for drawn, message in (
        (WarmRestarts(3), "no end in WarmRestarts(period=3, mult=1, end=0.0)"),
        ({}, "no end in an empty dict"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            schedules.plot(drawn)
    with pytest.raises(ValueError, match="steps=0 in plot: allowed"):
        schedules.plot(Cosine(3), steps=0)
    with pytest.raises(TypeError, match=r"Cosine=.* in plot: expected a schedule"):
        schedules.plot(Cosine)


def test_plot_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        schedules.plot(Cosine(3))
