"""peft: LoRA of a small language model, whose adapters alone are trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

# isort: split
import peft
import pytest
import torch
import transformers

import wd_kernels

STEPS = 8
TOKENS = torch.arange(STEPS * 4 * 6).mul(7919).remainder(50).view(STEPS, 4, 6)
OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.3}
ADAPTERS = {
    "LoRA": {"init_lora_weights": "orthogonal"},  # else one of its two matrices begins as zeros
    "rsLoRA": {"init_lora_weights": "orthogonal", "use_rslora": True},
    "DoRA": {"init_lora_weights": "orthogonal", "use_dora": True},
}


def base() -> transformers.GPT2LMHeadModel:
    """The same whenever it is made: only adapters are saved."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=8, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def adapted(**options: Any) -> peft.PeftModel:
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM", **options
    )
    return peft.get_peft_model(base(), config)


def train(model: Any, opt: Any, steps: range) -> None:
    model.train()
    for t in steps:
        model(input_ids=TOKENS[t], labels=TOKENS[t]).loss.backward()
        opt.step()
        opt.zero_grad()


@pytest.mark.works("peft", "LoRA, rsLoRA, DoRA, adapters and optimizer saved")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(kind: str, tmp_path: Path) -> None:
    model, other = adapted(**ADAPTERS[kind]), adapted(**ADAPTERS[kind])
    before = copy.deepcopy(model.state_dict())
    opt = wd_kernels.AdamW(model.parameters(), **OPTIONS)  # of frozen parameters there is no gradient, no state
    train(model, opt, range(4))
    model.save_pretrained(tmp_path)
    torch.save(opt.state_dict(), tmp_path / "optimizer.pt")
    train(model, opt, range(4, 8))
    train(other, torch.optim.AdamW(other.parameters(), **OPTIONS), range(8))

    theirs = dict(other.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p, theirs[name], rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
            assert (p - before[name]).abs().max() > 0.02, name
        else:
            assert torch.equal(p, before[name])
    assert {id(p) for p in opt.state} == {id(p) for p in model.parameters() if p.requires_grad}

    again = peft.PeftModel.from_pretrained(base(), str(tmp_path), is_trainable=True)
    resumed = wd_kernels.AdamW(again.parameters(), **OPTIONS)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(again, resumed, range(4, 8))
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
