"""A weight decay from a time scale, and from one training to another: by hand, and by the optimizers' own steps."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import wd_kernels
from wd_kernels import (
    NormalizedDecay,
    convert_weight_decay,
    normalized_weight_decay,
    scaled_weight_decay,
    timescale_of,
    weight_decay_for,
)
from wd_kernels.schedules import Constant, Cosine, Sequential, WarmRestarts, Warmup

MODES = ("lr_scaled", "independent", "proximal")
LAWS = ("timescale", "normalized", "per_step")
RATIOS = st.floats(1 / 64, 64)
LR = 0.02
GUIDE = Path(__file__).parent.parent / "docs" / "weight-decay.md"


def rest(rule: str, steps: int, **options: Any) -> float:
    """What is left of a weight of 1 after `steps` real steps with gradients of 0."""
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = getattr(wd_kernels, rule)([p], lr=LR, **options)
    for _ in range(steps):
        p.grad = torch.zeros_like(p)
        opt.step()
    left: list[float] = p.tolist()
    assert left == [left[0]] * 3
    return left[0]


# A time scale ---------------------------------------------------------------------------------------------------------


def test_worked_by_hand() -> None:
    """AdamW of torch: lr 3e-4, weight decay 0.1: 33,333 steps, of 2,500 each epoch; and the way back."""
    assert timescale_of(weight_decay=0.1, lr=3e-4) == pytest.approx(33_333.33, abs=0.01)
    assert timescale_of(weight_decay=0.1, lr=3e-4, steps_per_epoch=2500) == pytest.approx(13.3333, abs=1e-4)
    assert weight_decay_for(timescale=13.3333333, steps_per_epoch=2500, lr=3e-4) == pytest.approx(0.1)
    assert weight_decay_for(timescale=33_333.33, lr=3e-4, decay="independent") == pytest.approx(3e-5)
    # A linear schedule, whose steps are 1, 3/4, 1/2 and 1/4: 5/8 in the mean. 1 / (5/8 * 0.01 * 400) = 0.4.
    falling = {"schedule": lambda t: 1 - t / 4, "steps": 4}
    assert weight_decay_for(timescale=400, lr=0.01, **falling) == pytest.approx(0.4)
    assert timescale_of(weight_decay=0.4, lr=0.01, **falling) == pytest.approx(400)
    # 1 / (1 + 1/3) keeps 3/4, so a step puts 1/4 of an average anew.
    assert weight_decay_for(timescale=4, decay="proximal") == pytest.approx(1 / 3)
    assert timescale_of(weight_decay=1 / 3, decay="proximal") == pytest.approx(4)
    assert timescale_of(weight_decay=0, decay="proximal") == timescale_of(weight_decay=0, lr=0.1) == math.inf


@pytest.mark.parametrize("rule", ["AdamW", "SGDW", "AdagradW"])
@pytest.mark.parametrize("decay", MODES)
def test_a_weight_is_at_one_over_e_after_its_time_scale(rule: str, decay: Any) -> None:
    """By the optimizer's own steps: (1 - 1/tau)^tau to the last digits, and 1/e to 1/(2 tau)."""
    found = weight_decay_for(timescale=5, steps_per_epoch=40, decay=decay, lr=LR)
    left = rest(rule, 200, weight_decay=found, decay=decay)
    assert left == pytest.approx((1 - 1 / 200) ** 200, rel=1e-12)
    assert left == pytest.approx(1 / math.e, rel=0.003)


@pytest.mark.parametrize("decay", MODES)
@pytest.mark.parametrize(
    "schedule",
    [
        Cosine(600), Sequential(Warmup(100), Cosine(500)), Constant(0.3, steps=600), WarmRestarts(200),
        NormalizedDecay(Cosine(600)),
    ],
    ids=["cosine", "warm-up", "constant", "restarts", "normalised"],
)  # fmt: skip
def test_under_a_schedule_the_whole_run_shrinks_a_weight_so(decay: Any, schedule: Any) -> None:
    """600 steps of a time scale of 300: exp(-2), to higher orders; and not so where the schedule is not told."""
    steps = 600
    own = {"decay": decay, "lr": LR, "steps": steps}
    found = weight_decay_for(timescale=300, schedule=schedule, **own)
    left = rest("AdamW", steps, weight_decay=found, decay=decay, schedule=schedule)
    assert left == pytest.approx(math.exp(-2), rel=0.007)
    assert timescale_of(weight_decay=found, schedule=schedule, **own) == pytest.approx(300)
    blind = weight_decay_for(timescale=300, decay=decay, lr=LR)
    assert rest("AdamW", steps, weight_decay=blind, decay=decay, schedule=schedule) > 1.5 * math.exp(-2)


