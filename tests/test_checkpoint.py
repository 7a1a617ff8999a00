"""Saving and loading: to the bit with ourselves, as close as a step is with torch, by name where it cannot be."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import semantics
import torch
from bits import assert_same_bits, assert_same_optimizers, assert_untouched
from semantics import (
    DEFAULTS,
    MODES,
    STATES,
    all_params,
    assert_close,
    build,
    checked_step,
    parameters,
    plain,
    set_gradients,
    untouched,
)
from torch import Tensor, nn

from wd_kernels import SGDW, AdamW

walk = semantics.walk
both = pytest.mark.parametrize("rule", ["adamw", "sgdw"])
ULPS = 24  # a few roundings a step, see test_optim
quiet = pytest.mark.filterwarnings("ignore:this state has")


def train(opt: Any, steps: range, skip: Callable[[int], list[int]] = lambda t: []) -> None:
    for t in steps:
        set_gradients(all_params(opt), t, skip(t))
        opt.step()


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copy_weights(source: Any, target: Any) -> None:
    for p, q in zip(all_params(source), all_params(target), strict=True):
        q.data.copy_(p.data)


# With ourselves -------------------------------------------------------------------------------------------------------


@quiet
@both
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64], ids=str
)
@pytest.mark.parametrize("way", [lambda s: s, copy.deepcopy, through_file, lambda s: pickle.loads(pickle.dumps(s))])
def test_round_trip(rule: str, dtype: torch.dtype, way: Callable[[Any], Any], walk: str) -> None:
    """Saved where some parameters have no state and counts differ; what follows has the same bits."""
    options: dict[str, Any] = {"amsgrad": True} if rule == "adamw" else {"dampening": 0.5}

    def make() -> Any:
        shapes, seed = semantics.SHAPES, 0
        p = parameters(shapes, torch.float64 if not dtype.is_complex else dtype, seed)
        p = [nn.Parameter(q.detach().to(dtype)) for q in p]
        return build(rule, [{"params": p[:3], "lr": 0.1}, {"params": p[3:], "decay": "independent"}], **options)

    a, b = make(), make()
    train(a, range(4), lambda t: [1, 4] if t < 4 else [])
    train(a, range(4, 6), lambda t: [4, t % 3])
    saved = way(a.state_dict())
    copy_weights(a, b)
    for group in b.param_groups:
        group.update(lr=7.0, decay="l2", weight_decay=3.0)
    b.load_state_dict(saved)
    assert_same_optimizers(a, b, "loaded")
    assert len(b.state) == 4
    assert [{k: v for k, v in g.items() if k != "params"} for g in a.param_groups] == [
        {k: v for k, v in g.items() if k != "params"} for g in b.param_groups
    ]
    for t in range(6, 10):
        set_gradients(all_params(a), t, [t % 5])
        set_gradients(all_params(b), t, [t % 5])
        a.step()
        b.step()
        assert_same_optimizers(a, b, f"step {t}")


@quiet
@both
def test_loading_into_a_running_optimizer(rule: str, walk: str) -> None:
    """Goes back in time: the table, its gradients and its counts are of the old state, and are not used."""
    a = build(rule, parameters())
    train(a, range(3))
    saved, weights = copy.deepcopy(a.state_dict()), [plain(p) for p in all_params(a)]
    train(a, range(3, 6))
    after = [plain(p) for p in all_params(a)]
    train(a, range(6, 8))
    for p, value in zip(all_params(a), weights, strict=True):
        p.data.copy_(value)
    a.load_state_dict(saved)
    assert {float(a.state[p]["step"]) for p in all_params(a)} == {3.0}
    train(a, range(3, 6))
    for p, value in zip(all_params(a), after, strict=True):
        assert_same_bits(p, value)
    set_gradients(all_params(a), 9)
    checked_step(a)


@quiet
@both
def test_loaded_tensors_are_copies(rule: str) -> None:
    """Two optimizers that load one state share no memory with it, nor with each other."""
    a = build(rule, parameters())
    train(a, range(3))
    saved = a.state_dict()
    held = copy.deepcopy(saved)
    b, c = build(rule, parameters()), build(rule, parameters())
    for opt in (b, c):
        opt.load_state_dict(saved)
    with untouched(a), untouched(c):
        train(b, range(3, 6))
    for i, own in held["state"].items():
        for name, value in own.items():
            assert_untouched(saved["state"][i][name], value, name)
    tensors = [v for opt in (a, b, c) for own in opt.state.values() for k, v in own.items() if k != "step"]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)


@quiet
@both
def test_what_is_saved_keeps_its_counts(rule: str) -> None:
    """The counts in a state_dict are copies: they stand still while the optimizer counts on. The rest is as torch's."""
    a = build(rule, parameters())
    train(a, range(3))
    saved = a.state_dict()
    train(a, range(3, 5))
    assert [float(own["step"]) for own in saved["state"].values()] == [3.0] * 5
    assert all(own["step"].untyped_storage().nbytes() == 4 for own in saved["state"].values())
    assert list(saved) == ["state", "param_groups"]
    assert list(saved["state"]) == saved["param_groups"][0]["params"] == list(range(5))


