"""The study as a program.

    python bench/study                    # trains what is not yet trained, prints and draws what it says
    python bench/study --save             # and keeps pictures, findings and numbers in bench/results
    python bench/study --add              # trains what the kept findings lack, and adds it to them
    python bench/study --docs             # and writes the section of docs/study.md
    python bench/study --rehearse         # the same in little, in a minute

Every run that is finished is kept in the work folder: what was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpuinfo import get_cpu_info  # type: ignore[import-untyped]
from report import RESULTS, ROOT, replaced

from . import train
from .figures import draw
from .findings import Errors, Findings
from .plan import RIVALS, SCHEDULES, Plan, anytime, budgets, finals, grids, growths, variant_grids, variants
from .report import render, section
from .train import NOISE, Run

PAGE = ROOT / "docs" / "study.md"
REHEARSAL = Plan(
    size=4, epochs=4, seeds=2, budgets=(2, 4, 8), decays=6, finals=2, restarts=(2, 2, 6),
    samples=(32, 64, 128), widths=(8, 16, 32), grown_epochs=(4, 2), grown_decays=6,
)  # fmt: skip


class Trainer:
    """Trains runs, or takes them from the work folder where they are finished; says how many it had, and their time."""

    def __init__(self, work: Path) -> None:
        self.work, self.networks, self.seconds = work, 0, 0.0
        work.mkdir(parents=True, exist_ok=True)

    def __call__(self, run: Run) -> Errors:
        # What is trained, and how, is part of the name: another plan, or another way to train, is another file.
        how = Path(train.__file__).read_text()
        digest = hashlib.sha256(f"{run}\n{how}".encode()).hexdigest()[:12]
        path = self.work / f"{run.name.replace(' ', '_')}-{digest}.pt"
        if not path.exists():
            started = time.perf_counter()
            found = train.train(run)
            found["seconds"] = torch.tensor(time.perf_counter() - started)
            partial = path.with_suffix(".part")
            torch.save(found, partial)
            partial.rename(path)
            print(f"{run.name}: {float(found['seconds']):.0f} s", flush=True)
        kept = {name: np.asarray(t, np.float64) for name, t in torch.load(path, weights_only=True).items()}
        self.networks += len(run.configs) * run.seeds
        self.seconds += float(kept["seconds"])
        return Errors(kept["validation"], kept["test"])


def collect(plan: Plan, work: Path) -> Findings:
    """Trains everything that the plan has and the work folder lacks."""
    trainer = Trainer(work)
    every = {key: trainer(run) for key, run in grids(plan).items()}
    found = Findings(plan, {}, every, {key: trainer(run) for key, run in budgets(plan).items()})
    for network in NOISE:
        places = {(name, s): found.chosen(name, network, s) for name in RIVALS for s in SCHEDULES}
        final = trainer(finals(plan, network, places)).test
        found.finals |= {(network, *key): own for key, own in zip(places, final, strict=True)}
        names, run = anytime(plan, network, places)
        curves = trainer(run).both().transpose(1, 0, 2)
        found.anytime |= {(network, name): own for name, own in zip(names, curves, strict=True)}
    found.growths = {key: trainer(run) for key, run in growths(plan).items()}
    vary(found, trainer)
    found.about = about(trainer)
    return found


def vary(found: Findings, trainer: Trainer) -> None:
    """Trains figure (f)."""
    found.variant_grids = {key: trainer(run) for key, run in variant_grids(found.plan).items()}
    for network in NOISE:
        places = found.varied(network)
        errors = trainer(variants(found.plan, network, places)).test
        found.variants |= {(network, name): own for name, own in zip(places, errors, strict=True)}


def about(trainer: Trainer) -> dict[str, Any]:
    """When, where, with what, and how long."""
    threads = torch.get_num_threads()
    machine = f"{threads} thread{'s' * (threads > 1)} of {get_cpu_info().get('brand_raw', 'an unknown processor')}"
    found = {"date": str(date.today()), "seconds": round(trainer.seconds), "networks": trainer.networks}
    return {**found, "machine": machine, "torch": torch.__version__}


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints, draws; returns the exit status."""
    parser = argparse.ArgumentParser("study", description="What decay modes, schedules and restarts do in training.")
    parser.add_argument("--work", type=Path, default=Path(".study"), help="finished runs (default: .study)")
    parser.add_argument("--rehearse", action="store_true", help="a small plan, which shows nothing but that all works")
    parser.add_argument("--save", action="store_true", help="keep pictures and numbers in bench/results")
    parser.add_argument("--add", action="store_true", help="train what the kept findings lack alone, and keep it too")
    parser.add_argument("--docs", action="store_true", help="make the section of docs/study.md anew, of what is kept")
    arguments = parser.parse_args(argv)
    if arguments.rehearse and (arguments.save or arguments.add or arguments.docs):
        parser.error("--rehearse shows nothing that is worth keeping: allowed is neither --save, --add nor --docs")
    if arguments.save or arguments.add or not arguments.docs:
        if arguments.add:
            found = Findings.unpacked(json.loads((RESULTS / "study.json").read_text()))
            trainer = Trainer(arguments.work)
            vary(found, trainer)
            found.about["added"] = about(trainer)
        else:
            found = collect(REHEARSAL if arguments.rehearse else Plan(), arguments.work)
        text = render(found)
        print(text, end="")
        folder = RESULTS if arguments.save or arguments.add else arguments.work
        (folder / "study.json").write_text(json.dumps(found.packed(), separators=(",", ":")) + "\n")
        (folder / "study.txt").write_text(text)
        for path in draw(found, folder):
            print(f"drawn: {path}")
    if arguments.docs:
        found = Findings.unpacked(json.loads((RESULTS / "study.json").read_text()))
        PAGE.write_text(replaced(PAGE.read_text(), "study", section(found)))
        print(f"rewritten: {PAGE}")
    return 0
