"""`convert_state`: states as other libraries have them. `checkpoints/peers.pt` was written by bitsandbytes 0.50.2 and
flashoptim 0.1.4 (in Triton's interpreter), with what these decode their own states to."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from cases import CLASSES, bf16, f32
from torch import Tensor, nn

import wd_kernels
from wd_kernels import convert_state
from wd_kernels.formats import MASTER_NAME
from wd_kernels.reference import load

PEERS: dict[str, Any] = torch.load(Path(__file__).parent / "checkpoints" / "peers.pt", weights_only=True)
NAMES = {"adamw": ["exp_avg", "exp_avg_sq"], "sgdw": ["momentum_buffer"], "adagradw": ["sum"]}


def close(found: Tensor, exact: Tensor, ulps: float = 4) -> None:
    assert bool(((found - exact).abs() <= ulps * 2**-23 * exact.abs()).all())


def goes_on(rule: str, params: list[Any], state: dict[str, Any], **options: Any) -> Any:
    """An optimizer that loads it, and takes a step."""
    opt = CLASSES[rule](params, lr=0.5, **options)
    opt.load_state_dict(state)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    return opt


@pytest.mark.parametrize("rule", NAMES)
def test_bitsandbytes(rule: str) -> None:
    saved = PEERS[f"bitsandbytes {rule}"]
    found = convert_state(saved["state"], source="bitsandbytes")
    for name, exact in zip(NAMES[rule], saved["exact"], strict=True):
        assert exact.abs().max() > 0
        assert_same_bits(found["state"][0][name], exact)
        assert found["state"][1][name].dtype == f32
        assert bool(found["state"][1][name].any())  # a short one, which is not quantised
    params = [nn.Parameter(p.clone()) for p in saved["params"]]
    live: dict[str, Any] = {"weight_decay": 0.1} if rule == "adamw" else {"momentum": 0.9} if rule == "sgdw" else {}
    opt = goes_on(rule, params, found, **live)
    assert [float(opt.state[p]["step"]) for p in params] == [4, 4]
    assert opt.param_groups[0]["lr"] == 0.01
    if rule == "sgdw":
        assert opt.param_groups[0]["momentum"] == 0.9
        close(opt.state[params[0]]["momentum_buffer"], 0.9 * saved["exact"][0] + 1)
    back = convert_state(opt.state_dict(), target="bitsandbytes", groups=saved["state"]["param_groups"])
    own = back["state"][0]["__bnb_optimizer_quant_state__"]
    assert [*own] == [f"state{k + 1}" for k in range(len(NAMES[rule]))]
    assert_same_bits(own["state1"], opt.state[params[0]][NAMES[rule][0]])
    assert set(back["param_groups"][0]) == set(saved["state"]["param_groups"][0])
    again = convert_state(back, source="bitsandbytes")
    for name in NAMES[rule]:
        assert_same_bits(again["state"][0][name], opt.state[params[0]][name])


@pytest.mark.parametrize("width", [3, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_flashoptim(dtype: str, width: int) -> None:
    kept = PEERS[f"flashoptim {dtype} {width}"]
    p = nn.Parameter(kept["p"])
    errors = kept["error_bits"].to(p.dtype) if width == 3 else kept["error_bits"].view(p.dtype)
    state: dict[str, Any] = {"step": torch.tensor(5), "error_bits": errors}
    for name in ("exp_avg", "exp_avg_sq"):
        codes, scales, _ = kept[name]
        scales = scales.view(bf16) if p.dtype == bf16 else scales  # as it hides them from a cast
        state |= {f"{name}::quantized": codes, f"{name}::scales": scales}
    groups = [{"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "master_bytewidth": width,
               "params": [0]}]  # fmt: skip
    saved = {"state": {0: state}, "param_groups": groups}
    found = convert_state(saved, source="flashoptim", params=[p])
    own = found["state"][0]
    for name in ("exp_avg", "exp_avg_sq"):
        close(own[name], kept[name][2])
    close(own[MASTER_NAME], kept["exact"], 1)
    opt = goes_on("adamw", [p], found, master_weights="float32")
    assert float(opt.state[p]["step"]) == 6
    with pytest.raises(ValueError, match=r"parameter 0 has error bits: give the parameters"):
        convert_state(saved, source="flashoptim")
    # And back, from the master: error bits to 1/254 of a last place, or 1/65534.
    q = nn.Parameter(kept["p"])
    ours = wd_kernels.AdamW([q], master_weights="float32")
    ours.load_master_weights({0: kept["master"]})
    assert_same_bits(q.detach(), kept["p"])
    q.grad = torch.zeros_like(q)
    back = convert_state(ours.state_dict() | {"state": {0: dict(ours.state[q])}}, target="flashoptim", params=[q])
    assert back["param_groups"][0]["master_bytewidth"] == 4
    assert back["state"][0]["error_bits"].dtype == q.dtype
    again = convert_state(back, source="flashoptim", params=[q])["state"][0][MASTER_NAME]
    ulp = (q.detach().float().abs() * (2**-7 if q.dtype == bf16 else 2**-10)).clamp(min=2**-24)
    assert bool(((again - kept["master"]).abs() <= ulp / 65534 + kept["master"].abs() * 2**-23).all())


def test_flashoptims_remainder_of_8_bits() -> None:
    p = nn.Parameter(torch.linspace(-1, 1, 1000).to(bf16))
    opt = wd_kernels.AdamW([p], lr=0.003, master_weights="split24")
    for t in range(3):
        p.grad = torch.linspace(-2, 1, 1000).roll(t).to(bf16)
        opt.step()
    back = convert_state(opt.state_dict(), target="flashoptim", params=[p])
    assert back["param_groups"][0]["master_bytewidth"] == 3
    again = convert_state(back, source="flashoptim", params=[p])["state"][0]
    exact = opt.get_master_weights()[0]
    assert bool(((again[MASTER_NAME] - exact).abs() <= p.detach().float().abs() * 2**-7 / 254 + 1e-9).all())
    assert float((p.detach().float() - exact).abs().max()) > 100 * float((again[MASTER_NAME] - exact).abs().max())
    assert_same_bits(again["exp_avg"], opt.state[p]["exp_avg"])


class Quantised(Tensor):
    """What torchao has as a state: codes, values, scales, and a way to decode them."""

    codes: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        return (self.codes.float().view(-1, 256) * self.scale[:, None]).view(self.codes.shape)


def test_torchao() -> None:
    states = []
    for k in range(2):
        own = torch.zeros(32, 32).as_subclass(Quantised)
        own.codes = (torch.arange(1024).view(32, 32) * (k + 3) % 251).to(torch.uint8)
        own.scale = torch.tensor([0.1, 2.0, 0.01, 3.0])
        states.append(own)
    group = {"lr": torch.tensor(0.25), "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "params": [0, 1]}
    plain = {"step": torch.tensor(3.0), "exp_avg": torch.ones(5), "exp_avg_sq": torch.full((5,), 2.0)}
    saved = {"state": {0: {**plain, "exp_avg": states[0], "exp_avg_sq": states[1]}, 1: plain}, "param_groups": [group]}
    found = convert_state(saved, source="torchao")
    assert found["param_groups"][0]["lr"] == 0.25
    assert type(found["param_groups"][0]["lr"]) is float
    for own, name in zip(states, ("exp_avg", "exp_avg_sq"), strict=True):
        assert_same_bits(found["state"][0][name].as_subclass(Tensor), own.dequantize().as_subclass(Tensor))
    assert torch.equal(found["state"][1]["exp_avg"], torch.ones(5))
    back = convert_state(found, target="torchao")
    assert torch.equal(back["param_groups"][0]["lr"], torch.tensor(0.25))
    assert back["state"][1]["exp_avg_sq"].dtype == f32


@pytest.mark.parametrize("word", ["float32", "split32"])
def test_transformer_engine(word: str) -> None:
    """Its remainder: the lower 16 bits, where a negative one has carried into the parameter."""
    master = torch.tensor([1.0, 1.001953, -1.00390625, 3.14159, -1e-30, 65504.0])
    bits = master.view(torch.int32)
    remainder = bits.short()
    p = nn.Parameter(((bits >> 16) + (remainder < 0)).short().view(bf16))
    moments = {"exp_avg": torch.ones(6), "exp_avg_sq": torch.full((6,), 2.0)}
    part = master if word == "float32" else remainder
    saved = {"state": {0: {**moments, "master_param": part}}, "param_groups": [{"lr": 0.5, "step": 7, "params": [0]}]}
    found = convert_state(saved, source="transformer_engine")
    opt = wd_kernels.AdamW([p], lr=0.5, master_weights=word)
    opt.load_state_dict(found)
    assert_same_bits(opt.get_master_weights()[0], master)
    assert float(opt.state[p]["step"]) == 7
    assert "step" not in opt.param_groups[0]
    back = convert_state(opt.state_dict(), target="transformer_engine")
    assert back["param_groups"][0]["step"] == 7
    assert "step" not in back["state"][0]
    assert_same_bits(back["state"][0]["master_param"], part)
    q = nn.Parameter(torch.ones(3))
    opt.add_param_group({"params": [q]})
    opt.param_groups[0]["params"].append(opt.param_groups.pop()["params"][0])
    q.grad = torch.ones(3)
    opt.step()
    with pytest.raises(ValueError, match=r"parameters of one group have taken \[1, 7\] steps"):
        convert_state(opt.state_dict(), target="transformer_engine")
    split = wd_kernels.AdamW([p], master_weights="split24")
    p.grad = torch.ones_like(p)
    split.step()
    with pytest.raises(TypeError, match="parameter 0 has a remainder of 8 bits"):
        convert_state(split.state_dict(), target="transformer_engine")


def test_torch() -> None:
    p = nn.Parameter(torch.ones(5, dtype=bf16))
    opt = wd_kernels.AdamW([p], master_weights=True)
    p.grad = torch.ones_like(p)
    opt.step()
    with pytest.warns(UserWarning, match="torch has no place for 'master_param' of its parameters: left behind"):
        written = convert_state(opt.state_dict(), target="torch")
    assert set(written["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    theirs = torch.optim.AdamW([p])
    theirs.load_state_dict(written)
    assert convert_state(theirs.state_dict(), source="torch")["state"][0]["exp_avg"].dtype == bf16
    assert MASTER_NAME in opt.state_dict()["state"][0]


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, r"source=None, target=None: one of them must be given, 'torch', 'transformer_engine'"),
    ({"source": "torch", "target": "torch"}, ValueError, "one of them must be given"),
    (
        {"source": "lion"},
        ValueError,
        r"source='lion': allowed are 'torch', 'transformer_engine', 'apex', 'deepspeed', 'optimi'",
    ),
    ({"target": "auto"}, ValueError, "target='auto': allowed are"),
    ({"source": "torch", "params": []}, ValueError, "0 params are given, and the state is one of 1"),
    ({"target": "torch", "groups": []}, ValueError, "groups have other numbers of parameters"),
]


@pytest.mark.parametrize(("options", "kind", "message"), WRONG)
def test_what_is_wrong_is_said(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    saved = {"state": {0: {"step": 1}}, "param_groups": [{"params": [0]}]}
    with pytest.raises(kind, match=message):
        convert_state(saved, **options)


def test_states_that_are_none() -> None:
    with pytest.raises(TypeError, match="state_dict is a list: expected one of an optimizer"):
        convert_state([], source="torch")  # type: ignore[arg-type]
    groups = [{"params": [0], "betas": (0.9, 0.0)}]
    with pytest.raises(TypeError, match="the state of parameter 0 is a list: expected a dict"):
        convert_state({"state": {0: [1]}, "param_groups": groups}, source="torch")
    own = {"step": 1, "state1": torch.zeros(300, dtype=torch.uint8), "absmax1": torch.ones(3), "qmap1": torch.ones(256)}
    with pytest.raises(
        ValueError, match=r"'state1' of the state of parameter 0 has 300 codes and 3 scales: one for 256"
    ):
        convert_state({"state": {0: own}, "param_groups": groups}, source="bitsandbytes")
    with pytest.raises(ValueError, match="the group of the state of parameter 0 has no 'step'"):
        convert_state({"state": {0: {"exp_avg": 1}}, "param_groups": groups}, source="transformer_engine")
    lion = [{"params": [0], "betas": (0.9, 0.99)}]
    with pytest.raises(ValueError, match=r"has one moment and betas=\(0.9, 0.99\): it is of none of AdamW, SGD"):
        convert_state({"state": {0: {"step": 1, "state1": torch.ones(3)}}, "param_groups": lion}, source="bitsandbytes")
    with pytest.raises(TypeError, match="param group 0 of state_dict is no dict with 'params'"):
        convert_state({"state": {}, "param_groups": [{"lr": 1}]}, source="torch")
    with pytest.raises(ValueError, match=r"a group has no betas.*groups=its.param_groups"):
        convert_state({"state": {0: {"step": 1, "sum": torch.ones(3)}}, "param_groups": [{"params": [0]}]},
                      target="bitsandbytes")  # fmt: skip
    turned = {"step": 1, "exp_avg_sq": torch.full((3,), 2.0), "exp_avg": torch.ones(3)}
    made = convert_state({"state": {0: turned}, "param_groups": groups}, target="bitsandbytes")["state"][0]
    assert torch.equal(made["__bnb_optimizer_quant_state__"]["state1"], torch.ones(3))
    bits = {"error_bits": torch.zeros(4, dtype=bf16)}
    with pytest.raises(ValueError, match=r"the error bits of .*shape \(4,\), its parameter \(3,\)"):
        convert_state({"state": {0: bits}, "param_groups": [{"params": [0], "master_bytewidth": 3}]},
                      source="flashoptim", params=(p for p in [torch.ones(3, dtype=bf16)]))  # fmt: skip
    amsgrad = {name: torch.ones(3) for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
    with pytest.raises(ValueError, match="parameter 0 has 3 states: theirs has two at most"):
        convert_state({"state": {0: amsgrad}, "param_groups": groups}, target="bitsandbytes")


# apex, DeepSpeed, optimi: their layouts by hand, of states that torch's classes made in float64 -----------------------

LR, BETAS, EPS, DECAY = 0.02, (0.8, 0.95), 1e-6, 0.3


def double_params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(11)
    return [nn.Parameter(torch.randn(shape, generator=generator).double()) for shape in ((40,), (5, 3))]


def train(opt: torch.optim.Optimizer, params: list[nn.Parameter], first: int, last: int) -> None:
    for t in range(first, last):
        for k, p in enumerate(params):
            p.grad = torch.arange(p.numel()).mul(0.3 * (k + 1)).add(t).sin().view(p.shape).to(p.dtype) * (1 + t % 3)
        opt.step()


def as_theirs(library: str, state: dict[str, Any], decay: str) -> dict[str, Any]:
    """What their optimizer would have saved in the place of torch's AdamW or Adam, after its source."""
    own = {k: {name: v.float() for name, v in value.items()} for k, value in state["state"].items()}
    steps = int(own[0]["step"])
    group = {"lr": LR, "weight_decay": DECAY, "eps": EPS, "betas": BETAS, "bias_correction": True, "params": [0, 1]}
    moments = {k: {"exp_avg": value["exp_avg"], "exp_avg_sq": value["exp_avg_sq"]} for k, value in own.items()}
    if library == "apex":
        group["step"] = steps
    elif library == "apex, capturable":
        group |= {"step": torch.tensor([steps], dtype=torch.int), "lr": torch.tensor(LR)}
    elif library == "DeepSpeedCPUAdam":
        group["amsgrad"] = False
        moments = {k: {"step": steps, **value} for k, value in moments.items()}
    elif library == "DeepSpeed's FusedAdam":  # which counts in the last parameter of a group
        moments = {k: {"step": steps if k == 1 else 0, **value} for k, value in moments.items()}
    else:
        del group["betas"], group["bias_correction"]
        words = {"decouple_wd": decay != "l2", "decouple_lr": False, "max_lr": None, "kahan_sum": None, "foreach": None,
                 "triton": False, "gradient_release": False, "setup": True}  # fmt: skip
        group |= {"beta1": BETAS[0], "beta2": BETAS[1], "step": torch.tensor(steps, dtype=torch.int32), **words}
        biases = {"exp_avg": 1 - BETAS[0] ** steps, "exp_avg_sq": 1 - BETAS[1] ** steps}
        moments = {
            k: {**{name: (v.double() / biases[name]).float() for name, v in value.items()}, "kahan_comp": None}
            for k, value in moments.items()
        }
    return {"state": moments, "param_groups": [group]}