@quiet
@both
def test_keys_a_saved_group_lacks_keep_the_live_value(rule: str) -> None:
    a = build(rule, parameters())
    train(a, range(2))
    saved = copy.deepcopy(a.state_dict())
    for key in ("eta", "decay", "maximize", "fused", "decoupled_weight_decay"):
        saved["param_groups"][0].pop(key, None)
    saved["param_groups"][0]["other"] = [1]
    b = build(rule, parameters(), eta=0.5, decay="proximal", maximize=True, lr=3.0)
    b.param_groups[0]["mine"] = "kept"
    b.load_state_dict(saved)
    group = b.param_groups[0]
    assert (group["eta"], group["decay"], group["maximize"], group["mine"]) == (0.5, "proximal", True, "kept")
    assert (group["lr"], group["other"]) == (0.05, [1])
    assert group["other"] is not saved["param_groups"][0]["other"]


@quiet
@both
def test_an_empty_state_loads(rule: str, walk: str) -> None:
    """As accelerate does when it wraps: load_state_dict(state_dict()) before the first step, and in the midst."""
    a, b = build(rule, parameters()), build(rule, parameters())
    a.load_state_dict(a.state_dict())
    assert not a.state
    for t in range(4):
        for opt in (a, b):
            set_gradients(all_params(opt), t)
            opt.step()
        a.load_state_dict(a.state_dict())
        assert_same_optimizers(a, b, f"step {t}")


@quiet
@both
def test_layouts_of_loaded_states(rule: str, walk: str) -> None:
    """Contiguous states into a channels_last parameter and back: right values, the parameter's layout."""
    shape = (3, 4, 5, 2)
    values = torch.randn(shape)
    last = nn.Parameter(values.clone(memory_format=torch.channels_last))
    opts = [
        build(rule, [p])
        for p in (nn.Parameter(values.clone()), last, nn.Parameter(values.repeat(1, 1, 1, 2)[..., ::2]))
    ]
    for opt in opts:
        train(opt, range(3))
    for source in opts:
        for target in opts:
            copied = copy.deepcopy(target)
            copied.load_state_dict(source.state_dict())
            (p,) = all_params(copied)
            for name in STATES[rule]:
                assert_untouched(copied.state[p][name], source.state[all_params(source)[0]][name])
                if semantics.is_dense(p):
                    assert copied.state[p][name].stride() == p.stride()
            set_gradients([p], 7)
            checked_step(copied)


@both
def test_a_pickle_of_an_older_version(rule: str) -> None:
    """Groups that lack a key get the class's default, and a missing backend is "auto"."""
    opt, twin = (build(rule, parameters(), backend="reference") for _ in range(2))
    for o in (opt, twin):
        train(o, range(2))
    packed = copy.deepcopy(opt).__getstate__()
    del packed["param_groups"][0]["eta"], packed["param_groups"][0]["maximize"], packed["backend"]
    old = type(opt).__new__(type(opt))
    old.__setstate__(packed)
    assert (old.param_groups[0]["eta"], old.param_groups[0]["maximize"], old.backend) == (1.0, False, "auto")
    for o in (old, twin):
        train(o, range(2, 4))
    assert_same_optimizers(old, twin)


# Precision ------------------------------------------------------------------------------------------------------------


@quiet
@both
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


@quiet
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


@quiet
@both
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


@both
@pytest.mark.parametrize(
    ("spoil", "error", "pattern"),
    [
        (lambda s: s["param_groups"].append(dict(s["param_groups"][0])), ValueError, "2 parameter groups.*has 1"),
        (lambda s: s["param_groups"].pop(), ValueError, "0 parameter groups.*has 1"),
        (lambda s: s["param_groups"][0]["params"].append(9), ValueError, "param group 0.*6 parameters.*5"),
        (lambda s: s["param_groups"][0]["params"].pop(), ValueError, "param group 0.*4 parameters.*5"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), ValueError, r"lr=-1\.0 in param group 0"),
        (lambda s: s["param_groups"][0].update(decay="no"), ValueError, "decay='no' in param group 0"),
        (lambda s: s["state"].update({3: 5}), TypeError, "saved state of parameter 3 of group 0 is a int"),
        (lambda s: s["state"][4].update(step=-2), ValueError, "saved step count of parameter 4 of group 0 is -2"),
        (lambda s: s["state"][4].update(step=torch.ones(2)), ValueError, r"step count of parameter 4.*shape \(2,\)"),
        (lambda s: s["state"][4].update(step="x"), TypeError, "saved step count of parameter 4"),
        (lambda s: [s["state"][4].update({n: torch.ones(7)}) for n in list(s["state"][4]) if n != "step"], ValueError,
         r"saved state '\w+' of parameter 4 of group 0 has shape \(7,\).*\(2, 3, 2, 3\)"),
    ],
)  # fmt: skip
@quiet
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


