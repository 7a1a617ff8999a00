"""What loggers see of a schedule, how it is called, where it begins after loading; base_lr beside torch's."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from saving import through_file
from semantics import build, parameters, set_gradients
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler
from training import BUILD, small

import wd_kernels
from wd_kernels import AdamW, NormalizedDecay
from wd_kernels.schedules import Cosine, PublishedRestarts, ScheduledLR, Sequential, WarmRestarts, Warmup

every = pytest.mark.parametrize("rule", ["adamw", "sgdw", "adagradw"])


# What loggers see -----------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("decay", ["lr_scaled", "independent"])
def test_group_lr_shows_the_schedule(rule: str, decay: str) -> None:
    """`show_lr`: Lightning's monitor and timm read group["lr"]. The steps have the same bits; also after a resume."""
    schedule = Sequential(Warmup(3), Cosine(6))
    sets = [parameters() for _ in range(3)]
    plain, shown, resumed = (
        build(rule, params, decay=decay, schedule=schedule, show_lr=show)
        for params, show in zip(sets, (False, True, True), strict=True)
    )
    assert [shown.param_groups[0][key] for key in ("lr", "base_lr")] == [0.05, 0.05]
    seen = []
    for t in range(9):
        for params, opt in zip(sets, (plain, shown, resumed), strict=True):
            set_gradients(params, t)
            opt.step()
        seen.append(shown.param_groups[0]["lr"])
        if t == 4:
            fresh = build(rule, sets[2], decay=decay, schedule=schedule, show_lr=True, lr=7.0)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                fresh.load_state_dict(through_file(resumed.state_dict()))
            resumed = fresh
    assert seen == [schedule(t) * 0.05 for t in range(9)]
    assert plain.param_groups[0]["lr"] == 0.05
    for p, q, r in zip(*sets, strict=True):
        assert_same_bits(p, q)
        assert_same_bits(p, r)


def test_shown_and_unshown_states_exchange() -> None:
    """The lr of a state that shows it is not taken for the first one, and the other way round."""
    for saved_shows, live_shows in ((True, False), (False, True), (True, True)):
        saved = small("adamw", schedule=Cosine(8), show_lr=saved_shows)
        live = small("adamw", schedule=Cosine(8), show_lr=live_shows, lr=3.0)
        for _ in range(4):
            saved.step()
        live.load_state_dict(saved.state_dict())
        if live_shows and saved_shows:
            assert live.param_groups[0]["lr"] == saved.param_groups[0]["lr"] == 0.1 * Cosine(8)(3)
        for opt in (saved, live):
            opt.param_groups[0]["params"][0].data.fill_(1.0)
            opt.step()
        assert_same_bits(saved.param_groups[0]["params"][0], live.param_groups[0]["params"][0])
        if live_shows:
            assert live.param_groups[0]["lr"] == 0.1 * Cosine(8)(4)
    follower = small("adamw", schedule="from_lr")
    with pytest.warns(UserWarning, match="goes on with schedule=from_lr"):
        follower.load_state_dict(small("adamw", schedule=Cosine(8), show_lr=True).state_dict())
    assert follower.param_groups[0]["base_lr"] == 0.1


