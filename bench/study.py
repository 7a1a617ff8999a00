"""Decoupled weight decay, seen: trains grids of networks on scikit-learn's digits and draws what they say.

    python bench/study.py                 # trains what is not yet trained, prints and draws what it says
    python bench/study.py --save          # and keeps pictures, findings and numbers in bench/results
    python bench/study.py --readme        # and writes the README's section
    python bench/study.py --rehearse      # the same in little, in a minute

Every run that is finished is kept in the work folder: what was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import study_train
import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from study_findings import Findings, Result
from study_plan import RIVALS, SCHEDULES, Plan, anytime, budgets, finals, grids
from study_ridge import numbers
from study_train import NOISE, Run
from torch import Tensor

REHEARSAL = Plan(size=4, epochs=4, seeds=2, budgets=(2, 4, 8), decays=6, finals=2, restarts=(2, 2, 6))
COLUMNS = (
    TextColumn("{task.description:<42}"),
    BarColumn(),
    TaskProgressColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


class Trainer:
    """Trains runs, or takes them from the work folder where they are finished.

    Args:
        work: the folder.
        progress: shows a bar, advanced by every step of every network.
        runs: all that will come, or runs of their size.
    """

    def __init__(self, work: Path, progress: Progress, runs: Sequence[Run]) -> None:
        self.work, self.progress = work, progress
        self.bar = progress.add_task("training", total=sum(len(r.configs) * r.seeds * r.steps for r in runs))
        work.mkdir(parents=True, exist_ok=True)

    def __call__(self, run: Run) -> Result:
        # What is trained is part of the name: another plan, another file.
        digest = hashlib.sha256(repr(run).encode()).hexdigest()[:12]
        path = self.work / f"{run.name.replace(' ', '_')}-{digest}.pt"
        self.progress.update(self.bar, description=run.name)
        size = len(run.configs) * run.seeds
        if path.exists():
            kept: dict[str, Tensor] = torch.load(path, weights_only=True)
            self.progress.advance(self.bar, run.steps * size)
        else:
            kept = study_train.train(run, lambda steps: self.progress.advance(self.bar, steps * size))
            partial = path.with_suffix(".part")
            torch.save(kept, partial)
            partial.rename(path)
        return Result(run, kept)


def collect(plan: Plan, work: Path) -> Findings:
    """Trains everything that the plan has and the work folder lacks."""
    every, rows = grids(plan), budgets(plan)
    with Progress(*COLUMNS) as progress:
        trainer = Trainer(work, progress, [*every.values(), *rows.values(), *_later(plan)])
        found = Findings(
            plan, {key: trainer(run) for key, run in every.items()}, {k: trainer(r) for k, r in rows.items()}
        )
        for network in NOISE:
            places = {(name, s): found.chosen(name, network, s) for name in RIVALS for s in SCHEDULES}
            final = trainer(finals(plan, network, places)).kept["test"]
            found.finals |= {(network, *key): numbers(own) for key, own in zip(places, final, strict=True)}
            names, run = anytime(plan, network, *(places[name, "cosine"] for name in RIVALS))
            found.anytime[network] = dict(zip(names, trainer(run).errors().transpose(1, 0, 2), strict=True))
    return found


def _later(plan: Plan) -> list[Run]:
    """Runs of the size of those whose settings the grids decide."""
    any_place = (1e-3, 1e-3)
    places = {(name, schedule): any_place for name in RIVALS for schedule in SCHEDULES}
    return [r for n in NOISE for r in (finals(plan, n, places), anytime(plan, n, any_place, any_place)[1])]


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints, draws; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--work", type=Path, default=Path(".study"), help="finished runs (default: .study)")
    parser.add_argument("--rehearse", action="store_true", help="a small plan, which shows nothing but that all works")
    parser.add_argument("--save", action="store_true", help="keep pictures and findings in bench/results")
    parser.add_argument("--readme", action="store_true", help="write the README's section")
    arguments = parser.parse_args(argv)
    if arguments.rehearse and (arguments.save or arguments.readme):
        parser.error("--rehearse shows nothing that is worth keeping: allowed is neither --save nor --readme")
    found = collect(REHEARSAL if arguments.rehearse else Plan(), arguments.work)
    torch.save({k: v.kept for k, v in found.grids.items()}, "/tmp/w/grids.pt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
