"""`convert_state`: states as other libraries have them. `checkpoints/peers.pt` was written by bitsandbytes 0.50.2 and
flashoptim 0.1.4 (in Triton's interpreter), with what these decode their own states to."""

from __future__ import annotations

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
    written = convert_state(opt.state_dict(), target="torch")
    assert set(written["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    theirs = torch.optim.AdamW([p])
    theirs.load_state_dict(written)
    assert convert_state(theirs.state_dict(), source="torch")["state"][0]["exp_avg"].dtype == bf16
    assert MASTER_NAME in opt.state_dict()["state"][0]


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ValueError, r"source=None, target=None: one of them must be given, 'torch', 'transformer_engine'"),
    ({"source": "torch", "target": "torch"}, ValueError, "one of them must be given"),
    ({"source": "apex"}, ValueError, r"source='apex': allowed are 'torch', 'transformer_engine', 'bitsandbytes'"),
    ({"target": "optimi"}, ValueError, "target='optimi': allowed are"),
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