def test_a_shown_lr_is_not_set() -> None:
    """By an LR scheduler, say: an error, before anything is written. 0 freezes, as torch's checkpoints want it."""
    opt = small("adamw", schedule=Warmup(4), show_lr=True)
    opt.step()
    before = opt.param_groups[0]["params"][0].detach().clone()
    shown, opt.param_groups[0]["lr"] = opt.param_groups[0]["lr"], 0.0
    opt.step()
    assert_same_bits(opt.param_groups[0]["params"][0], before)
    opt.param_groups[0]["lr"] = 0.07
    with pytest.raises(
        ValueError, match=r"lr=0.07 in param group 0 with show_lr=True.* base_lr=0.1: it is set by something"
    ):
        opt.step()
    opt.param_groups[0]["lr"] = shown
    opt.step()
    assert opt.param_groups[0]["schedule_step"] == 2  # the step at lr 0 moved nothing, and did not count
    opt.param_groups[0].update(lr=0.2, base_lr=0.2)
    opt.step()
    for options, message in (
        ({"show_lr": True}, "show_lr=True in the arguments with schedule=None"),
        ({"show_lr": True, "schedule": "from_lr"}, "show_lr=True in the arguments with schedule='from_lr'"),
        ({"show_lr": 3, "schedule": Warmup(3)}, "show_lr=3 in the arguments: expected True or False"),
        ({"show_lr": True, "schedule": Warmup(3), "lr": torch.tensor(0.1)}, "with show_lr=True, which writes it"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            small("adamw", **options)


def test_a_scheduler_that_moves_nothing() -> None:
    """ScheduledLR, for trainers that log what an LR scheduler says: it says eta * lr, and the bits are the same."""
    params, others = parameters(), parameters()
    opt, plain = (build("sgdw", own, schedule=Cosine(5), decay="independent") for own in (params, others))
    shown = ScheduledLR(opt)
    said = []
    for t in range(5):
        for own, o in ((params, opt), (others, plain)):
            set_gradients(own, t)
            o.step()
        shown.step()
        said += shown.get_last_lr()
    assert said == [0.05 * Cosine(5)(t) for t in range(5)]
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p, q)
    shown.load_state_dict(shown.state_dict())
    assert ScheduledLR(torch.optim.SGD(params, lr=0.25)).get_last_lr() == [0.25]


@pytest.mark.parametrize("moves", [True, False])
def test_an_lr_scheduler_beside_a_schedule(moves: bool) -> None:
    """Both are multiplied: said once, at the caller's line, when it moves lr."""
    opt = small("adamw", {}, {"schedule": None}, schedule=Cosine(20))
    theirs = lr_scheduler.LambdaLR(opt, lambda t: 0.9**t if moves else 1.0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(4):
            opt.step()
            theirs.step()
    said = [
        own for own in seen if "an LR scheduler moves lr in param group 0 beside schedule=Cosine" in str(own.message)
    ]
    assert len(said) == moves
    assert {own.filename for own in said} <= {__file__}


# How schedules are called ---------------------------------------------------------------------------------------------


def half(t: int) -> float:
    return 0.5


def power(base: float, t: int) -> float:
    return base**t


class Callable_:
    def __init__(self, base: float) -> None:
        self.base = base

    def __call__(self, t: int) -> float:
        return self.base**t

    def method(self, t: int) -> float:
        return self.base**t


def closure(base: float) -> Callable[[int], float]:
    return lambda t: base**t


def saved_name(schedule: Any) -> str:
    name = small("adamw", schedule=schedule).state_dict()["param_groups"][0]["schedule"]
    assert isinstance(name, str)
    return name


SAME: list[Callable[[], Any]] = [
    lambda: half, lambda: partial(power, 0.5), lambda: Callable_(0.5), lambda: Callable_(0.5).method,
    lambda: closure(0.5), lambda: (lambda t: 1 / (1 + t)), lambda: Sequential(Warmup(2), partial(power, 0.5)),
    lambda: Sequential(Warmup(2), Callable_(0.5)), lambda: NormalizedDecay(WarmRestarts(3)),
]  # fmt: skip
OTHERS: list[tuple[Any, Any]] = [
    (lambda t: 1.0, lambda t: 0.5), (lambda t: t + 1, lambda t: t - 1), (closure(0.5), closure(0.25)),
    (partial(power, 0.5), partial(power, 0.25)), (half, lambda t: 0.5), (Cosine(3), Cosine(4)),
    (Sequential(Warmup(2), partial(power, 0.5)), Sequential(Warmup(2), partial(power, 0.25))),
]  # fmt: skip


@pytest.mark.parametrize("make", SAME, ids=range(len(SAME)))
def test_the_same_schedule_has_the_same_name(make: Callable[[], Any]) -> None:
    """Without addresses: two processes write the same file, and a resume is quiet."""
    first, second = make(), make()
    assert saved_name(first) == saved_name(second)
    assert "0x" not in saved_name(first)
    opt = small("adamw", schedule=first)
    opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small("adamw", schedule=second).load_state_dict(opt.state_dict())


def test_what_a_function_changes_is_not_in_its_name() -> None:
    """Nor are thousands of numbers that it has captured."""

    def counting() -> Callable[[int], float]:
        calls, table = 0, tuple(range(10_000))

        def eta(t: int) -> float:
            nonlocal calls
            calls += 1
            return 1.0 if table else 0.0

        return eta

    first, second = counting(), counting()
    first(0)
    assert saved_name(first) == saved_name(second)
    assert len(saved_name(first)) < 200


@pytest.mark.parametrize(("a", "b"), OTHERS)
def test_another_schedule_has_another_name(a: Any, b: Any) -> None:
    assert saved_name(a) != saved_name(b)
    opt = small("adamw", schedule=a)
    opt.step()
    with pytest.warns(UserWarning, match="this optimizer goes on with schedule="):
        small("adamw", schedule=b).load_state_dict(opt.state_dict())


def test_names_of_other_pythons_and_versions() -> None:
    """A lambda's code is that of one Python; version 0.1 wrote addresses, and functions without what they captured."""
    schedule = closure(0.5)
    opt = small("adamw", schedule=schedule)
    opt.step()
    saved = opt.state_dict()
    name = saved["param_groups"][0]["schedule"]
    code = name[name.index("#") : name.index("(")]
    for old in (
        name.replace(code, "#3.9-01234567"), schedule.__qualname__, "<__main__.Own object at 0x7f0123456789>",
    ):  # fmt: skip
        saved["param_groups"][0]["schedule"] = old
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            small("adamw", schedule=schedule).load_state_dict(saved)


@pytest.mark.slow
def test_names_are_those_of_other_processes() -> None:
    program = (
        "import functools\nfrom wd_kernels.schedules.shapes import named\ndef f(a, t): return a\n"
        "class C:\n  def __call__(self, t): return 1.0\n"
        "print([named(s) for s in (functools.partial(f, 2), C(), lambda t: 2 * t, C().__call__)])"
    )
    found = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(found) == 1


# Where a schedule begins after loading --------------------------------------------------------------------------------


def scheduled_from(saved: dict[str, Any], schedule_step: int | None = None) -> Any:
    opt = small("adamw", schedule=Cosine(10), decay="lr_scaled")
    if schedule_step is not None:
        opt.param_groups[0]["schedule_step"] = schedule_step
    opt.load_state_dict(saved)
    return opt


def test_one_rule_for_the_count() -> None:
    """What was counted is loaded. What was not leaves the live count: said, with the number, where that is 0."""
    unscheduled = small("adamw", decay="lr_scaled")
    of_torch = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])
    for opt in (unscheduled, of_torch):
        for _ in range(3):
            opt.param_groups[0]["params"][0].grad = torch.ones(1)
            opt.step()
        with pytest.warns(UserWarning, match=r"no schedule, 3 steps by its states.*set group\['schedule_step'\] = 3"):
            assert scheduled_from(opt.state_dict()).param_groups[0]["schedule_step"] == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert scheduled_from(opt.state_dict(), 3).param_groups[0]["schedule_step"] == 3
    counted = small("adamw", schedule=Cosine(10), decay="lr_scaled")
    for _ in range(4):
        counted.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scheduled_from(counted.state_dict(), 7).param_groups[0]["schedule_step"] == 4
        assert scheduled_from(small("adamw", decay="lr_scaled").state_dict()).param_groups[0]["schedule_step"] == 0