THEIRS = ["apex", "apex, capturable", "DeepSpeedCPUAdam", "DeepSpeed's FusedAdam", "optimi"]


@pytest.mark.parametrize("decay", ["lr_scaled", "l2"])
@pytest.mark.parametrize("who", THEIRS)
def test_what_others_have_of_adamw(who: str, decay: Any) -> None:
    source: Any = "apex" if "apex" in who else "deepspeed" if "Deep" in who else "optimi"
    kind = torch.optim.AdamW if decay == "lr_scaled" else torch.optim.Adam
    whole = double_params()
    theirs = kind(whole, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    train(theirs, whole, 0, 5)
    params = [nn.Parameter(p.detach().float()) for p in whole]
    saved = as_theirs(who, theirs.state_dict(), decay)
    kept = copy.deepcopy(saved)
    found = convert_state(saved, source=source)
    assert saved["param_groups"] == kept["param_groups"]
    opt = wd_kernels.AdamW(params, lr=0.5, decay=decay, weight_decay=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(found)
    assert opt.param_groups[0]["lr"] == pytest.approx(LR)
    assert not {"bias_correction", "step", "beta1", "kahan_sum"} & set(opt.param_groups[0])
    train(theirs, whole, 5, 9)
    train(opt, params, 5, 9)
    for p, q in zip(params, whole, strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=2e-6, atol=2e-6)

    back = convert_state(opt.state_dict(), target=source, groups=saved["param_groups"])
    like = as_theirs(who, theirs.state_dict(), decay)
    assert {k: set(v) for k, v in back["state"].items()} == {k: set(v) for k, v in like["state"].items()}
    assert set(back["param_groups"][0]) >= set(like["param_groups"][0])
    for k, own in like["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(back["state"][k][name], own[name], rtol=2e-5, atol=1e-6)
        if "Deep" in who:
            assert back["state"][k]["step"] == 9
            assert type(back["state"][k]["step"]) is int
    if "Deep" not in who:
        assert int(back["param_groups"][0]["step"]) == 9
    if who == "optimi":
        group = back["param_groups"][0]
        assert group["setup"] is True  # else it counts from 0
        assert group["decouple_wd"] is (decay == "lr_scaled")


@pytest.mark.parametrize("dampening", [0.0, 0.8])
def test_optimi_s_sgd(dampening: float) -> None:
    """Its momentum is torch's buffer, of gradients or, with its dampening, of 1 - momentum of them."""
    whole = double_params()
    theirs = torch.optim.SGD(whole, lr=LR, momentum=0.8, dampening=dampening, weight_decay=DECAY)
    train(theirs, whole, 0, 5)
    buffers = {k: {"exp_avg": own["momentum_buffer"].float(), "kahan_comp": None} for k, own in
               theirs.state_dict()["state"].items()}  # fmt: skip
    group = {"lr": LR, "momentum": 0.8, "weight_decay": DECAY, "dampening": dampening > 0, "decouple_wd": False,
             "decouple_lr": False, "max_lr": None, "kahan_sum": None, "torch_init": False, "setup": True,
             "params": [0, 1]}  # fmt: skip
    found = convert_state({"state": buffers, "param_groups": [group]}, source="auto")
    params = [nn.Parameter(p.detach().float()) for p in whole]
    opt = wd_kernels.SGDW(params, lr=0.5, momentum=0.1, decay="l2")
    opt.load_state_dict(found)
    train(theirs, whole, 5, 9)
    train(opt, params, 5, 9)
    for p, q in zip(params, whole, strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=2e-6, atol=2e-6)
    back = convert_state(opt.state_dict(), target="optimi")
    assert back["param_groups"][0]["dampening"] is (dampening > 0)
    assert_same_bits(back["state"][1]["exp_avg"], opt.state[params[1]]["momentum_buffer"])
    opt.param_groups[0]["dampening"] = 0.5
    with pytest.raises(ValueError, match=r"dampening=0.5, momentum=0.8: optimi's is 0 or as the momentum"):
        convert_state(opt.state_dict(), target="optimi")


def test_optimi_s_decay_that_follows_no_lr() -> None:
    """1 - (lr / max_lr) weight_decay, which is ours of schedule="from_lr"; worked out by hand."""
    state = {"exp_avg": torch.zeros(1), "exp_avg_sq": torch.ones(1), "kahan_comp": None}
    group = {"lr": 0.25, "beta1": 0.5, "beta2": 0.5, "eps": 0.0, "weight_decay": 0.5, "decouple_wd": True,
             "decouple_lr": True, "max_lr": 1.0, "kahan_sum": None, "step": 3, "params": [0]}  # fmt: skip
    saved = {"state": {0: state}, "param_groups": [group]}
    with pytest.warns(UserWarning, match=r"lr=0.25, max_lr=1: .*schedule='from_lr'"):
        found = convert_state(saved, source="optimi")
    p = nn.Parameter(torch.tensor([8.0]))
    opt = wd_kernels.AdamW([p], lr=1.0, weight_decay=0.5, decay="independent", schedule="from_lr")
    opt.load_state_dict(found)
    p.grad = torch.zeros(1)
    opt.step()
    assert p.item() == 8.0 * (1 - 0.25 * 0.5)
    back = convert_state(opt.state_dict(), target="optimi")["param_groups"][0]
    assert (back["lr"], back["max_lr"], back["decouple_lr"], back["weight_decay"]) == (0.25, 1.0, True, 0.5)


def test_kahan_s_compensation_is_a_master() -> None:
    p = nn.Parameter(torch.tensor([1.0, -3.0, 0.5, 2.0**-20], dtype=bf16))
    rest = torch.tensor([2.0**-10, -(2.0**-9), 2.0**-30, -(2.0**-31)], dtype=bf16)
    exact = torch.tensor([1.0 + 2.0**-10, -3.0 - 2.0**-9, 0.5, 2.0**-20 - 2.0**-31])  # 2**-30 is below 0.5's last place
    moments = {"exp_avg": torch.ones(4, dtype=bf16), "exp_avg_sq": torch.ones(4, dtype=bf16)}
    group = {"lr": 0.5, "beta1": 0.5, "beta2": 0.75, "eps": 0.0, "weight_decay": 0.0, "decouple_wd": True,
             "decouple_lr": False, "max_lr": None, "kahan_sum": True, "step": 2, "params": [0]}  # fmt: skip
    saved = {"state": {0: {**moments, "kahan_comp": rest}}, "param_groups": [group]}
    own = convert_state(saved, source="optimi", params=[p])["state"][0]
    assert_same_bits(own[MASTER_NAME], exact)
    assert_same_bits(own["exp_avg"], torch.full((4,), 1 - 0.5**2))
    assert_same_bits(own["exp_avg_sq"], torch.full((4,), 1 - 0.75**2))
    opt = wd_kernels.AdamW([p], lr=0.5, master_weights="float32")
    opt.load_state_dict(convert_state(saved, source="optimi", params=[p]))
    back = convert_state(opt.state_dict(), target="optimi", params=[p])
    assert back["param_groups"][0]["kahan_sum"] is True
    assert_same_bits(back["state"][0]["kahan_comp"][[0, 1, 3]], rest[[0, 1, 3]])
    assert_same_bits(back["state"][0]["exp_avg"], torch.ones(4))
    with pytest.raises(ValueError, match="has a compensation: give the parameters that it belongs to"):
        convert_state(saved, source="optimi")
    with pytest.raises(ValueError, match="has a master weight: give the parameters that it belongs to"):
        convert_state(opt.state_dict(), target="optimi")
    with pytest.raises(ValueError, match=r"compensation of .*shape \(4,\), its parameter \(5,\)"):
        convert_state(saved, source="optimi", params=[torch.ones(5, dtype=bf16)])


def test_apex_s_sgd() -> None:
    buffers = {0: {"momentum_buffer": torch.ones(3)}}
    group = {"lr": 0.5, "momentum": 0.5, "dampening": 0.0, "weight_decay": 0.25, "nesterov": False, "params": [0]}
    p = nn.Parameter(torch.full((3,), 4.0))
    opt = wd_kernels.SGDW([p], lr=0.1, momentum=0.1, decay="l2")
    opt.load_state_dict(convert_state({"state": buffers, "param_groups": [group]}, source="apex"))
    p.grad = torch.full((3,), 1.0)
    opt.step()  # the buffer is 0.5 + 1 + 0.25 * 4, and moves by half of it
    assert p.tolist() == [4 - 0.5 * 2.5] * 3
    back = convert_state(opt.state_dict(), target="apex")
    assert back["state"][0]["momentum_buffer"].tolist() == [2.5] * 3
    assert "step" not in {*back["state"][0], *back["param_groups"][0]}


# What has no equal ----------------------------------------------------------------------------------------------------


def stepped(rule: str, **options: Any) -> dict[str, Any]:
    """A state of ours, after two steps."""
    p = nn.Parameter(torch.linspace(-1, 1, 64).to(options.pop("dtype", f32)))
    opt = CLASSES[rule]([p], lr=0.1, **options)
    for _ in range(2):
        p.grad = torch.linspace(0.5, 1, 64).to(p.dtype)
        opt.step()
    return opt.state_dict()


LOSES: list[tuple[str, str, dict[str, Any], str]] = [
    ("torch", "adamw", {"decay": "independent", "weight_decay": 1e-3},
     r"param group 0 has decay='independent', weight_decay=0.001: of 'torch' AdamW does lr_scaled and l2. Carry .*"
     r"convert_weight_decay\(0.001, 'independent', 'lr_scaled', lr=0.1, rule='adamw'\)"),
    ("torch", "sgdw", {"decay": "lr_scaled", "momentum": 0.9, "weight_decay": 0.1},
     r"of 'torch' SGDW does l2.*momentum=0.9"),
    ("torch", "adamw", {"decay": "proximal", "weight_decay": 0.1}, "has decay='proximal'"),
    ("bitsandbytes", "adamw", {"decay": "l2", "weight_decay": 0.1}, "of 'bitsandbytes' AdamW does lr_scaled"),
    ("apex", "adamw", {"decay": "independent", "weight_decay": 0.1}, "of 'apex' AdamW does lr_scaled and l2"),
    ("apex", "adagradw", {}, "is one of AdagradW, which 'apex' has no layout for"),
    ("deepspeed", "sgdw", {}, "is one of SGDW, which 'deepspeed' has no layout for"),
    ("optimi", "adamw", {"decay": "metric_proximal", "weight_decay": 0.1}, "does lr_scaled and l2 and independent"),
    ("optimi", "adamw", {"amsgrad": True}, "has amsgrad=True, which AdamW of 'optimi' has not"),
    ("optimi", "sgdw", {"momentum": 0.9, "nesterov": True}, "has nesterov=True, which SGDW of 'optimi' has not"),
    ("deepspeed", "adamw", {"maximize": True}, "has maximize=True"),
    ("torch", "sgdw", {"momentum": 0.9, "form": "paper"}, "has form='paper'"),
    ("torch", "adamw", {"weight_decay": 0.1, "decay_center": 1.0}, "has decay_center=1.0"),
    ("flashoptim", "adamw", {"weight_decay": 0.1, "cautious": True}, "has cautious=True"),
    ("optimi", "adamw", {"weight_decay": 0.1, "decay": "independent",
                         "schedule": wd_kernels.NormalizedDecay(wd_kernels.schedules.Cosine(8))},
     r"has schedule='NormalizedDecay\("),
]  # fmt: skip


@pytest.mark.parametrize(("library", "rule", "options", "message"), LOSES)
def test_what_would_train_otherwise_is_an_error(library: Any, rule: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_state(stepped(rule, **options), target=library)


@pytest.mark.parametrize("decay", ["lr_scaled", "l2"])
def test_torch_s_adam_decays_as_ours_did(decay: Any) -> None:
    """torch's Adam does either, by a flag of its groups: that of the live one does not outlive the saved mode."""
    state = stepped("adamw", decay=decay, weight_decay=0.5)
    p, q = (nn.Parameter(torch.linspace(-1, 1, 64).double()) for _ in range(2))
    theirs = torch.optim.Adam([p], decoupled_weight_decay=decay == "l2")
    theirs.load_state_dict(convert_state(state, target="torch", groups=theirs.param_groups))
    ours = wd_kernels.AdamW([q], decay=decay)
    ours.load_state_dict(state)
    train(theirs, [p], 0, 3)
    train(ours, [q], 0, 3)
    torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-6)


def test_bitsandbytes_says_its_decay() -> None:
    """Its Adam decays weights as its AdamW does: a live optimizer of another mode keeps its own, and says so."""
    saved = PEERS["bitsandbytes adamw"]
    decay = saved["state"]["param_groups"][0]["weight_decay"]
    assert decay > 0
    opt = wd_kernels.AdamW([nn.Parameter(p.clone()) for p in saved["params"]], decay="l2", weight_decay=0.7)
    with pytest.warns(UserWarning, match=r"decay='lr_scaled'.*goes on with its own"):
        opt.load_state_dict(convert_state(saved["state"], source="bitsandbytes"))
    assert opt.param_groups[0]["weight_decay"] == 0.7


def test_decay_of_nothing_has_every_mode() -> None:
    state = stepped("adamw", decay="independent", weight_decay=0.0)
    assert convert_state(state, target="torch")["param_groups"][0]["weight_decay"] == 0.0


def test_what_is_left_behind_is_said() -> None:
    state = stepped("adamw", dtype=bf16, master_weights=True, ema_decay=0.9, weight_decay=0.1,
                    schedule=wd_kernels.schedules.Cosine(8))  # fmt: skip
    with pytest.warns(UserWarning, match=r"apex has no place for 'ema' .*'master_param' .*schedule=Cosine.*eta=0.9"):
        found = convert_state(state, target="apex")
    assert set(found["state"][0]) == {"exp_avg", "exp_avg_sq"}
    with pytest.warns(UserWarning, match="transformer_engine has no place for 'ema'"):
        found = convert_state(state, target="transformer_engine")
    assert set(found["state"][0]) == {"exp_avg", "exp_avg_sq", MASTER_NAME}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_state(stepped("adamw", schedule="from_lr"), target="torch")


def test_counts_of_a_group_that_has_one() -> None:
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = wd_kernels.AdamW([p, q])
    for own in ([p], [p, q]):
        for one in own:
            one.grad = torch.ones(3)
        opt.step()
        opt.zero_grad()
    for library in ("apex", "optimi"):
        with pytest.raises(ValueError, match=r"have taken \[1, 2\] steps: theirs has one count"):
            convert_state(opt.state_dict(), target=library)
    made = convert_state(opt.state_dict(), target="deepspeed")  # DeepSpeedCPUAdam counts each
    assert [made["state"][k]["step"] for k in range(2)] == [2, 1]
    fused = [{"lr": 1, "betas": (0.9, 0.99), "bias_correction": True, "weight_decay": 0, "eps": 0, "params": [0, 1]}]
    with pytest.raises(ValueError, match=r"have taken \[1, 2\] steps: FusedAdam has one count"):
        convert_state(opt.state_dict(), target="deepspeed", groups=fused)


# Whose it is ----------------------------------------------------------------------------------------------------------


def test_whose_a_state_is_by_its_keys() -> None:
    p = nn.Parameter(torch.ones(3))
    theirs = torch.optim.AdamW([p])
    train(theirs, [p], 0, 2)
    for who in THEIRS:
        state = as_theirs(who, {"state": {k: theirs.state_dict()["state"][0] for k in range(2)}}, "lr_scaled")
        if "apex" in who:
            with pytest.raises(ValueError, match=r"source='auto': the state may be of 'transformer_engine' or 'apex'"):
                convert_state(state, source="auto")
            continue
        expected = "optimi" if who == "optimi" else "deepspeed"
        assert wd_kernels.state_conversion.identified(state) == expected
    assert wd_kernels.state_conversion.identified(theirs.state_dict()) == "torch"
    assert wd_kernels.state_conversion.identified(PEERS["bitsandbytes adamw"]["state"]) == "bitsandbytes"
    with pytest.raises(ValueError, match="has no key by which a library is known"):
        convert_state({"state": {0: {"sum": torch.ones(1)}}, "param_groups": [{"params": [0]}]}, source="auto")


FOREIGN: list[tuple[type[torch.optim.Optimizer], str]] = [
    (torch.optim.Adafactor, "Adafactor"), (torch.optim.NAdam, "NAdam"), (torch.optim.Adamax, "Adamax"),
    (torch.optim.RMSprop, "RMSprop"), (torch.optim.Adadelta, "Adadelta"), (torch.optim.ASGD, "ASGD"),
    (torch.optim.Rprop, "Rprop"), (torch.optim.Muon, "Muon"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), FOREIGN)
def test_other_rules_are_refused_by_name(kind: Any, name: str) -> None:
    p = nn.Parameter(torch.ones(4, 4))
    theirs = kind([p])
    train(theirs, [p], 0, 2)
    for source in ("torch", "auto"):
        with pytest.raises(ValueError, match=rf"has '\w+': it is {name}'s, and nothing here goes on with that"):
            convert_state(theirs.state_dict(), source=source)


def test_radam_is_refused_though_its_states_are_those_of_adam() -> None:
    theirs = torch.optim.RAdam([p := nn.Parameter(torch.ones(4))])
    train(theirs, [p], 0, 2)
    for source in ("torch", "auto"):
        with pytest.raises(ValueError, match="it is RAdam's, and nothing here goes on with that"):
            convert_state(theirs.state_dict(), source=source)


@pytest.mark.parametrize(
    ("own", "eps", "message"),
    [
        ({}, 1e-8, "eps=1e-08, which SGD has not: it is RMSprop's"),  # its alpha is where SGD's momentum is
        ({"unorm_vec": torch.ones(1)}, 0.0, "has 'unorm_vec': it is LARS or LAMB's"),
    ],
)
def test_other_rules_of_bitsandbytes(own: dict[str, Any], eps: float, message: str) -> None:
    hidden = {"step": 3, "__bnb_optimizer_quant_state__": {"state1": torch.ones(3), **own}}
    group = {"lr": 0.1, "betas": (0.9, 0), "eps": eps, "weight_decay": 0, "params": [0]}
    for source in ("bitsandbytes", "auto"):
        with pytest.raises(ValueError, match=message):
            convert_state({"state": {0: hidden}, "param_groups": [group]}, source=source)


@pytest.mark.parametrize("library", ["transformer_engine", "apex"])
def test_sgd_has_no_count_there(library: Any) -> None:
    """Its masters are there without momentum, too, and a count of 0 would say that they are of no step."""
    params = [nn.Parameter(torch.linspace(-1, 1, 9).to(bf16)) for _ in range(2)]
    opt = wd_kernels.SGDW(params, lr=0.1, master_weights=True, decay="l2")
    train(opt, params, 0, 2)
    saved = opt.state_dict()
    with warnings.catch_warnings(record=True):
        theirs = convert_state(saved, target=library)
    assert "step" not in theirs["param_groups"][0]
    if library == "transformer_engine":
        new = wd_kernels.SGDW([nn.Parameter(p.detach().clone()) for p in params], master_weights=True, decay="l2")
        new.load_state_dict(convert_state(theirs, source=library))
        assert_same_bits(new.state_dict()["state"][1][MASTER_NAME], saved["state"][1][MASTER_NAME])

    opt = wd_kernels.SGDW(params, lr=0.1, momentum=0.9, decay="l2", state_dtype="int8")
    for own in (params[:1], params):  # each counts its own, as its rounding wants
        opt.zero_grad()
        for p in own:
            p.grad = torch.ones_like(p)
        opt.step()
    assert [float(own["step"]) for own in opt.state_dict()["state"].values()] == [2, 1]
    theirs = convert_state(opt.state_dict(), target=library)
    assert [set(own) for own in theirs["state"].values()] == [{"momentum_buffer"}] * 2


def test_deepspeed_s_adagrad_begins_with_states() -> None:
    params = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    opt = wd_kernels.AdagradW(params, lr=0.1, decay="l2")
    params[0].grad = torch.ones(4)
    opt.step()
    saved = opt.state_dict()
    found = convert_state(convert_state(saved, target="deepspeed"), source="deepspeed")
    assert [float(found["state"][k]["step"]) for k in range(2)] == [float(saved["state"][k]["step"]) for k in range(2)]


def test_flashoptim_and_back_with_split_masters() -> None:
    p = nn.Parameter(torch.linspace(-1, 1, 64).to(bf16))
    opt = wd_kernels.AdamW([p], lr=0.01, master_weights="split32")
    train(opt, [p], 0, 3)
    theirs = convert_state(opt.state_dict(), target="flashoptim", params=[p])
    new = wd_kernels.AdamW([q := nn.Parameter(p.detach().clone())], lr=0.01, master_weights="split32")
    new.load_state_dict(convert_state(theirs, source="flashoptim", params=[p]), convert_states=True)
    masters = [load(x.detach(), f32, own.state[x][MASTER_NAME]) for x, own in ((q, new), (p, opt))]
    assert bool((masters[1] != p).any())
    assert bool(((masters[0] - masters[1]).abs() <= masters[1].abs() * 2**-21).all())  # 1/65534 of a last place


def test_bitsandbytes_has_no_sgd_without_momentum() -> None:
    opt = wd_kernels.SGDW([p := nn.Parameter(torch.ones(4).to(bf16))], lr=0.1, master_weights=True, decay="l2")
    train(opt, [p], 0, 2)
    groups = [{"lr": 0.1, "betas": (0, 0), "params": [0]}]
    with pytest.raises(ValueError, match="is one of SGD without momentum, which bitsandbytes has not"):
        convert_state(opt.state_dict(), target="bitsandbytes", groups=groups)


@pytest.mark.parametrize("source", ["bitsandbytes", "optimi", "deepspeed", "transformer_engine", "apex"])
def test_a_state_of_torch_under_another_name(source: Any) -> None:
    p = nn.Parameter(torch.ones(3))
    theirs = torch.optim.AdamW([p])
    train(theirs, [p], 0, 2)
    if source in ("bitsandbytes", "optimi"):
        with pytest.raises(ValueError, match=rf"parameter 0 is none of '{source}': it has no '\w+'; the state has"):
            convert_state(theirs.state_dict(), source=source)
        with pytest.raises(ValueError, match="a group is none of optimi's Adam, AdamW and SGD: it has"):
            convert_state({**theirs.state_dict(), "state": {}}, source="optimi")
    else:  # whose states have all that they need
        found = convert_state(theirs.state_dict(), source=source)
        assert float(found["state"][0]["step"]) == 2


def test_what_is_no_state_of_others() -> None:
    part = {"zero_stage": 2, "base_optimizer_state": [], "single_partition_of_fp32_groups": []}
    with pytest.raises(
        ValueError, match="one rank's part of DeepSpeed's ZeRO 2, with all parameters of a group in one"
    ):
        convert_state(part, source="deepspeed")
    group = {"params": [0], "betas": (0.9, 0.99), "bias_correction": False, "step": 1}
    moments = {"exp_avg": torch.ones(1), "exp_avg_sq": torch.ones(1)}
    for source in ("apex", "transformer_engine", "deepspeed"):
        with pytest.raises(ValueError, match="bias_correction=False: AdamW here corrects the bias"):
            convert_state({"state": {0: {**moments, "step": 1}}, "param_groups": [group]}, source=source)
    lion = {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{"params": [0], "betas": (0.9, 0.99)}]}
    with pytest.raises(ValueError, match="has 'exp_avg' and no 'exp_avg_sq', as Lion's"):
        convert_state(lion, source="torch")
    own = {"step": 1, "state1": torch.ones(3), "state2": torch.ones(3)}
    ademamix = {"params": [0], "betas": (0.9, 0.99), "alpha": 5.0}
    with pytest.raises(ValueError, match=r"has alpha=5\.0: it is AdEMAMix's"):
        convert_state({"state": {0: own}, "param_groups": [ademamix]}, source="bitsandbytes")
    released = [{**as_theirs("optimi", {"state": {k: {"step": torch.tensor(1.0), **moments} for k in range(2)}},
                             "l2")["param_groups"][0], "gradient_release": True, "params": [0]}]  # fmt: skip
    with pytest.raises(ValueError, match="gradient_release=True: optimi loads no state"):
        convert_state(stepped("adamw"), target="optimi", groups=released)


@pytest.mark.parametrize(
    ("step", "raised"), [(-1, ValueError), (7.5, ValueError), ("7", TypeError), (math.nan, ValueError)]
)
@pytest.mark.parametrize("library", ["optimi", "apex", "bitsandbytes", "torch"])
def test_counts_are_whole_numbers(library, step, raised):
    """Of groups and of parameters, read and written: a negative one has no power of beta."""
    own = {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    group = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "params": [0]}
    counted = {"state": {0: own}, "param_groups": [{**group, "step": step}]}
    with pytest.raises(raised, match="'step' of the group of the state of parameter 0"):
        convert_state(counted, source=library)
    with pytest.raises(raised, match="'step' of the state of parameter 0"):
        convert_state({"state": {0: {**own, "step": step}}, "param_groups": [group]}, target=library)