@both
@quiet
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
]


def make_pair(ours: type, extra: dict[str, Any], theirs: type, named: bool) -> tuple[Any, Any]:
    options = {**DEFAULTS["adamw" if ours is AdamW else "sgdw"], **extra}
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
    c, d = make_pair(ours, {"decay": "proximal"}, theirs, named)
    for source, target in ((a, d), (b, c)):
        copy_weights(source, target)
    c.param_groups[0]["decay"] = extra.get("decay", "lr_scaled") if ours is SGDW else "proximal"
    c.param_groups[1]["decay"] = c.param_groups[0]["decay"]
    if ours is AdamW and "decay" not in extra:
        c.param_groups[0]["decay"] = c.param_groups[1]["decay"] = "l2"  # the loaded flag says otherwise
    d.load_state_dict(saved_a)
    c.load_state_dict(saved_b)
    assert [g["lr"] for g in c.param_groups] == [g["lr"] for g in d.param_groups] == [0.1, 0.05]
    assert {g["decay"] for g in c.param_groups} == {extra.get("decay", "lr_scaled")}
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
    if ours is AdamW:
        assert [float(a.state[p]["step"]) for p in all_params(a)] == [float(d.state[p]["step"]) for p in all_params(d)]


@quiet
@pytest.mark.parametrize(
    ("decay", "flag", "expected"),
    [
        ("l2", True, "lr_scaled"),
        ("independent", True, "independent"),
        ("proximal", True, "proximal"),
        ("independent", False, "l2"),
        ("l2", False, "l2"),
        ("independent", None, "independent"),
    ],
)
def test_decoupled_weight_decay_is_read(decay: str, flag: bool | None, expected: str) -> None:
    """torch's flag decides between coupled and not; which form of not, the live group does. Also in added groups."""
    (p,) = parameters([(3,)])
    opt = AdamW([p], decay=decay)
    saved = torch.optim.Adam([p]).state_dict()
    if flag is None:
        del saved["param_groups"][0]["decoupled_weight_decay"]
    else:
        saved["param_groups"][0]["decoupled_weight_decay"] = flag
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["decay"] == expected
    added: dict[str, Any] = {"params": parameters([(4,)])}
    other = AdamW(parameters([(3,)]), decay=decay)
    other.add_param_group(added if flag is None else {**added, "decoupled_weight_decay": flag})
    assert other.param_groups[1]["decay"] == expected
    assert other.param_groups[0]["decay"] == decay


@quiet
def test_decoupled_weight_decay_is_written() -> None:
    """From what the groups say when saved, not when made."""
    opt = AdamW([{"params": [p], "decay": mode} for p, mode in zip(parameters(), MODES, strict=True)])
    assert [g["decoupled_weight_decay"] for g in opt.state_dict()["param_groups"]] == [m != "l2" for m in MODES]
    for group, mode in zip(opt.param_groups, reversed(MODES), strict=True):
        group["decay"] = mode
    assert [g["decoupled_weight_decay"] for g in opt.state_dict()["param_groups"]] == [m != "l2" for m in MODES[::-1]]
    assert [g["decay"] for g in opt.state_dict()["param_groups"]] == list(MODES[::-1])
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


LOST: list[Any] = [
    ("adamw", {"decay": "independent"}, "decay='independent'.*torch.optim.AdamW"),
    ("adamw", {"decay": "proximal"}, "decay='proximal'"),
    ("adamw", {"decay": "metric_proximal"}, "decay='metric_proximal'"),
    ("adamw", {"eta": 0.5}, "eta != 1"),
    ("sgdw", {}, r"decay='lr_scaled'.*torch\.optim\.SGD"),
    ("sgdw", {"decay": "l2", "form": "paper"}, "form='paper'"),
    ("sgdw", {"decay": "l2", "eta": torch.tensor(2.0)}, "eta != 1"),
]
KEPT: list[Any] = [
    ("adamw", {}),
    ("adamw", {"decay": "l2"}),
    ("adamw", {"decay": "proximal", "weight_decay": 0.0}),
    ("sgdw", {"decay": "l2"}),
    ("sgdw", {"weight_decay": 0.0}),
]


