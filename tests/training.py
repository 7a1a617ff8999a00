"""Short trainings under a schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import LR, Piece, gradient, make_params, snapshot

import wd_kernels
from wd_kernels import NormalizedDecay
from wd_kernels.schedules import Constant, Cosine, Sequential, StepDrop, WarmRestarts, Warmup, WarmupStableDecay

BUILD: dict[str, Callable[..., Any]] = {
    "adamw": wd_kernels.AdamW, "sgdw": wd_kernels.SGDW, "adagradw": wd_kernels.AdagradW,
}  # fmt: skip
PIECES = (Piece((5,)), Piece((3, 4)), Piece((40,)), Piece((7,)))

NAMED: dict[str, Callable[[int], float]] = {
    "constant": Constant(0.7),
    "step-drop": StepDrop((2, 4), 0.3),
    "warmup": Warmup(4),
    "cosine": Cosine(6),
    "restarts": WarmRestarts(2, mult=2),
    "wsd": WarmupStableDecay(2, 2, 3, "1-sqrt"),
    "sequential": Sequential(Warmup(2), Cosine(4, end=0.1)),
    "normalised": NormalizedDecay(WarmRestarts(2, mult=2)),
    "callable": lambda t: 1 / (1 + t),
}


def train(
    rule: str,
    decay: str,
    backend: str,
    schedule: Any,
    by_hand: bool = False,
    steps: int = 6,
    reload_at: int | None = None,
    device: str = "cpu",
) -> dict[str, torch.Tensor]:
    """Parameters and states of two groups under a schedule; `by_hand` sets eta and weight decay without one."""
    params = make_params(PIECES, torch.float32, torch.float32, device=device)
    more = {"momentum": 0.9, "form": "paper"} if rule == "sgdw" and decay == "independent" else {}

    def make() -> Any:
        groups = [{"params": params[:2], "weight_decay": 0.2}, {"params": params[2:], "lr": LR[rule] / 3}]
        own = {} if by_hand else {"schedule": schedule}
        return BUILD[rule](groups, lr=LR[rule], weight_decay=0.1, decay=decay, backend=backend, **more, **own)

    opt = make()
    for t in range(steps):
        if by_hand:
            factor = getattr(schedule, "decay_factor", lambda t: 1.0)(t)
            for group, weight_decay in zip(opt.param_groups, (0.2, 0.1), strict=True):
                group["eta"], group["weight_decay"] = float(schedule(t)), weight_decay * factor
        for k, p in enumerate(params):
            p.grad = None if (k, t) == (3, 0) else gradient(PIECES[k], torch.float32, 10 * t + k, device)
        opt.step()
        if t == reload_at:
            saved, opt = opt.state_dict(), make()
            opt.load_state_dict(saved)
    if not by_hand and schedule != "from_lr":
        assert [group["schedule_step"] for group in opt.param_groups] == [steps] * 2
        assert [group["eta"] for group in opt.param_groups] == [float(schedule(steps - 1))] * 2
    found = snapshot(params, opt)
    if rule == "sgdw":  # a state that was loaded has no counts, as torch's has none
        return {key: value for key, value in found.items() if not key.endswith("step")}
    return found


def small(rule: str, *groups: dict[str, Any], **options: Any) -> Any:
    """An optimizer of one-element parameters with gradients, one a group."""
    made = [{"params": [torch.nn.Parameter(torch.ones(1))], **group} for group in (groups or ({},))]
    opt = BUILD[rule](made, **{"lr": 0.1, "weight_decay": 0.2, "decay": "independent", **options})
    for group in opt.param_groups:
        group["params"][0].grad = torch.ones(1)
    return opt


def counts(opt: Any) -> list[int]:
    return [group.get("schedule_step", 0) for group in opt.param_groups]