def test_torchs_distributed_checkpoints_do_not_count() -> None:
    """They make the states that they fill by a step at lr 0: a count that was set stays, and 0 is said."""
    saved = torch.optim.AdamW(nn.Linear(3, 2).parameters(), lr=0.1)
    for p in saved.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    saved.step()
    for count in (0, 1000):
        model = nn.Linear(3, 2)
        opt = AdamW(model.parameters(), lr=0.1, schedule=Cosine(2000))
        opt.param_groups[0]["schedule_step"] = count
        state = get_optimizer_state_dict(model, opt)
        assert opt.param_groups[0]["schedule_step"] == count
        names = ["weight", "bias"]
        given = saved.state_dict()
        state["state"] = {name: given["state"][k] for k, name in enumerate(names)}
        state["param_groups"] = [{**given["param_groups"][0], "params": names}]
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            set_optimizer_state_dict(model, opt, state)
        assert opt.param_groups[0]["schedule_step"] == count
        assert len([own for own in seen if "has followed no schedule" in str(own.message)]) == (count == 0)


# base_lr and torch's initial_lr ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["adamw", "sgdw"])
def test_a_state_of_torch_with_its_initial_lr(rule: str) -> None:
    """eta is what the LR scheduler has made of it there: 1/2, not 5."""
    w = torch.nn.Parameter(torch.ones(1))
    theirs: Any = {"adamw": torch.optim.AdamW, "sgdw": torch.optim.SGD}[rule]([w], lr=1e-2, weight_decay=0.0)
    lr_scheduler.LambdaLR(theirs, lambda t: 0.5)
    assert theirs.param_groups[0]["lr"] == 5e-3
    opt = BUILD[rule]([w], lr=1e-3, decay="independent", weight_decay=0.0, schedule="from_lr")
    opt.load_state_dict(theirs.state_dict())
    assert [opt.param_groups[0][key] for key in ("lr", "base_lr")] == [5e-3, 1e-2]
    opt.param_groups[0]["weight_decay"] = 0.2
    w.grad = torch.zeros(1)
    opt.step()
    assert w.item() == pytest.approx(1 - 0.5 * 0.2)


def test_a_state_without_a_first_lr_is_said() -> None:
    theirs = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=5e-3)
    opt = AdamW([torch.nn.Parameter(torch.ones(1))], lr=1e-3, schedule="from_lr")
    with pytest.warns(UserWarning, match=r"it has lr=0.005, and neither base_lr nor.*this optimizer's base_lr=0.001"):
        opt.load_state_dict(theirs.state_dict())
    assert opt.param_groups[0]["base_lr"] == 1e-3


