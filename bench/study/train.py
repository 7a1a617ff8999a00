"""Many networks trained at once: a grid of configurations as one batched model, each configuration a param group.

The data are scikit-learn's handwritten digits. All networks of a run are slices of the same few tensors, so that a
forward and a backward pass is a handful of batched products, and a step of all their optimizers is one launch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import wd_kernels

TRAIN, VALIDATION, BATCH, WIDTH = 600, 597, 32, 64  # the other 600 of the 1797 digits are the test set
STEPS_AN_EPOCH = TRAIN // BATCH
#: The networks, with the share of training labels that are drawn at random.
NOISE = {"normalised": 0.0, "noisy": 0.2}
LOGIT_SCALE = 3.0  # of the normalised network, whose logits would else have unit variance


@dataclass(frozen=True)
class Run:
    """Networks that are trained together.

    In a "normalised" network every layer is normalised over the batch, the last one too, so that no weight's scale
    matters, as under Batch Norm. In a "noisy" one nothing is normalised, and a part of the training labels is wrong.

    With `base` they are muP's, for Adam (Yang et al., "Tensor Programs V", 2022): as ordinary ones where the hidden
    layers have that width; else the lr of all matrices but the first falls as 1/width, and what the last one begins
    with as 1/width, not as its root.
    """

    name: str  # of the file that keeps the result
    network: str
    rule: str  # the class of wd_kernels
    configs: tuple[dict[str, Any], ...]  # what its param groups set
    epochs: int
    seeds: int = 3  # of each configuration: a split of the data, an initialisation and an order each
    first_seed: int = 0
    trace: bool = False  # keep the errors after every epoch
    hidden: tuple[int, ...] = (WIDTH,)  # the widths of the hidden layers
    samples: int = TRAIN  # of the training set, its first
    base: int | None = None  # muP, from this width

    @property
    def draws(self) -> range:
        """The seeds."""
        return range(self.first_seed, self.first_seed + self.seeds)


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)


def split(seed: int, noise: float) -> list[tuple[Tensor, Tensor]]:
    """(inputs, labels) for training, validation and test, drawn anew for each seed; `noise` in those of training."""
    x, y = _digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    sizes = [TRAIN, VALIDATION, len(x) - TRAIN - VALIDATION]
    parts = [(x[part], y[part]) for part in torch.split(order, sizes)]
    inputs, labels = parts[0]
    drawn = torch.randint(10, (TRAIN,), generator=generator)
    parts[0] = inputs, torch.where(torch.rand(TRAIN, generator=generator) < noise, drawn, labels)
    return parts


class Networks:
    """The stacked networks of a run: [configurations * seeds, in, out], with gradients that stay where they are."""

    def __init__(self, run: Run) -> None:
        self.normalised, self.depth, count = run.network == "normalised", len(run.hidden) + 1, len(run.configs)
        self.stacks: list[Tensor] = []
        self.lr_factors: list[float] = []  # of each stack
        for layer, (fan_in, fan_out) in enumerate(pairwise((_digits()[0].shape[1], *run.hidden, 10))):
            generators = [torch.Generator().manual_seed(1000 * seed + layer) for seed in run.draws]
            drawn = torch.stack([torch.randn(fan_in, fan_out, generator=generator) for generator in generators])
            factor = run.base / fan_in if run.base and layer else 1.0
            last = layer == self.depth - 1
            self.stacks.append((drawn * math.sqrt((factor if last else 1.0) * 2 / fan_in)).repeat(count, 1, 1))
            self.lr_factors.append(factor)
            if not self.normalised:
                self.stacks.append(torch.zeros(count * run.seeds, 1, fan_out))
                self.lr_factors.append(1.0)
        self.grads = [torch.zeros_like(stack) for stack in self.stacks]
        for stack, grad in zip(self.stacks, self.grads, strict=True):
            stack.requires_grad_().grad = grad

    def slices(self, first: int, count: int) -> list[torch.nn.Parameter]:
        """The parameters of `count` networks, which share memory with the stacks, and so do their gradients."""
        params = [torch.nn.Parameter(stack.detach()[first : first + count]) for stack in self.stacks]
        for p, grad in zip(params, self.grads, strict=True):
            p.grad = grad[first : first + count]
        return params

    def __call__(self, x: Tensor, statistics: Tensor | None = None) -> Tensor:
        """Logits [networks, samples, 10] of inputs [networks, samples, pixels], normalised as `statistics` are.

        None: by means and variances of their own, as in training.
        """
        both = x if statistics is None else torch.cat([x, statistics], 1)
        size = x.shape[1]
        for layer in range(self.depth):
            if self.normalised:
                both = torch.bmm(both, self.stacks[layer])
                over = both if statistics is None else both[:, size:]
                variance, mean = torch.var_mean(over, 1, keepdim=True, correction=0)
                both = (both - mean) * torch.rsqrt(variance + 1e-12)
            else:
                both = torch.baddbmm(self.stacks[2 * layer + 1], both, self.stacks[2 * layer])
            if layer < self.depth - 1:
                both = torch.relu(both)
        return both[:, :size] * (LOGIT_SCALE if self.normalised else 1.0)


def optimizer(run: Run, networks: Networks) -> torch.optim.Optimizer:
    """One optimizer for all networks: a param group for each configuration and lr, with its seeds side by side."""
    groups = []
    for k, own in enumerate(run.configs):
        params = networks.slices(k * run.seeds, run.seeds)
        for factor in sorted(set(networks.lr_factors)):
            slowed = [p for p, f in zip(params, networks.lr_factors, strict=True) if f == factor]
            groups.append({"params": slowed, **own, "lr": own["lr"] * factor})
    made: torch.optim.Optimizer = getattr(wd_kernels, run.rule)(groups)
    return made


def train(run: Run) -> dict[str, Tensor]:
    """The share of errors, "validation" and "test", of a run's networks, [configurations, seeds]; traced [epochs, ...].

    A network that diverged has nothing but errors.
    """
    count = len(run.configs)
    networks = Networks(run)
    opt = optimizer(run, networks)
    parts = [split(seed, NOISE[run.network]) for seed in run.draws]
    (x, y), *held_out = ([torch.stack(own) for own in zip(*(p[k] for p in parts), strict=True)] for k in range(3))
    x, y = x[:, : run.samples], y[:, : run.samples]

    @torch.no_grad()
    def errors() -> list[Tensor]:
        found = []
        for inputs, labels in held_out:
            logits = networks(inputs.repeat(count, 1, 1), x.repeat(count, 1, 1) if networks.normalised else None)
            wrong = (logits.argmax(-1) != labels.repeat(count, 1)) | ~logits.isfinite().all(-1)
            found.append(wrong.float().mean(1).view(count, run.seeds))
        return found

    kept = []
    orders = [torch.Generator().manual_seed(seed) for seed in run.draws]
    for _ in range(run.epochs):
        order = torch.stack([torch.randperm(run.samples, generator=generator) for generator in orders])
        for k in range(run.samples // BATCH):
            batch = order[:, k * BATCH : (k + 1) * BATCH]
            inputs = x.gather(1, batch[:, :, None].expand(-1, -1, x.shape[2])).repeat(count, 1, 1)
            labels = y.gather(1, batch).repeat(count, 1)
            torch._foreach_zero_(networks.grads)
            logits = networks(inputs)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / BATCH
            loss.backward()  # type: ignore[no-untyped-call]
            opt.step()
        if run.trace:
            kept.append(errors())
    found = [torch.stack(own) for own in zip(*kept, strict=True)] if run.trace else errors()
    return dict(zip(("validation", "test"), found, strict=True))
