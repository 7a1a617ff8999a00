"""What 8 bits make of Adam's update: the format of this package, and others that were candidates. Prints a table.

python bench/companding.py [> bench/results/companding.txt]

Moments of a real training in float32 (`bench/convergence.py`'s tasks) are stored and read back, one of the two at a
time; what comes out is the error of the update m / (sqrt(v) + eps), root mean square, in units of that of the update,
and the share of updates of more than 1e-3 that are more than a quarter off.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import date

import internals
import torch
from convergence import Characters, Digits, Task
from rich.progress import track
from torch import Tensor, nn

TILE = 32
#: Steps of each task, and those after which moments are taken.
TAKEN: tuple[tuple[type[Task], int, tuple[int, ...]], ...] = (
    (Digits, 400, (21, 101, 400)), (Characters, 200, (21, 200)),
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


def moments(task: Task, steps: int, taken: tuple[int, ...]) -> list[tuple[Tensor, Tensor, int]]:
    """(exp_avg, exp_avg_sq, step) of every parameter, after the steps that are asked for."""
    torch.manual_seed(0)
    model = task.model()
    opt = torch.optim.AdamW(model.parameters(), lr=task.lr)
    found = []
    for step, (x, y) in zip(track(range(1, steps + 1), task.name, transient=True), task.batches(0), strict=False):
        loss = nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten())
        opt.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        opt.step()
        if step in taken:
            found += [(own["exp_avg"].clone(), own["exp_avg_sq"].clone(), step) for own in opt.state.values()]
    return found


def error(states: list[tuple[Tensor, Tensor, int]], first: Store | None, second: Store | None, random: bool) -> str:
    generator = torch.Generator().manual_seed(1)
    wrong = whole = off = large = 0.0
    for m, v, step in states:
        near = [own(t, random, generator) if own is not None else t for own, t in ((first, m), (second, v))]
        exact, found = (
            a / (1 - 0.9**step) / ((b / (1 - 0.999**step)).sqrt() + 1e-8) for a, b in ((m, v), (near[0], near[1]))
        )
        wrong += float((found - exact).square().sum())
        whole += float(exact.square().sum())
        much = exact.abs() > 1e-3
        off += int((((found - exact).abs() > exact.abs() / 4) & much).sum())
        large += int(much.sum())
    return f"{(wrong / whole) ** 0.5:.4f} ({100 * off / large:.1f}%)"


def main() -> None:
    argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0]).parse_args()
    versions = ", ".join(f"{key} {value}" for key, value in internals.versions_here().items())
    print(f"{date.today()}; {versions}\n")
    for make, steps, taken in TAKEN:
        task = make()
        states = moments(task, steps, taken)
        rows: list[tuple[object, ...]] = [(task.name, "nearest", "stochastic")]
        for title, known in (("m", FIRST), ("v", SECOND)):
            for name, store in known.items():
                first, second = (store, None) if title == "m" else (None, store)
                rows.append((f"{title}: {name}", *(error(states, first, second, random) for random in (False, True))))
        print(internals.aligned(rows, indent=""), end="\n\n")


if __name__ == "__main__":
    main()
