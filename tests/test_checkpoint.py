"""Saving and loading, to the bit with ourselves; hooks, and how large a file is."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import semantics
import torch
from bits import assert_same_bits, assert_same_optimizers, assert_untouched
from saving import copy_weights, through_file, train
from semantics import STATES, all_params, build, checked_step, parameters, plain, set_gradients, untouched
from torch import nn

walk = semantics.walk
every = pytest.mark.parametrize("rule", ["adamw", "sgdw", "adagradw"])


# With ourselves -------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64], ids=str
)
@pytest.mark.parametrize("way", [lambda s: s, copy.deepcopy, through_file, lambda s: pickle.loads(pickle.dumps(s))])
def test_round_trip(rule: str, dtype: torch.dtype, way: Callable[[Any], Any], walk: str) -> None:
    """Saved where some parameters have no state and counts differ; what follows has the same bits."""
    own: dict[str, dict[str, Any]] = {"adamw": {"amsgrad": True}, "sgdw": {"dampening": 0.5}}
    options = own.get(rule, {})
    none = [] if rule == "adagradw" else [4]  # which has no state; AdagradW saves first states, as torch needs them

    def make() -> Any:
        shapes, seed = semantics.SHAPES, 0
        p = parameters(shapes, torch.float64 if not dtype.is_complex else dtype, seed)
        p = [nn.Parameter(q.detach().to(dtype)) for q in p]
        return build(rule, [{"params": p[:3], "lr": 0.1}, {"params": p[3:], "decay": "independent"}], **options)

    a, b = make(), make()
    train(a, range(4), lambda t: [1, *none])
    train(a, range(4, 6), lambda t: [*none, t % 3])
    saved = way(a.state_dict())
    copy_weights(a, b)
    for group in b.param_groups:
        group.update(lr=7.0, eta=0.25, weight_decay=3.0)
    b.load_state_dict(saved)
    assert_same_optimizers(a, b, "loaded", loaded=True)
    assert len(b.state) == 5 - len(none)
    assert [{k: v for k, v in g.items() if k != "params"} for g in a.param_groups] == [
        {k: v for k, v in g.items() if k != "params"} for g in b.param_groups
    ]
    for t in range(6, 10):
        set_gradients(all_params(a), t, [t % 5])
        set_gradients(all_params(b), t, [t % 5])
        a.step()
        b.step()
        assert_same_optimizers(a, b, f"step {t}", loaded=True)


@every
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
    assert {float(a.state[p].get("step", 3.0)) for p in all_params(a)} == {3.0}
    train(a, range(3, 6))
    for p, value in zip(all_params(a), after, strict=True):
        assert_same_bits(p, value)
    set_gradients(all_params(a), 9)
    checked_step(a)


@every
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


@every
def test_what_is_saved_keeps_its_counts(rule: str) -> None:
    """The counts in a state_dict are copies: they stand still while the optimizer counts on. The rest is as torch's."""
    a = build(rule, parameters())
    train(a, range(3))
    saved = a.state_dict()
    train(a, range(3, 5))
    counts = [own["step"] for own in saved["state"].values() if "step" in own]
    assert list(map(float, counts)) == [3.0] * (0 if rule == "sgdw" else 5)  # torch's SGD has none
    assert all(count.untyped_storage().nbytes() == 4 for count in counts)
    assert list(saved) == ["state", "param_groups"]
    assert list(saved["state"]) == saved["param_groups"][0]["params"] == list(range(5))


@every
def test_keys_a_saved_group_lacks(rule: str) -> None:
    """What torch's class has not means what that does, eta 1; all else keeps the live value."""
    a = build(rule, parameters(), decay={"adamw": "lr_scaled"}.get(rule, "l2"))
    train(a, range(2))
    saved = copy.deepcopy(a.state_dict())
    assert not {"eta", "decay", "form", "schedule", "schedule_step", "base_lr", "show_lr"} & set(
        saved["param_groups"][0]
    )
    for key in ("maximize", "fused"):
        saved["param_groups"][0].pop(key, None)
    saved["param_groups"][0]["other"] = [1]
    b = build(rule, parameters(), eta=0.5, decay={"adamw": "lr_scaled"}.get(rule, "l2"), maximize=True, lr=3.0)
    b.param_groups[0]["mine"] = "kept"
    b.load_state_dict(saved)
    group = b.param_groups[0]
    assert (group.get("eta", 1.0), group["maximize"], group["mine"]) == (1.0, True, "kept")
    assert (group["lr"], group["other"]) == (0.05, [1])
    assert group["other"] is not saved["param_groups"][0]["other"]


@every
def test_an_empty_state_loads(rule: str, walk: str) -> None:
    """As accelerate does when it wraps: load_state_dict(state_dict()) before the first step, and in the midst."""
    a, b = build(rule, parameters()), build(rule, parameters())
    a.load_state_dict(a.state_dict())
    assert [float(own["step"]) for own in a.state.values()] == ([0.0] * 5 if rule == "adagradw" else [])
    for t in range(4):
        for opt in (a, b):
            set_gradients(all_params(opt), t)
            opt.step()
        a.load_state_dict(a.state_dict())
        assert_same_optimizers(a, b, f"step {t}", loaded=True)


@every
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


@every
def test_a_pickle_of_an_older_version(rule: str) -> None:
    """Groups that lack a key get the class's default, and a missing backend is "auto"."""
    opt, twin = (build(rule, parameters(), backend="reference") for _ in range(2))
    for o in (opt, twin):
        train(o, range(2))
    packed = copy.deepcopy(opt).__getstate__()
    del packed["param_groups"][0]["maximize"], packed["backend"]
    old = type(opt).__new__(type(opt))
    old.__setstate__(packed)
    assert (old.param_groups[0]["maximize"], old.backend) == (False, "auto")
    for o in (old, twin):
        train(o, range(2, 4))
    assert_same_optimizers(old, twin)


# Hooks ----------------------------------------------------------------------------------------------------------------


@every
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
    assert_same_optimizers(a, b, loaded=True)


@every
def test_unknown_state_is_kept(rule: str) -> None:
    """What others keep in the state goes through, copied, and is left alone by the step."""
    a = build(rule, parameters())
    train(a, range(2))
    p = all_params(a)[0]
    a.state[p]["of_another"] = torch.full((4, 4), 3.0)
    a.state[p]["note"] = {"x": [1]}
    a.state["shared"] = {"seen": 7}
    train(a, range(2, 4))
    b = build(rule, parameters())
    b.load_state_dict(a.state_dict())
    q = all_params(b)[0]
    assert torch.equal(b.state[q]["of_another"], torch.full((4, 4), 3.0))
    assert b.state[q]["of_another"] is not a.state[p]["of_another"]
    assert b.state[q]["note"] == {"x": [1]}
    assert b.state["shared"] == {"seen": 7}
    assert [name for name in b.state[q] if name != "step"] == [name for name in a.state[p] if name != "step"]
    set_gradients(all_params(b), 5)
    checked_step(b)


# Sizes ----------------------------------------------------------------------------------------------------------------


def saved_size(thing: Any, way: str) -> int:
    if way == "pickle":
        return len(pickle.dumps(thing))
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getbuffer().nbytes


@every
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
