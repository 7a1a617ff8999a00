"""What 8 bits make of Adam's update: the format of this package, and others that were candidates. Prints a table.

python bench/companding.py [> bench/results/companding.txt]

Beside a training in float32 (the tasks of bench/convergence.py) one of the two moments goes on from what was stored of
it in every step, by the same gradients. What comes out is the error of the update m / (sqrt(v) + eps), root mean
square, in units of that of the update, and the share of updates of more than 1e-3 that are more than half off.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

import internals
import torch
from convergence import Characters, Digits, Task
from rich.progress import track
from torch import Tensor, nn

TILE = 32
#: Steps of each task, and those after which moments are taken.
TAKEN: tuple[tuple[type[Task], int, tuple[int, ...]], ...] = (
    (Digits, 400, (50, 200, 400)), (Characters, 120, (40, 120)),
)  # fmt: skip
Store = Callable[[Tensor, bool, torch.Generator], Tensor]


def tiles_of(x: Tensor) -> Tensor:
    flat = x.flatten()
    return torch.cat([flat, flat.new_zeros(-flat.numel() % TILE)]).view(-1, TILE)


def like(x: Tensor, tiles: Tensor) -> Tensor:
    return tiles.flatten()[: x.numel()].view_as(x)


def binades(below: int, steps: int) -> Store:
    """Of |x| + c, c `below` binades under the largest, 2**steps steps a binade: 14 or 30, and 3, are the package's."""

    def store(x: Tensor, stochastic: bool, generator: torch.Generator) -> Tensor:
        t = tiles_of(x)
        a = t.abs()
        exponent = ((a.view(torch.int32) >> 23).amax(1, keepdim=True) - below).clamp(min=1)
        c, lost = exponent << 23, 23 - steps
        d = (a + c.view(torch.float32)).view(torch.int32) - c
        drawn = torch.randint(0, 1 << lost, d.shape, generator=generator, dtype=torch.int32)
        code = (d + (drawn if stochastic else (1 << lost - 1) - 1 + (d >> lost & 1))) >> lost
        if below >= 6 and not bool((x < 0).any()):
            code = torch.where((code == 0) & (a > 0), 1, code)
        return like(x, t.sign() * (((code << lost) + c).view(torch.float32) - c.view(torch.float32)))

    return store


def root(power: int, levels: int) -> Store:
    """Linear in |x| ** (1 / power), relative to the largest."""

    def store(x: Tensor, stochastic: bool, generator: torch.Generator) -> Tensor:
        t = tiles_of(x)
        a = t.abs() ** (1 / power)
        top = a.amax(1, keepdim=True)
        y = torch.where(top > 0, a / top, 0 * a) * levels
        code = y.round()
        if stochastic:
            low = y.floor()
            at, begin, end = ((own / levels) ** power for own in (y, low, low + 1))
            code = low + (torch.rand(y.shape, generator=generator) < (at - begin) / (end - begin))
        if levels == 255:
            code = torch.where((code == 0) & (a > 0), 1.0, code)
        return like(x, t.sign() * (code.clamp(max=levels) / levels * top) ** power)

    return store


FIRST: dict[str, Store] = {
    "14 binades of 8 steps (int8)": binades(14, 3), "6 binades of 16": binades(6, 4), "2 binades of 32": binades(2, 5),
    "linear in x": root(1, 127), "linear in the root": root(2, 127),
}  # fmt: skip
SECOND: dict[str, Store] = {
    "30 binades of 8 steps (uint8)": binades(30, 3), "14 binades of 16": binades(14, 4),
    "6 binades of 32": binades(6, 5), "linear in the root": root(2, 255), "linear in the 4th root": root(4, 255),
}  # fmt: skip


@dataclass
class Error:
    """What storing one of two moments makes of the updates of all parameters, summed up."""

    wrong: float = 0.0
    whole: float = 0.0
    off: int = 0
    large: int = 0

    def add(self, found: Tensor, exact: Tensor) -> None:
        self.wrong += float((found - exact).square().sum())
        self.whole += float(exact.square().sum())
        much = exact.abs() > 1e-3
        self.off += int((((found - exact).abs() > exact.abs() / 2) & much).sum())
        self.large += int(much.sum())

    def __str__(self) -> str:
        return f"{(self.wrong / self.whole) ** 0.5:.3f} ({100 * self.off / self.large:.1f}%)"


def update(m: Tensor, v: Tensor, step: int) -> Tensor:
    return m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)


def errors(task: Task, steps: int, taken: tuple[int, ...]) -> dict[tuple[str, str, bool], Error]:
    """Of every candidate, for (moment, name, stochastic): its moments go on from what it has stored in every step."""
    torch.manual_seed(0)
    model = task.model()
    opt = torch.optim.AdamW(model.parameters(), lr=task.lr)
    keys = [(of, name, how) for of, known in (("m", FIRST), ("v", SECOND)) for name in known for how in (False, True)]
    found = {key: Error() for key in keys}
    stored = {key: [torch.zeros_like(p) for p in model.parameters()] for key in keys}
    generator = torch.Generator().manual_seed(1)
    for step, (x, y) in zip(track(range(1, steps + 1), task.name, transient=True), task.batches(0), strict=False):
        loss = nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten())
        opt.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        opt.step()
        for key, own in stored.items():
            of, name, how = key
            for k, p in enumerate(model.parameters()):
                assert p.grad is not None
                m, v = (opt.state[p][state] for state in ("exp_avg", "exp_avg_sq"))
                if of == "m":
                    new, store = own[k].lerp(p.grad, 0.1), FIRST[name]
                else:
                    new, store = own[k].lerp(p.grad.square(), 0.001), SECOND[name]
                if step in taken:
                    found[key].add(update(new, v, step) if of == "m" else update(m, new, step), update(m, v, step))
                own[k] = store(new, how, generator)
    return found


def main() -> None:
    argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0]).parse_args()
    versions = ", ".join(f"{key} {value}" for key, value in internals.versions_here().items())
    print(f"{date.today()}; {versions}\n")
    for make, steps, taken in TAKEN:
        task = make()
        found = errors(task, steps, taken)
        rows: list[tuple[object, ...]] = [(task.name, "nearest", "stochastic")]
        for of, known in (("m", FIRST), ("v", SECOND)):
            rows += [(f"{of}: {name}", *(str(found[of, name, how]) for how in (False, True))) for name in known]
        print(internals.aligned(rows, indent=""), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
