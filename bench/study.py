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
import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import study_train
import torch
from cpuinfo import get_cpu_info  # type: ignore[import-untyped]
from readme import replaced
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from study_figures import draw
from study_findings import Errors, Findings
from study_plan import RIVALS, SCHEDULES, Plan, anytime, budgets, finals, grids
from study_report import render, section
from study_train import NOISE, Run
from torch import Tensor

ROOT = Path(__file__).parent.parent
RESULTS, README = ROOT / "bench" / "results", ROOT / "README.md"
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

    Attributes:
        seconds: how long the training took, that of former calls too.
    """

    def __init__(self, work: Path, progress: Progress, runs: Sequence[Run]) -> None:
        self.work, self.progress, self.seconds = work, progress, 0.0
        self.bar = progress.add_task("training", total=sum(len(r.configs) * r.seeds * r.steps for r in runs))
        work.mkdir(parents=True, exist_ok=True)

    def __call__(self, run: Run) -> Errors:
        # What is trained, and how, is part of the name: another plan, or another way to train, is another file.
        how = Path(study_train.__file__).read_text()
        digest = hashlib.sha256(f"{run}\n{how}".encode()).hexdigest()[:12]
        path = self.work / f"{run.name.replace(' ', '_')}-{digest}.pt"
        self.progress.update(self.bar, description=run.name)
        size = len(run.configs) * run.seeds
        if path.exists():
            kept: dict[str, Tensor] = torch.load(path, weights_only=True)
            self.progress.advance(self.bar, run.steps * size)
        else:
            started = time.perf_counter()
            kept = study_train.train(run, lambda steps: self.progress.advance(self.bar, steps * size))
            kept["seconds"] = torch.tensor(time.perf_counter() - started)
            partial = path.with_suffix(".part")
            torch.save(kept, partial)
            partial.rename(path)
        self.seconds += float(kept["seconds"])
        return Errors.of(kept)


def collect(plan: Plan, work: Path) -> Findings:
    """Trains everything that the plan has and the work folder lacks."""
    every, rows = grids(plan), budgets(plan)
    with Progress(*COLUMNS) as progress:
        trainer = Trainer(work, progress, [*every.values(), *rows.values(), *_later(plan)])
        grid_errors = {key: trainer(run) for key, run in every.items()}
        found = Findings(plan, {}, grid_errors, {key: trainer(run) for key, run in rows.items()})
        for network in NOISE:
            places = {(name, s): found.chosen(name, network, s) for name in RIVALS for s in SCHEDULES}
            final = trainer(finals(plan, network, places)).test
            found.finals |= {(network, *key): own for key, own in zip(places, final, strict=True)}
            names, run = anytime(plan, network, places)
            curves = trainer(run).both().transpose(1, 0, 2)
            found.anytime |= {(network, name): own for name, own in zip(names, curves, strict=True)}
    found.about = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "seconds": round(trainer.seconds),
        "networks": sum(len(r.configs) * r.seeds for r in (*every.values(), *rows.values(), *_later(plan))),
        "machine": f"{torch.get_num_threads()} threads of {get_cpu_info().get('brand_raw', 'an unknown processor')}",
        "torch": torch.__version__,
    }
    return found


def _later(plan: Plan) -> list[Run]:
    """Runs of the size of those whose settings the grids decide."""
    places = {(name, schedule): (1e-3, 1e-3) for name in RIVALS for schedule in SCHEDULES}
    return [run for network in NOISE for run in (finals(plan, network, places), anytime(plan, network, places)[1])]


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints, draws; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--work", type=Path, default=Path(".study"), help="finished runs (default: .study)")
    parser.add_argument("--rehearse", action="store_true", help="a small plan, which shows nothing but that all works")
    parser.add_argument("--save", action="store_true", help="keep pictures and numbers in bench/results")
    parser.add_argument("--readme", action="store_true", help="make the README's section anew, of what is kept")
    arguments = parser.parse_args(argv)
    if arguments.rehearse and (arguments.save or arguments.readme):
        parser.error("--rehearse shows nothing that is worth keeping: allowed is neither --save nor --readme")
    if arguments.save or not arguments.readme:
        found = collect(REHEARSAL if arguments.rehearse else Plan(), arguments.work)
        text = render(found)
        print(text, end="")
        folder = RESULTS if arguments.save else arguments.work
        (folder / "study.json").write_text(json.dumps(found.packed(), separators=(",", ":")) + "\n")
        (folder / "study.txt").write_text(text)
        for path in draw(found, folder):
            print(f"drawn: {path}")
    if arguments.readme:
        found = Findings.unpacked(json.loads((RESULTS / "study.json").read_text()))
        README.write_text(replaced(README.read_text(), "study", section(found)))
        print(f"rewritten: {README}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
