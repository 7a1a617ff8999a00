"""A weight decay and its mode stay together, whatever is loaded; and what is not as it was saved is said once."""

from __future__ import annotations

import copy
import json
import pathlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import frozen
import pytest
import torch
from bits import assert_same_bits, assert_same_optimizers
from saving import through_file, train
from semantics import all_params, assert_close, build, mode_of, parameters, set_gradients
from torch import nn

from wd_kernels import SGDW, AdagradW, AdamW, NormalizedDecay, convert_weight_decay, schedules
from wd_kernels.version import __version__

every = pytest.mark.parametrize("rule", ["adamw", "sgdw", "adagradw"])
INDEPENDENT = {"decay": "independent", "weight_decay": 1e-4}


def shrunk(opt: Any, steps: int = 100) -> float:
    """What is left of a weight of 1 after as many steps without a gradient's pull."""
    (p,) = all_params(opt)
    with torch.no_grad():
        p.fill_(1.0)
    for _ in range(steps):
        p.grad = torch.zeros_like(p)
        opt.step()
    return float(p.detach()[0])


def torch_state(cls: Any, **options: Any) -> dict[str, Any]:
    """Of one parameter after a step that has left no momentum."""
    p = nn.Parameter(torch.ones(1))
    opt = cls([p], **options)
    p.grad = torch.zeros(1)
    opt.step()
    for value in opt.state[p].values():
        if isinstance(value, torch.Tensor) and value.dim():
            value.zero_()
    state: dict[str, Any] = opt.state_dict()
    return state


CASES: list[Any] = [
    # live class and options, saved state, what is left by hand, what the warning says
    (AdamW, {"lr": 1e-3, **INDEPENDENT}, partial(torch_state, torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
     (1 - 1e-4) ** 100, "weight_decay=0.1, decay='lr_scaled', AdamW here goes on with its own weight_decay=0.0001, "
     "decay='independent'"),
    (AdamW, {"lr": 1e-3, "decay": "proximal", "weight_decay": 1e-4},
     partial(torch_state, torch.optim.AdamW, lr=1e-3, weight_decay=0.1), (1 + 1e-4) ** -100, "decay='proximal'"),
    (AdamW, {"lr": 1e-3, "weight_decay": 0.1}, partial(torch_state, torch.optim.Adam, lr=1e-3, weight_decay=0.3),
     (1 - 1e-4) ** 100, "weight_decay=0.3, decay='l2'"),
    (AdamW, {"lr": 1e-3, "weight_decay": 0.05, "decay": "independent",
             "schedule": NormalizedDecay(schedules.Constant(1.0, 400))},
     partial(torch_state, torch.optim.AdamW, lr=1e-3, weight_decay=0.1), (1 - 0.05 / 20) ** 100,
     "decay='independent' under NormalizedDecay"),
    (SGDW, {"lr": 0.1, "weight_decay": 0.02, "momentum": 0.9},
     partial(torch_state, torch.optim.SGD, lr=0.1, weight_decay=0.5), (1 - 0.002) ** 100,
     "weight_decay=0.5, decay='l2', form='torch', SGDW here goes on with its own weight_decay=0.02, decay='lr_scaled'"),
    (AdagradW, {"lr": 0.1, "weight_decay": 0.02}, partial(torch_state, torch.optim.Adagrad, lr=0.1, weight_decay=0.5),
     (1 - 0.002) ** 100, "decay='l2'"),
    (AdamW, {"lr": 1e-3, "weight_decay": 0.1}, partial(torch_state, AdamW, lr=1e-3, **INDEPENDENT), (1 - 1e-4) ** 100,
     "weight_decay=0.0001, decay='independent'"),
    (AdamW, {"lr": 1e-3, **INDEPENDENT},
     partial(torch_state, AdamW, lr=1e-3, weight_decay=0.05, decay="independent",
             schedule=NormalizedDecay(schedules.WarmRestarts(3))), (1 - 1e-4) ** 100,
     "weight_decay=0.05, decay='independent' under NormalizedDecay"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "options", "saved", "left", "message"), CASES)
def test_another_decay_stays_out(
    cls: Any, options: dict[str, Any], saved: Callable[[], Any], left: float, message: str
) -> None:
    """lr is loaded, the live decay stays, and a warning says so at the caller's line, with the way to the other."""
    opt = cls([nn.Parameter(torch.ones(1))], **options)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        opt.load_state_dict(through_file(saved()))
    said = [str(own.message) for own in seen if "goes on with its own" in str(own.message)]
    assert len(said) == 1
    assert message in said[0]
    assert "convert_weight_decay" in said[0]
    assert {own.filename for own in seen} == {__file__}
    assert shrunk(opt) == pytest.approx(left, rel=1e-5)


def test_who_converts_and_resumes() -> None:
    """A run of torch's AdamW that goes on in the paper's mode decays as it would have."""
    lam = convert_weight_decay(0.1, "lr_scaled", "independent", lr=1e-3).weight_decay
    params, others = parameters(), parameters()
    theirs = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1)
    train(theirs, range(3))
    ours = AdamW(others, lr=1e-3, weight_decay=lam, decay="independent")
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    with pytest.warns(UserWarning, match="has weight_decay=0.1"):
        ours.load_state_dict(theirs.state_dict())
    train(theirs, range(3, 8))
    train(ours, range(3, 8))
    for p, q in zip(params, others, strict=True):
        assert_close(p, q, 24)


