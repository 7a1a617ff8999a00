"""States in other precisions, and those of torch: as close as a step is, by name where it cannot be."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import semantics
import torch
from bits import assert_same_optimizers, assert_untouched
from saving import ULPS, copy_weights, through_file, train
from semantics import (
    DEFAULTS,
    MODES,
    STATES,
    all_params,
    assert_close,
    build,
    checked_step,
    mode_of,
    parameters,
    set_gradients,
    untouched,
)
from torch import Tensor, nn

from wd_kernels import SGDW, AdagradW, AdamW

walk = semantics.walk
every = pytest.mark.parametrize("rule", ["adamw", "sgdw", "adagradw"])


# Precision ------------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_states_of_16_bit_parameters_stay_float32(rule: str, dtype: torch.dtype) -> None:
    """torch's own load would round them to the parameter's dtype."""

    def make() -> Any:
        return build(rule, [nn.Parameter(p.detach().to(dtype)) for p in parameters()])

    a, b = make(), make()
    train(a, range(4))
    b.load_state_dict(through_file(a.state_dict()))
    for p, q in zip(all_params(a), all_params(b), strict=True):
        for name in STATES[rule]:
            assert b.state[q][name].dtype == torch.float32
            assert_untouched(a.state[p][name], b.state[q][name])
            if p.numel() > 10:
                assert not torch.equal(a.state[p][name], a.state[p][name].to(dtype).float())  # there is more to lose


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_torchs_16_bit_states_are_widened_exactly(dtype: torch.dtype, walk: str) -> None:
    for theirs, ours, names in (
        (torch.optim.AdamW, AdamW, STATES["adamw"]),
        (lambda p: torch.optim.SGD(p, momentum=0.8), SGDW, STATES["sgdw"]),
    ):
        params = [nn.Parameter(p.detach().to(dtype)) for p in parameters()]
        other = theirs(params)
        train(other, range(3))
        mine = [nn.Parameter(p.detach().clone()) for p in params]
        opt = ours(mine) if ours is AdamW else ours(mine, momentum=0.8)
        opt.load_state_dict(other.state_dict())
        for p, q in zip(params, mine, strict=True):
            for name in names:
                assert other.state[p][name].dtype == dtype
                assert_untouched(opt.state[q][name], other.state[p][name].float())
        set_gradients(mine, 5)
        checked_step(opt)


@every
def test_a_state_that_would_be_narrowed_is_an_error(rule: str) -> None:
    """By name, and the optimizer is as it was: groups, states, counts, the next step."""
    names = ["a.weight", "a.bias", "b.weight", "b.bias", "c"]
    wide = build(rule, parameters(dtype=torch.float64))
    train(wide, range(3))
    saved = copy.deepcopy(wide.state_dict())
    for i in range(4):
        for name in STATES[rule]:
            saved["state"][i][name] = saved["state"][i][name].float()
    opt, twin = (build(rule, zip(names, parameters(), strict=True)) for _ in range(2))
    for o in (opt, twin):
        train(o, range(2))
    groups = [dict(group) for group in opt.param_groups]
    saved["param_groups"][0]["lr"] = 99.0
    what = rf"the saved state '{STATES[rule][0]}' of parameter 'c' \(group 0, index 4\)"
    pattern = what + r" has dtype torch\.float64.*torch\.float32"
    with untouched(opt), pytest.raises(TypeError, match=pattern):
        opt.load_state_dict(saved)
    assert [dict(group) for group in opt.param_groups] == groups
    for o in (opt, twin):
        train(o, range(2, 5))
    assert_same_optimizers(opt, twin)


@every
@pytest.mark.parametrize(
    ("spoil", "error", "pattern"),
    [
        (lambda s: s["param_groups"].append(dict(s["param_groups"][0])), ValueError, "2 parameter groups.*has 1"),
        (lambda s: s["param_groups"].pop(), ValueError, "0 parameter groups.*has 1"),
        (lambda s: s["param_groups"][0]["params"].append(9), ValueError, "param group 0.*6 parameters.*5"),
        (lambda s: s["param_groups"][0]["params"].pop(), ValueError, "param group 0.*4 parameters.*5"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), ValueError, r"lr=-1\.0 in param group 0"),
        (lambda s: s["param_groups"][0].update(amsgrad="no", momentum="no", lr_decay="no"), TypeError,
         r"(amsgrad|momentum|lr_decay)='no' in param group 0 of the saved state"),
        (lambda s: s["state"].update({3: 5}), TypeError, "saved state of parameter 3 of group 0 is a int"),
        (lambda s: s["state"][4].update(step=-2), ValueError, "saved step count of parameter 4 of group 0 is -2"),
        (lambda s: s["state"][4].update(step=torch.ones(2)), ValueError, r"step count of parameter 4.*shape \(2,\)"),
        (lambda s: s["state"][4].update(step="x"), TypeError, "saved step count of parameter 4"),
        (lambda s: [s["state"][4].update({n: torch.ones(7)}) for n in list(s["state"][4]) if n != "step"], ValueError,
         r"saved state '\w+' of parameter 4 of group 0 has shape \(7,\).*\(2, 3, 2, 3\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error(
    rule: str, spoil: Callable[[Any], Any], error: type[Exception], pattern: str
) -> None:
    opt = build(rule, parameters())
    train(opt, range(3))
    saved = copy.deepcopy(opt.state_dict())
    groups = [dict(group) for group in opt.param_groups]
    spoil(saved)
    with untouched(opt), pytest.raises(error, match=pattern):
        opt.load_state_dict(saved)
    assert [dict(group) for group in opt.param_groups] == groups
    set_gradients(all_params(opt), 9)
    checked_step(opt)


@every
def test_counts_of_any_number_type_load(rule: str) -> None:
    import numpy as np

    opt = build(rule, parameters())
    train(opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    counts = [5, 5.0, torch.tensor(5), np.int64(5), np.float32(5)]
    for i, count in enumerate(counts):
        saved["state"][i]["step"] = count
    opt.load_state_dict(saved)
    assert [float(opt.state[p]["step"]) for p in all_params(opt)] == [5.0] * 5
    set_gradients(all_params(opt), 4)
    checked_step(opt)


# With torch -----------------------------------------------------------------------------------------------------------

PAIRS: list[Any] = [
    pytest.param(AdamW, {}, torch.optim.AdamW, id="AdamW"),
    pytest.param(AdamW, {"amsgrad": True}, torch.optim.AdamW, id="AdamW-amsgrad"),
    pytest.param(AdamW, {"decay": "l2"}, torch.optim.Adam, id="Adam"),
    pytest.param(SGDW, {"decay": "l2", "dampening": 0.5}, torch.optim.SGD, id="SGD-dampening"),
    pytest.param(SGDW, {"decay": "l2", "nesterov": True}, torch.optim.SGD, id="SGD-nesterov"),
    pytest.param(SGDW, {"decay": "l2", "momentum": 0.0}, torch.optim.SGD, id="SGD-plain"),
    pytest.param(AdagradW, {"decay": "l2"}, torch.optim.Adagrad, id="Adagrad"),
]


def make_pair(ours: type, extra: dict[str, Any], theirs: type, named: bool) -> tuple[Any, Any]:
    options = {**DEFAULTS[ours.__name__.lower()], **extra}
    made = []
    for cls, own in ((ours, options), (theirs, {k: v for k, v in options.items() if k != "decay"})):
        params: list[Any] = parameters()
        if named:
            params = list(zip("abcde", params, strict=True))
        made.append(cls([{"params": params[:2], "lr": 0.1}, {"params": params[2:]}], **own))
    return made[0], made[1]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("ours", "extra", "theirs"), PAIRS)
def test_interchange(ours: type, extra: dict[str, Any], theirs: type, named: bool) -> None:
    """torch loads ours and we load torch's, names and all; each goes on as the other would have."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch can express all of it
        a, b = make_pair(ours, extra, theirs, named)
        train(a, range(4), lambda t: [t % 2])
        train(b, range(4), lambda t: [t % 2])
        saved_a, saved_b = through_file(a.state_dict()), through_file(b.state_dict())
    for group_a, group_b in zip(saved_a["param_groups"], saved_b["param_groups"], strict=True):
        assert {k: group_a[k] for k in group_b if k in ("params", "param_names")} == {
            k: group_b[k] for k in group_b if k in ("params", "param_names")
        }
        missing = set(group_b) - set(group_a)
        assert not missing
    for key, own in saved_b["state"].items():
        assert {k for k, v in own.items() if v is not None} <= set(saved_a["state"][key])
    c, d = make_pair(ours, extra, theirs, named)
    for source, target in ((a, d), (b, c)):
        copy_weights(source, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor is there anything to say of theirs
        d.load_state_dict(saved_a)
        c.load_state_dict(saved_b)
    assert [g["lr"] for g in c.param_groups] == [g["lr"] for g in d.param_groups] == [0.1, 0.05]
    for t in range(4, 10):
        for opt in (a, b, c, d):
            set_gradients(all_params(opt), t, [t % 3])
            opt.step()
        for x, y in ((a, d), (c, b), (a, b)):
            for p, q in zip(all_params(x), all_params(y), strict=True):
                assert_close(p, q, ULPS, f"step {t}")
                for name, value in y.state[q].items():
                    if name != "step" and isinstance(value, Tensor):
                        assert_close(x.state[p][name], value, ULPS, f"step {t}, {name}")
    if ours is not SGDW:
        assert [float(a.state[p]["step"]) for p in all_params(a)] == [float(d.state[p]["step"]) for p in all_params(d)]


@pytest.mark.parametrize(
    ("decay", "flag", "expected"),
    [
        ("l2", True, "lr_scaled"),
        ("lr_scaled", False, "l2"),
        ("independent", True, "independent"),
        ("proximal", False, "l2"),
        ("l2", False, "l2"),
        ("independent", None, "independent"),
    ],
)
def test_torchs_flag_in_groups(decay: Any, flag: bool | None, expected: str) -> None:
    """`decoupled_weight_decay` decides between coupled and not; which form of not, the optimizer's own mode does."""
    opt = AdamW(parameters([(3,)]), decay=decay, weight_decay=0.1)
    added: dict[str, Any] = {"params": parameters([(4,)]), "weight_decay": 0.2}
    opt.add_param_group(added if flag is None else {**added, "decoupled_weight_decay": flag})
    assert [mode_of(opt, group) for group in opt.param_groups] == [decay, expected]
    assert opt.param_groups[1]["decoupled_weight_decay"] is (expected != "l2")


def test_decoupled_weight_decay_is_written() -> None:
    """From what the groups say when saved, not when made."""
    groups = [{"params": [p], "decay": mode, "weight_decay": 0.1} for p, mode in zip(parameters(), MODES, strict=True)]
    opt = AdamW(groups)
    assert [g["decoupled_weight_decay"] for g in opt.state_dict()["param_groups"]] == [m != "l2" for m in MODES]
    for group, mode in zip(opt.param_groups, reversed(MODES), strict=True):
        group["decay"] = mode
    saved = opt.state_dict()["param_groups"]
    assert [g["decoupled_weight_decay"] for g in saved] == [m != "l2" for m in MODES[::-1]]
    assert [mode_of(opt, g) for g in saved] == list(MODES[::-1])
    assert "decoupled_weight_decay" not in SGDW(parameters()).state_dict()["param_groups"][0]


def test_a_momentum_buffer_without_count_has_been_started(walk: str) -> None:
    """torch.optim.SGD saves none: the next step is dampened as torch's, not taken for the first."""
    a = torch.optim.SGD(parameters(), 0.05, 0.8, 0.5, 0.1)
    b = SGDW(parameters(), 0.05, 0.8, 0.5, 0.1, decay="l2")
    train(a, range(3), lambda t: [0])
    assert all("step" not in own for own in a.state.values())
    copy_weights(a, b)
    b.load_state_dict(a.state_dict())
    for t in range(3, 6):
        for opt in (a, b):
            set_gradients(all_params(opt), t)
            opt.step()
        for p, q in zip(all_params(b), all_params(a), strict=True):
            assert_close(b.state[p]["momentum_buffer"], a.state[q]["momentum_buffer"], ULPS)
            assert_close(p, q, ULPS)
    assert [float(b.state[p]["step"]) for p in all_params(b)] == [3.0] + [4.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_torchs_adagrad_has_the_states_of_all(dtype: torch.dtype, walk: str) -> None:
    """It makes them at the start and steps no parameter without: parameters that took no step are exported, too."""
    options = {"lr": 0.1, "lr_decay": 0.3, "initial_accumulator_value": 0.2, "weight_decay": 0.1}
    a = AdagradW(parameters(dtype=dtype), decay="l2", **options)
    train(a, range(3), lambda t: [1, 4])
    assert [len(a.state.get(p, {})) for p in all_params(a)] == [2, 0, 2, 2, 0]
    saved = through_file(a.state_dict())
    assert [len(a.state.get(p, {})) for p in all_params(a)] == [2, 0, 2, 2, 0]  # as it was
    assert sorted(saved["state"]) == [0, 1, 2, 3, 4]
    b = torch.optim.Adagrad(parameters(dtype=dtype), **options)
    c = AdagradW(parameters(dtype=dtype), decay="l2", **{**options, "initial_accumulator_value": 0.7})
    for opt in (b, c):
        copy_weights(a, opt)
        opt.load_state_dict(saved)
    for t in range(3, 6):
        for opt in (a, b, c):
            set_gradients(all_params(opt), t)
            opt.step()
        assert_same_optimizers(a, c, f"step {t}")
        for p, q in zip(all_params(a), all_params(b), strict=True):
            assert_close(torch.view_as_real(p) if p.is_complex() else p, torch.view_as_real(q) if q.is_complex() else q,
                         ULPS, f"step {t}")  # fmt: skip
