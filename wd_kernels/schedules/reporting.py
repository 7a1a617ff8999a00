"""What a schedule does to the learning rate, shown to trainers that ask an LR scheduler of torch's kind."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..rules import scalar
from .stepping import follows_lr

__all__ = ["ScheduledLR"]


class ScheduledLR(LRScheduler):
    r"""An LR scheduler that moves nothing, and says what `schedule=` of an optimizer does: :math:`\eta\alpha`.

    For trainers that want one, and log what its `get_last_lr` says (Transformers' ``Trainer(optimizers=(optimizer,
    ScheduledLR(optimizer)))``, say). Those that read ``group["lr"]`` (Lightning's LearningRateMonitor, timm) want the
    optimizer's option `show_lr`.

    Args:
        optimizer: one of this package, or of torch.

    Example:
        >>> import torch, wd_kernels
        >>> from wd_kernels.schedules import ScheduledLR, Warmup
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = wd_kernels.AdamW([w], lr=0.1, schedule=Warmup(4))
        >>> scheduler = ScheduledLR(optimizer)
        >>> for _ in range(2):
        ...     w.grad = torch.ones(2)
        ...     optimizer.step()
        ...     scheduler.step()
        >>> scheduler.get_last_lr(), optimizer.param_groups[0]["lr"]
        ([0.05], 0.1)
    """

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        for group in optimizer.param_groups:
            if group.get("show_lr"):
                group.setdefault("initial_lr", group["base_lr"])
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """The groups' own lr, as it is."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_last_lr(self) -> list[float]:  # type: ignore[override]
        """What every group's learning rate was in the last step."""
        found = []
        for i, group in enumerate(self.optimizer.param_groups):
            lr, eta = (scalar(key, group.get(key, 1.0), f"param group {i}") for key in ("lr", "eta"))
            found.append(lr if follows_lr(group) or group.get("show_lr") else eta * lr)
        return found