@every
def test_a_decay_of_zero_means_the_same_everywhere(rule: str) -> None:
    """It is loaded as any number, in silence, and the mode stays; among groups, what is said is said once."""
    saved = build(rule, [{"params": [p], "weight_decay": 0.0} for p in parameters()], decay="metric_proximal")
    train(saved, range(2))
    live = build(rule, [{"params": [p]} for p in parameters()], decay="proximal")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        live.load_state_dict(saved.state_dict())
    assert {(group["weight_decay"], mode_of(live, group)) for group in live.param_groups} == {(0.0, "proximal")}
    for group in saved.param_groups[1:4]:
        group["weight_decay"] = 0.25
    with pytest.warns(UserWarning, match="param groups 1, 2, 3 of the saved state: it has weight_decay=0.25") as seen:
        live.load_state_dict(saved.state_dict())
    assert len(seen) == 1
    same = build(rule, [{"params": [p]} for p in parameters()], decay="metric_proximal", weight_decay=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.load_state_dict(through_file(saved.state_dict()))
    assert [group["weight_decay"] for group in same.param_groups] == [0.0, 0.25, 0.25, 0.25, 0.0]


@pytest.mark.parametrize(
    ("way", "source"), [(("torch", "paper"), "ours"), (("torch", "paper"), "torch"), (("paper", "torch"), "ours")]
)
def test_momentum_buffers_between_forms(way: tuple[Any, Any], source: str) -> None:
    """At a constant lr both forms take the same steps: one's buffer is the other's times the lr."""
    lr, eta = 0.05, 0.5 if source == "ours" else 1.0
    options: dict[str, Any] = {"lr": lr, "momentum": 0.8, "weight_decay": 0.1, "decay": "l2"}
    straight, first, second = parameters(), parameters(), parameters()
    a = SGDW(straight, **options, form=way[0], eta=eta)
    saved = (
        SGDW(first, **options, form=way[0], eta=eta) if source == "ours" else torch.optim.SGD(first, lr, 0.8, 0, 0.1)
    )
    b = SGDW(second, **options, form=way[1])
    train(a, range(3))
    train(saved, range(3))
    for p, q in zip(first, second, strict=True):
        q.data.copy_(p.data)
    with pytest.warns(UserWarning, match=f"form='{way[0]}', SGDW here goes on with.*form='{way[1]}'; its buffers are"):
        b.load_state_dict(through_file(saved.state_dict()))
    for t in range(3, 7):
        for opt, params in ((a, straight), (b, second)):
            set_gradients(params, t)
            opt.step()
    for p, q in zip(straight, second, strict=True):
        assert_close(p, q, 24)


def test_a_buffer_that_cannot_be_carried() -> None:
    """Into torch's form where the next lr is 0: an error, and nothing is loaded."""
    saved = SGDW(parameters(), lr=0.0, momentum=0.9, form="paper")
    train(saved, range(2))
    live = SGDW(parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"state 'momentum_buffer' of parameter 0 of group 0 cannot be carried over"):
        live.load_state_dict(saved.state_dict())
    assert not live.state
    assert live.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("way", [("torch", "paper"), ("paper", "torch")])
def test_buffers_are_carried_by_the_next_lr(way: tuple[Any, Any], shown: bool) -> None:
    """At a drop of the schedule the loaded run takes the step that the other form would have taken."""

    def make(form: Any, show: bool) -> Any:
        schedule = schedules.StepDrop((3,), 0.01)
        return SGDW([nn.Parameter(torch.ones(1))], 1.0, 0.9, form=form, schedule=schedule, show_lr=show)

    for other in (False, True):
        saved, live = make(way[0], shown), make(way[1], other)
        train(saved, range(3))
        live.load_state_dict(saved.state_dict())
        (p,), (q,) = all_params(saved), all_params(live)
        q.data.copy_(p.data)
        before = float(p.detach())
        for own in (p, q):
            own.grad = torch.ones(1)
        buffer = float(saved.state[p]["momentum_buffer"])
        saved.step()
        live.step()
        # torch's form has the old gradients at the new lr, the paper's at theirs: each goes on as it was saved.
        assert before - float(q.detach()) == pytest.approx(before - float(p.detach()), rel=1e-4)
        moved = 0.9 * buffer + 0.01 if way[0] == "paper" else 0.01 * (0.9 * buffer + 1)
        assert before - float(p.detach()) == pytest.approx(moved, rel=1e-4)


def test_only_the_form_is_said_where_nothing_decays() -> None:
    saved = SGDW(parameters(), lr=0.1, momentum=0.9, decay="independent", form="paper")
    train(saved, range(2))
    live = SGDW(parameters(), lr=0.1, momentum=0.9, decay="independent", weight_decay=0.3)
    with pytest.warns(UserWarning, match="it has form='paper', SGDW here goes on with its own form='torch'; its buff"):
        live.load_state_dict(saved.state_dict())
    assert live.param_groups[0]["weight_decay"] == 0


def test_a_schedule_of_ones_own_that_normalizes() -> None:
    """The same one: lambda_norm is loaded, and nothing said."""

    class Own(NormalizedDecay):
        pass

    def make() -> Any:
        return build("adamw", parameters(), decay="independent", schedule=Own(schedules.Cosine(9)))

    saved, live = make(), make()
    train(saved, range(2))
    saved.param_groups[0]["weight_decay"] = 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        live.load_state_dict(saved.state_dict())
    assert live.param_groups[0]["weight_decay"] == 0.3


# Nothing is said in ordinary use --------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("decay", ["l2", "lr_scaled", "independent", "proximal", "metric_proximal"])
@pytest.mark.parametrize("schedule", [None, "from_lr", schedules.Cosine(10)], ids=str)
def test_saving_and_resuming_is_quiet(rule: str, decay: str, schedule: Any) -> None:
    def make() -> Any:
        return build(rule, parameters(), decay=decay, schedule=schedule)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a, b = make(), make()
        train(a, range(3))
        b.load_state_dict(through_file(a.state_dict()))
        for p, q in zip(all_params(a), all_params(b), strict=True):
            q.data.copy_(p.data)
        for opt in (a, b, c := copy.deepcopy(b)):
            train(opt, range(3, 5))
    assert_same_optimizers(a, b, loaded=True)
    assert_same_optimizers(a, c, loaded=True)


# What older versions saved --------------------------------------------------------------------------------------------


RELEASES = {"0.1.0": 11, "0.2.0": 24}  # and how many runs each has saved


def test_every_release_has_saved_its_states() -> None:
    """This one too, and what they saved is there."""
    assert {file.stem for file in frozen.FOLDER.glob("[0-9]*.pt")} == {*RELEASES, __version__}
    assert {version: len(frozen.saved_by(version)) for version in RELEASES} == RELEASES


@pytest.mark.parametrize(("version", "name"), [(v, n) for v in RELEASES for n in [*frozen.runs()][: RELEASES[v]]])
def test_states_of_older_versions(version: str, name: str) -> None:
    """They load without a word, and the run goes on to the bit."""
    saved = frozen.saved_by(version)[name]
    opt, params = frozen.make(name, saved["weights"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(saved["state"])
    frozen.train(opt, params, range(frozen.SAVED, frozen.SAVED + frozen.AFTER))
    for p, expected, before in zip(params, saved["after"], saved["weights"], strict=True):
        assert_same_bits(p, expected)
        assert torch.equal(p, before) == (p is params[2])


# What is no state of such an optimizer --------------------------------------------------------------------------------


def of_numbers() -> dict[str, Any]:
    """A state that JSON can hold."""
    opt = AdamW([nn.Parameter(torch.ones(2))])
    opt.param_groups[0]["params"][0].grad = torch.ones(2)
    opt.step()
    saved = opt.state_dict()
    saved["state"][0] = {name: value.tolist() for name, value in saved["state"][0].items()}
    return saved


def wrong() -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    model = nn.Linear(3, 2)
    flat = {"state.weight.step": torch.ones(()), "param_groups.weight.lr": 0.1}
    of_adamw = {"model": model.state_dict(), "optimizer": AdamW(model.parameters()).state_dict()}
    return {
        "path": (lambda: "x.pt", TypeError, r"is a str: expected a dict.*torch\.load\("),
        "pathlib": (lambda: pathlib.Path("x.pt"), TypeError, r"is a PosixPath.*torch\.load\("),
        "list": (lambda: [1], TypeError, "is a list: expected a dict, of an optimizer's state_dict"),
        "model": (model.state_dict, ValueError, "it has .'bias', 'weight'.: a model's state_dict"),
        "checkpoint": (lambda: of_adamw, ValueError, r"a whole checkpoint, of which load_state_dict\(checkpoint\['opt"),
        "flattened": (lambda: flat, ValueError, "a flattened one, which .*set_optimizer_state_dict loads"),
        "json": (
            lambda: json.loads(json.dumps(of_numbers())),
            ValueError,
            r"has states of \['0'\].*its parameters are \[0\]",
        ),
        "other": (lambda: {"step": 3}, ValueError, "it has .'step'.: expected an optimizer's"),
    }


@pytest.mark.parametrize("what", list(wrong()))
def test_what_is_no_optimizers_state(what: str) -> None:
    given, error, message = wrong()[what]
    opt = AdamW(parameters([(2,)]))
    with pytest.raises(error, match=message):
        opt.load_state_dict(given())


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("theirs", [AdamW, SGDW, AdagradW, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("ours", [AdamW, SGDW, AdagradW])
def test_states_of_another_rule(ours: Any, theirs: Any, stepped: bool) -> None:
    """By its states, and where it has none yet by its hyperparameters."""
    options = {"momentum": 0.9} if theirs in (SGDW, torch.optim.SGD) else {}
    other = theirs(parameters(), lr=0.1, **options)
    if stepped:
        train(other, range(2))
    opt = ours(parameters(), lr=0.1)
    title = {"AdamW": "AdamW", "SGD": "SGDW", "SGDW": "SGDW", "Adagrad": "AdagradW", "AdagradW": "AdagradW"}
    if title[theirs.__name__] == ours.__name__:
        opt.load_state_dict(other.state_dict())
        return
    message = f"one of {title[theirs.__name__]}, it has .*this optimizer is {ours.__name__}, whose states are"
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(other.state_dict())
    assert not opt.state


def test_names_that_disagree() -> None:
    """States are taken in order: parameters of other names, or in another order, are said."""
    params = [nn.Parameter(torch.randn(3)) for _ in range(2)]
    saved = AdamW(list(zip(("fc.weight", "fc.bias"), params, strict=True)))
    train(saved, range(2))
    turned = AdamW([("fc.bias", params[1]), ("fc.weight", params[0])])
    with pytest.warns(UserWarning, match="its parameter 0 is 'fc.weight', that of this optimizer 'fc.bias'"):
        turned.load_state_dict(saved.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdamW(params).load_state_dict(saved.state_dict())  # one of them has no names
        wrapped = list(zip(("module.fc.weight", "_orig_mod.fc.bias"), params, strict=True))
        AdamW(wrapped).load_state_dict(saved.state_dict())
        AdamW(list(zip(("fc.weight", "fc.bias"), params, strict=True))).load_state_dict(saved.state_dict())