def test_a_base_that_was_chosen_stays() -> None:
    """OneCycleLR's initial_lr is not the lr at which eta is 1, and the README says base_lr=max_lr."""
    theirs = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.01)
    lr_scheduler.OneCycleLR(theirs, max_lr=0.1, total_steps=10)
    opt = AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.01, schedule="from_lr", base_lr=0.1)
    opt.load_state_dict(theirs.state_dict())
    assert opt.param_groups[0]["base_lr"] == 0.1


def test_an_lr_that_a_scheduler_has_left_is_said() -> None:
    theirs = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    lr_scheduler.LambdaLR(theirs, lambda t: 0.25)
    opt = AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.1, schedule=Cosine(9))
    with pytest.warns(UserWarning, match=r"its lr=0.025 is what an LR scheduler made of 0.1, and schedule=Cosine"):
        opt.load_state_dict(theirs.state_dict())


def test_a_late_group_beside_shown_ones() -> None:
    opt = small("adamw", schedule=Cosine(9), show_lr=True)
    for _ in range(4):
        opt.step()
    shown = opt.param_groups[0]["lr"]
    with pytest.warns(UserWarning, match="param group 1 takes its lr=.* for its base_lr"):
        opt.add_param_group({"params": parameters([(3,)]), "lr": shown})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.add_param_group({"params": parameters([(3,)]), "lr": shown, "base_lr": 0.1})
        opt.add_param_group({"params": parameters([(3,)])})


def test_a_group_that_comes_late_and_follows_lr() -> None:
    """Its eta is 1 at the lr that it is added at, unless it says another base: said where the others are elsewhere."""
    opt = AdamW(parameters([(3,)]), lr=1e-2, weight_decay=0.1, decay="independent", schedule="from_lr")
    opt.param_groups[0]["lr"] = 5e-3
    with pytest.warns(
        UserWarning, match=r"param group 1 begins at eta = lr / base_lr = 1, where the other groups are at 0.5"
    ):
        opt.add_param_group({"params": parameters([(3,)]), "lr": 5e-3})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.add_param_group({"params": parameters([(3,)]), "lr": 5e-3, "base_lr": 1e-2})
        opt.add_param_group({"params": parameters([(3,)]), "lr": 5e-3, "initial_lr": 1e-2})
    assert [group["base_lr"] for group in opt.param_groups] == [1e-2, 5e-3, 1e-2, 1e-2]


# The authors' restarts ------------------------------------------------------------------------------------------------


def test_restarts_as_published() -> None:
    """By hand for 4 batches; late where 1/n, summed in doubles, falls short of 1: for n = 391 at step 1173."""
    schedule = PublishedRestarts(1, 4, 2)
    assert [schedule.where(t)[0] for t in range(16)] == [*range(4), *range(8), *range(4)]
    assert [schedule(t) for t in (0, 3, 4, 8, 12)] == pytest.approx([0.5 + 0.5 * 0.5**0.5, 0, 1, 0.5, 1])
    ideal, real = WarmRestarts(391, 2), PublishedRestarts(1, 391, 2)
    starts = [[t for t in range(1, 4000) if own.where(t)[0] == 0] for own in (ideal, real)]
    assert starts == [[391, 1173, 2737], [391, 1174, 2739]]
    assert real(1173) < 1e-5 < 0.99 < ideal(1173)
    assert NormalizedDecay(real).decay_factor(1173) == 782**-0.5
    assert NormalizedDecay(real).decay_factor(1174) == 1564**-0.5
    late = [n for n in range(1, 200) if PublishedRestarts(2, n).where(4 * n)[0] != 0]  # of the second restart
    assert 60 < len(late) < 199
    assert schedule == PublishedRestarts(1, 4, 2) != PublishedRestarts(1, 5, 2)
    with pytest.raises(ValueError, match="batches=0 of PublishedRestarts"):
        PublishedRestarts(1, 0)


def test_a_callable_that_says_where_it_restarts() -> None:
    """What NormalizedDecay takes: where(t), and `restarts`."""

    class Own:
        restarts = True

        def __call__(self, t: int) -> float:
            return 1.0 - (t % 4) / 4

        def where(self, t: int) -> tuple[int, int]:
            return t % 4, 4

    opt = small("adamw", schedule=NormalizedDecay(Own()))
    w = opt.param_groups[0]["params"][0]
    w.grad = torch.zeros(1)
    opt.step()
    opt.step()
    assert w.item() == pytest.approx((1 - 0.2 / 2) * (1 - 0.75 * 0.2 / 2))
    assert wd_kernels.schedules.Sequential(Warmup(3), Own()).restarts
