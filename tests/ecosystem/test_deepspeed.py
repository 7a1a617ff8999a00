"""DeepSpeed's ZeRO on two ranks: clipping and bfloat16 as its config says, its checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pair
import pytest
import torch
import torch.distributed as dist
from loops import BATCHES, new_model
from torch import Tensor, nn

import wd_kernels
from wd_kernels.schedules import Cosine

OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.3}
STAGES = (0, 1, 2, 3)


def engine(seed: int, ours: bool, stage: int, bfloat16: bool, clips: bool = True) -> Any:
    import deepspeed  # in the two processes alone

    os.environ["LOCAL_RANK"] = str(dist.get_rank())  # as its launcher, or torchrun, has it
    deepspeed.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled: gloo does what it does
    model = new_model(seed)
    lr, decay = OPTIONS["lr"], OPTIONS["weight_decay"]
    # A schedule counts calls of step(): ZeRO 3 makes one for every group, ZeRO 0 with bfloat16 one before the first.
    scheduled = ours and (stage in (1, 2) or (stage == 0 and not bfloat16))
    if not ours:
        opt: Any = torch.optim.AdamW(wd_kernels.decay_groups(model, decay), **OPTIONS)
    elif scheduled:
        opt = wd_kernels.AdamW(wd_kernels.decay_groups(model, decay), **OPTIONS, schedule=Cosine(12))
    else:
        own = {**OPTIONS, "weight_decay": lr * decay, "decay": "independent", "schedule": "from_lr"}
        opt = wd_kernels.AdamW(wd_kernels.decay_groups(model, lr * decay), **own)
    scheduler = None if scheduled else torch.optim.lr_scheduler.LambdaLR(opt, Cosine(12))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.5 if clips else 0.0,
        "bf16": {"enabled": bfloat16},
    }
    return deepspeed.initialize(model=model, optimizer=opt, lr_scheduler=scheduler, config=config)[0]


def train(run: Any, steps: range) -> None:
    rank, dtype = dist.get_rank(), next(run.parameters()).dtype
    for x, y in BATCHES[steps.start : steps.stop]:
        run.backward(nn.functional.mse_loss(run(x[rank::2].to(dtype)), y[rank::2].to(dtype)))
        run.step()


def weights(run: Any) -> list[Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(run.module.parameters())):
        return [p.detach().clone() for p in run.module.parameters()]


def trained(folder: Path, stage: int, bfloat16: bool) -> dict[str, list[Tensor]]:
    whole, other, free, again = (
        engine(seed, ours, stage, bfloat16, clips)
        for seed, ours, clips in ((0, True, True), (0, False, True), (0, True, False), (1, True, True))
    )
    first = weights(whole)
    train(whole, range(4))
    whole.save_checkpoint(str(folder))
    train(whole, range(4, 8))
    train(other, range(8))
    train(free, range(8))
    again.load_checkpoint(str(folder))
    train(again, range(4, 8))
    return {
        "first": first, "ours": weights(whole), "torch's": weights(other), "unclipped": weights(free),
        "resumed": weights(again),
    }  # fmt: skip


@pytest.mark.works("deepspeed", "ZeRO 0 to 3 on two ranks, float32 and bfloat16, clipping, its checkpoints")
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stage", STAGES)
def test_zero(stage: int, bfloat16: bool, tmp_path: Path) -> None:
    found, same = pair.run(trained, tmp_path, stage, bfloat16)
    for k, p in enumerate(found["ours"]):
        moved = p - found["first"][k]
        assert moved.abs().max() > 0.1
        if bfloat16:  # a weight that rounds the other way changes all gradients that follow
            assert (p - found["torch's"][k]).norm() < 0.05 * moved.norm()
        else:
            torch.testing.assert_close(p, found["torch's"][k], rtol=2e-5, atol=2e-5)
        assert torch.equal(p, found["resumed"][k])
        assert torch.equal(p, same["ours"][k])
    assert any((p - q).abs().max() > 0.05 for p, q in zip(found["ours"], found["unclipped"], strict=True))