@pytest.mark.parametrize(("rule", "options", "pattern"), LOST)
def test_one_warning_for_what_torch_cannot_express(rule: str, options: dict[str, Any], pattern: str) -> None:
    opt = build(rule, parameters(), **options)
    with pytest.warns(UserWarning, match=pattern) as seen:
        opt.state_dict()
    assert len(seen) == 1
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.state_dict()


@pytest.mark.parametrize(("rule", "options"), KEPT)
def test_no_warning_for_what_torch_can_express(rule: str, options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = build(rule, parameters(), **options)
        opt.state_dict()
        copy.deepcopy(opt)
    opt.param_groups[0].update(decay="independent", weight_decay=0.3)
    with pytest.warns(UserWarning, match="decay='independent'"):
        opt.state_dict()


# Hooks ----------------------------------------------------------------------------------------------------------------


@quiet
@both
def test_hooks(rule: str) -> None:
    """Pre and post hooks of state_dict and load_state_dict, in torch's order; what they return is taken."""
    a = build(rule, parameters())
    train(a, range(3))
    seen: list[str] = []

    def pre_save(opt: Any) -> None:
        seen.append("pre save")
        opt.param_groups[0]["lr"] = 0.25

    def post_save(opt: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append("post save")
        return {**state, "extra": 1}

    def pre_load(opt: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append("pre load")
        assert float(opt.param_groups[0]["lr"]) == 0.05
        groups = [{**group, "weight_decay": 0.75} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    def post_load(opt: Any) -> None:
        seen.append("post load")
        assert opt.param_groups[0]["lr"] == 0.25
        opt.param_groups[0]["eta"] = 0.5

    a.register_state_dict_pre_hook(pre_save)
    a.register_state_dict_post_hook(post_save)
    saved = a.state_dict()
    assert saved["extra"] == 1
    held = copy.deepcopy(saved)
    b = build(rule, parameters())
    b.register_load_state_dict_pre_hook(pre_load)
    b.register_load_state_dict_post_hook(post_load)
    b.load_state_dict(saved)
    assert seen == ["pre save", "post save", "pre load", "post load"]
    group = b.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["eta"]) == (0.25, 0.75, 0.5)
    assert saved["param_groups"] == held["param_groups"]
    copy_weights(a, b)
    a.param_groups[0].update(weight_decay=0.75, eta=0.5)
    for opt in (a, b):
        train(opt, range(3, 5))
    assert_same_optimizers(a, b)


@quiet
@both
def test_unknown_state_is_kept(rule: str) -> None:
    """What others keep in the state goes through, copied, and is left alone by the step."""
    a = build(rule, parameters())
    train(a, range(2))
    p = all_params(a)[0]
    a.state[p]["ema"] = torch.full((4, 4), 3.0)
    a.state[p]["note"] = {"x": [1]}
    a.state["shared"] = {"seen": 7}
    train(a, range(2, 4))
    b = build(rule, parameters())
    b.load_state_dict(a.state_dict())
    q = all_params(b)[0]
    assert torch.equal(b.state[q]["ema"], torch.full((4, 4), 3.0))
    assert b.state[q]["ema"] is not a.state[p]["ema"]
    assert b.state[q]["note"] == {"x": [1]}
    assert b.state["shared"] == {"seen": 7}
    assert list(b.state[q]) == list(a.state[p])
    set_gradients(all_params(b), 5)
    checked_step(b)


# Sizes ----------------------------------------------------------------------------------------------------------------


def saved_size(thing: Any, way: str) -> int:
    if way == "pickle":
        return len(pickle.dumps(thing))
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getbuffer().nbytes


@quiet
@both
@pytest.mark.parametrize("way", ["torch.save", "pickle"])
@pytest.mark.parametrize("what", ["state_dict", "optimizer"])
def test_a_file_is_no_larger_than_torchs(rule: str, way: str, what: str) -> None:
    """500 small parameters: a count that carried its whole vector along would add 500 times 2000 bytes.

    The overhead of a tensor is torch's own (entries of the zip file or of the pickle), so torch's file is the measure;
    ours may hold a count where SGD's has none.
    """
    sizes = []
    n = 500
    for opt in (build(rule, parameters([(4,)] * n)), torch.optim.AdamW(parameters([(4,)] * n))):
        train(opt, range(2))
        thing = opt.state_dict() if what == "state_dict" else opt
        sizes.append((saved_size(thing, way), sum(len(own) for own in opt.state.values())))
    (ours, tensors), (theirs, their_tensors) = sizes
    per_tensor = theirs / (their_tensors + (n if what == "optimizer" else 0))
    assert ours < 1.1 * per_tensor * (tensors + (n if what == "optimizer" else 0)) + 2000
    assert theirs < 1000 * n * 4
