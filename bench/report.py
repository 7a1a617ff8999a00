"""Turns the JSON of the benchmarks into tables, plots, and the README's section on performance.

    python bench/report.py bench.json                   # the tables
    python bench/report.py bench.json --save --readme   # keeps all of it in bench/results, rewrites the section
    python bench/report.py gpu/gpu.json --save --readme # the same, of what bench/gpu.py measured
    python bench/report.py --readme                     # the section again, of what is kept

A JSON is pytest-benchmark's (make bench), or bench/gpu.py's, which has the same parts. What is kept of it are the
figures of every round, machine, versions and date; the statistics that pytest-benchmark makes of them are not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from figures import Report, of_gpu, stem_of
from readme import rewritten
from tables import render

ROOT = Path(__file__).parent.parent
RESULTS, README = ROOT / "bench" / "results", ROOT / "README.md"
CPU = ("brand_raw", "count", "l3_cache_size")  # what is kept of it


def slim(report: Report) -> Report:
    """What is kept of a report: nothing is lost that a table says. A clock has no more than six digits."""

    def short(value: object) -> object:
        return [float(f"{v:.6g}") for v in value] if isinstance(value, list) else value

    machine, commit = dict(report["machine_info"]), report.get("commit_info", {})
    if not of_gpu(report):
        machine["cpu"] = {key: value for key, value in machine.get("cpu", {}).items() if key in CPU}
        machine = {key: machine[key] for key in ("machine", "system", "cpu", "wd_kernels") if key in machine}
    entries = [
        {
            "group": entry["group"],
            "extra_info": {key: short(value) for key, value in entry["extra_info"].items()},
            "stats": {"data": short(entry["stats"]["data"])},
        }
        for entry in report["benchmarks"]
    ]
    kept = {name: value for name, value in report.items() if name not in ("version", "benchmarks")}
    own = {"commit_info": {key: commit.get(key) for key in ("id", "dirty")}, "machine_info": machine}
    return kept | own | {"benchmarks": entries}


def dumped(report: Report) -> str:
    """As JSON with a line for each contender."""
    rest = {key: value for key, value in report.items() if key != "benchmarks"}
    lines = ",\n  ".join(json.dumps(entry) for entry in report["benchmarks"])
    return f'{json.dumps(rest, indent=1)[:-2]},\n "benchmarks": [\n  {lines}\n ]\n}}\n'


def newest(folder: Path, gpu: bool = False) -> Report | None:
    """The newest report in a folder of results, whose names begin with their date."""
    paths = [path for path in sorted(folder.glob("[0-9]*.json")) if path.name.endswith("-gpu.json") == gpu]
    return dict(json.loads(paths[-1].read_text())) if paths else None


def save(report: Report, folder: Path) -> list[Path]:
    """Writes the JSON, the text and the plots, named by date and device; returns the paths."""
    from plots import plot

    folder.mkdir(parents=True, exist_ok=True)
    report = slim(report)
    stem = stem_of(report)
    paths = [folder / f"{stem}.json", folder / f"{stem}.txt"]
    paths[0].write_text(dumped(report))
    paths[1].write_text(render(report))
    return paths + plot(report, folder, stem)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables of a report; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("report", type=Path, nargs="?", help="a benchmark's JSON (default: the newest of a CPU, kept)")
    parser.add_argument(
        "--save", nargs="?", type=Path, const=RESULTS, metavar="FOLDER", help="keep it, in bench/results"
    )
    parser.add_argument("--readme", nargs="?", type=Path, const=README, metavar="FILE", help="rewrite its section")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.save or RESULTS
    report = json.loads(arguments.report.read_text()) if arguments.report else newest(RESULTS)
    if report is None:
        parser.error(f"no report is in {RESULTS}: give one")
    if report.get("rehearsal") and (arguments.save or arguments.readme):
        parser.error(f"{arguments.report} is of a rehearsal: no figure in it is a GPU's")
    if arguments.report or not arguments.readme:
        print(render(report), end="")
    if arguments.save:
        for path in save(report, folder):
            print(f"saved: {path}")
    if arguments.readme:
        gpu = slim(report) if of_gpu(report) else newest(folder, gpu=True)
        cpu = newest(folder) or newest(RESULTS) if of_gpu(report) else slim(report)
        if cpu is None:
            parser.error(f"no report of a CPU is in {folder}")
        arguments.readme.write_text(rewritten(arguments.readme.read_text(), cpu, gpu))
        print(f"rewritten: {arguments.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