def test_weights_are_an_average_of_updates_over_the_time_scale() -> None:
    """What a step puts in is e times less after a time scale: of two runs that differ in one gradient of plain SGD."""
    paths = []
    for kick in (0.0, 1.0):
        p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        opt = wd_kernels.SGDW([p], lr=LR, weight_decay=weight_decay_for(timescale=100, lr=LR), decay="lr_scaled")
        for t in range(101):
            p.grad = torch.full_like(p, kick if t == 0 else 0.5)
            opt.step()
            if t in (0, 100):
                paths.append(float(p.detach()))
    after = paths[0] - paths[2], paths[1] - paths[3]
    assert after[1] / after[0] == pytest.approx(0.99**100, rel=1e-9)


def test_l2_of_sgd_by_way_of_a_conversion() -> None:
    """What the errors point to, 'lr_scaled' first, then convert_weight_decay: the rate in the long run."""
    linear = weight_decay_for(timescale=500, lr=LR)
    l2 = convert_weight_decay(linear, "lr_scaled", "l2", lr=LR, rule="sgdw", momentum=0.9).weight_decay
    assert l2 == pytest.approx(linear * 0.1, rel=0.02)
    early, late = (rest("SGDW", n, weight_decay=l2, decay="l2", momentum=0.9) for n in (500, 1000))
    assert late / early == pytest.approx((1 - 1 / 500) ** 500, rel=1e-6)


@given(tau=st.floats(2, 1e6), per_epoch=st.floats(1, 1e4), lr=st.floats(1e-6, 1), decay=st.sampled_from(MODES))
def test_there_and_back(tau: float, per_epoch: float, lr: float, decay: Any) -> None:
    own: dict[str, Any] = {"decay": decay, "lr": lr, "steps_per_epoch": per_epoch, "schedule": Warmup(9), "steps": 20}
    found = weight_decay_for(timescale=tau, **own)
    assert timescale_of(weight_decay=found, **own) == pytest.approx(tau, rel=1e-9)


@given(tau=st.floats(2, 1e6), lr=st.floats(1e-6, 1))
def test_modes_agree_as_conversions_do(tau: float, lr: float) -> None:
    """One time scale in two modes is what convert_weight_decay makes of one in the other."""
    found = {mode: weight_decay_for(timescale=tau, decay=mode, lr=lr) for mode in MODES}  # type: ignore[arg-type]
    for source in MODES:
        for target in MODES:
            converted = convert_weight_decay(found[source], source, target, lr=lr)  # type: ignore[arg-type]
            assert converted.exact
            assert converted.weight_decay == pytest.approx(found[target], rel=1e-9)


# From one training to another -----------------------------------------------------------------------------------------


def test_laws_worked_by_hand() -> None:
    """CIFAR-10 to eight times its data, with four times the batch, twice the lr and half the epochs."""
    grown: Any = {"batch_size": 4, "dataset_size": 8, "epochs": 0.5}
    assert scaled_weight_decay(0.2, law="timescale", lr=2, **grown) == pytest.approx(0.2 * 4 / 8 / 2)
    assert scaled_weight_decay(0.2, law="normalized", lr=2, **grown) == pytest.approx(0.2 * math.sqrt(4 / 4) / 2)
    assert scaled_weight_decay(0.2, law="per_step", lr=2, **grown) == pytest.approx(0.1)
    independent: Any = {"decay": "independent", "lr": 2, **grown}  # does not follow the lr
    assert [scaled_weight_decay(1e-3, law=law, **independent) for law in ("timescale", "normalized", "per_step")] == (
        pytest.approx([5e-4, 1e-3, 1e-3])
    )
    # muP: 16 times the width, so 1/16 of the lr: 16 times lr_scaled's, the same independent one.
    assert scaled_weight_decay(0.1, law="timescale", lr=1 / 16) == pytest.approx(1.6)
    assert scaled_weight_decay(1e-4, law="per_step", lr=1 / 16, decay="independent") == 1e-4
    # A proximal 1/3 takes 1/4 off; half as much data, half the time scale: 1/2, which is a proximal 1.
    assert scaled_weight_decay(1 / 3, law="timescale", dataset_size=0.5, decay="proximal") == pytest.approx(1)


@given(b=RATIOS, size=RATIOS, epochs=RATIOS, lr=RATIOS, decay=st.sampled_from(MODES))
def test_what_a_law_keeps_is_kept(b: float, size: float, epochs: float, lr: float, decay: Any) -> None:
    """The time scale in epochs, in steps; the paper's normalised weight decay: by the functions that know these."""
    grown: Any = {"batch_size": b, "dataset_size": size, "epochs": epochs, "lr": lr}
    old, alpha = 1e-6, 0.01
    if decay == "lr_scaled":
        old /= alpha
    found = {law: scaled_weight_decay(old, law=law, decay=decay, **grown) for law in ("timescale", "per_step")}

    def tau(weight_decay: float, lr: float, per_epoch: float) -> float:
        return timescale_of(weight_decay=weight_decay, decay=decay, lr=lr, steps_per_epoch=per_epoch)

    assert tau(found["timescale"], alpha * lr, 50 * size / b) == pytest.approx(tau(old, alpha, 50), rel=1e-9)
    assert tau(found["per_step"], alpha * lr, 1) == pytest.approx(tau(old, alpha, 1), rel=1e-9)
    normal = scaled_weight_decay(1e-6, law="normalized", decay="independent", **grown)
    before, after = (
        normalized_weight_decay(1, 128, 5e4, 100),
        normalized_weight_decay(1, 128 * b, 5e4 * size, 100 * epochs),
    )
    assert normal / 1e-6 == pytest.approx(after / before, rel=1e-9)


@given(
    law=st.sampled_from(LAWS), decay=st.sampled_from(MODES), b=RATIOS, size=RATIOS, epochs=RATIOS, lr=RATIOS,
    weight_decay=st.floats(0, 1e-5),
)  # fmt: skip
def test_scaling_there_and_back_gives_the_same(
    law: Any, decay: Any, b: float, size: float, epochs: float, lr: float, weight_decay: float
) -> None:
    there = scaled_weight_decay(
        weight_decay, law=law, decay=decay, batch_size=b, dataset_size=size, epochs=epochs, lr=lr
    )
    back = scaled_weight_decay(
        there, law=law, decay=decay, batch_size=1 / b, dataset_size=1 / size, epochs=1 / epochs, lr=1 / lr
    )
    assert back == pytest.approx(weight_decay, rel=1e-9, abs=1e-300)


def test_a_real_run_of_more_data_forgets_as_many_epochs_back() -> None:
    """Tuned at 20 steps an epoch; at 80, with half the lr, a weight is at 1/e after as many epochs."""
    for decay in MODES:
        own: Any = {"decay": decay}
        tuned = weight_decay_for(timescale=5, steps_per_epoch=20, lr=2 * LR, **own)
        grown = scaled_weight_decay(tuned, law="timescale", dataset_size=8, batch_size=2, lr=0.5, **own)
        assert rest("AdamW", 5 * 80, weight_decay=grown, **own) == pytest.approx(1 / math.e, rel=0.002)


# The guide ------------------------------------------------------------------------------------------------------------


def test_the_guide_s_examples_give_what_they_say() -> None:
    """docs/weight-decay.md: every block runs, and a line with a number in its comment gives that number."""
    names: dict[str, Any] = {}
    checked = 0
    for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        exec(block, names)
        for line in block.splitlines():
            code, _, comment = line.partition("  # ")
            if found := re.match(r"[\d.]+", comment):
                assert eval(code, names) == pytest.approx(float(found[0]), rel=1e-4), line
                checked += 1
    assert checked == 12


def test_the_guide_s_table_is_what_the_laws_do() -> None:
    """Each row and law of "k times", for k = 4, with `independent`."""
    lines = GUIDE.read_text().splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("| k times"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first : first + 9]]
    laws = [cell.strip('`"') for cell in rows[0][1:]]
    grown: dict[str, Any] = {
        "the batch": {"batch_size": 4}, "the data": {"dataset_size": 4}, "the epochs": {"epochs": 4},
        "the lr": {"lr": 4}, "the width, lr kept": {}, "the width under muP": {"lr": 1 / 4},
    }  # fmt: skip
    said = {"k λ": 4.0, "√k λ": 2.0, "λ": 1.0, "λ/√k": 0.5, "λ/k": 0.25}
    assert {row[0] for row in rows[3:]} == set(grown)
    for what, *cells in rows[3:]:
        for law, cell in zip(laws, cells, strict=True):
            found = scaled_weight_decay(1e-3, law=law, decay="independent", **grown[what])  # type: ignore[arg-type]
            assert found == pytest.approx(1e-3 * said[cell]), (what, law)


# Errors ---------------------------------------------------------------------------------------------------------------


FOR, OF, SCALED = weight_decay_for, timescale_of, scaled_weight_decay


@pytest.mark.parametrize(
    ("function", "arguments", "kind", "message"),
    [
        (FOR, {"timescale": 0, "lr": 1}, ValueError, r"timescale=0 in weight_decay_for: allowed are .* > 0"),
        (FOR, {"timescale": math.inf, "lr": 1}, ValueError, "timescale=inf in weight_decay_for"),
        (FOR, {"timescale": "long", "lr": 1}, TypeError, "timescale='long' in weight_decay_for"),
        (FOR, {"timescale": 9}, TypeError, r"lr=None in weight_decay_for: expected a number, which 'lr_s"),
        (FOR, {"timescale": 9, "lr": -1}, ValueError, r"lr=-1\.0 in weight_decay_for"),
        (FOR, {"timescale": 9, "lr": 0}, ValueError, "lr=0 in weight_decay_for: allowed are .* > 0"),
        (FOR, {"timescale": 9, "lr": 1, "steps_per_epoch": 0}, ValueError, "steps_per_epoch=0"),
        (FOR, {"timescale": 9, "lr": 1, "schedule": Constant()}, ValueError, "steps=None in weight_decay_for"),
        (FOR, {"timescale": 9, "lr": 1, "schedule": 3}, TypeError, "schedule=3 in weight_decay_for"),
        (FOR, {"timescale": 1, "lr": 1}, ValueError, r"timescale=1 in weight_decay_for is 1 steps"),
        (FOR, {"timescale": 1, "decay": "proximal"}, ValueError, "with 'proximal' a step would take all"),
        (FOR, {"timescale": 1.9, "lr": 1, "schedule": Cosine(99)}, ValueError, r"is 1\.9 steps"),
        (FOR, {"timescale": 9, "lr": 1, "decay": "l2"}, ValueError, r"'l2'.*gradients.*convert_weight_decay"),
        (OF, {"weight_decay": 1, "lr": 1, "decay": "metric_proximal"}, ValueError, "in timescale_of: allowed"),
        (OF, {"weight_decay": 1, "lr": 1, "decay": "L2"}, ValueError, r"decay='L2' .*'corrected'$"),
        (OF, {"weight_decay": -1, "lr": 1}, ValueError, r"weight_decay=-1\.0 in timescale_of"),
        (SCALED, {"law": "linear"}, ValueError, "law='linear' in scaled_weight_decay: allowed are 'timescale'"),
        (SCALED, {"law": "per_step", "decay": "l2"}, ValueError, "decay='l2' in scaled_weight_decay"),
        (SCALED, {"law": "per_step", "lr": 0}, ValueError, "lr=0 in scaled_weight_decay"),
        (SCALED, {"law": "per_step", "epochs": 0}, ValueError, "epochs=0 in scaled_weight_decay"),
        (SCALED, {"law": "per_step", "batch_size": None}, TypeError, "batch_size=None in scaled_weight_decay"),
        (
            SCALED, {"law": "timescale", "decay": "independent", "batch_size": 10}, ValueError,
            "weight_decay=0.1 in scaled_weight_decay becomes 1 of a weight in one step",
        ),
    ],
)  # fmt: skip
def test_errors_name_the_argument(
    function: Any, arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    values = (0.1,) if function is SCALED else ()
    with pytest.raises(kind, match=message):
        function(*values, **arguments)
