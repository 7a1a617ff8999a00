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
GPU = "-gpu.json"
#: What pytest-benchmark adds, and nobody reads.
LEFT = {"version", "benchmarks"}


def slim(report: Report) -> Report:
    """What is kept of a report: nothing is lost that a table says."""
    kept = {name: value for name, value in report.items() if name not in LEFT}
    machine, commit = report["machine_info"], report.get("commit_info", {})
    if not of_gpu(report):
        cpu = {key: value for key, value in machine.get("cpu", {}).items() if key in CPU}
        whose = {name: machine.get(name, "unknown") for name in ("machine", "system")}
        kept["machine_info"] = {**whose, "cpu": cpu, "wd_kernels": machine.get("wd_kernels", {})}
    kept["commit_info"] = {key: commit.get(key) for key in ("id", "dirty")}
    kept["benchmarks"] = [
        {
            "group": entry["group"],
            "extra_info": {key: _short(value) for key, value in entry["extra_info"].items()},
            "stats": {"data": _short(entry["stats"]["data"])},
        }
        for entry in report["benchmarks"]
    ]
    return kept


CPU = ("brand_raw", "count", "l3_cache_size")


def _short(value: object) -> object:
    """Seconds of rounds to six digits: a clock has no more."""
    return [float(f"{v:.6g}") for v in value] if isinstance(value, list) else value


def dumped(report: Report) -> str:
    """As JSON with a line for each contender."""
    rest = {key: value for key, value in report.items() if key != "benchmarks"}
    lines = ",\n  ".join(json.dumps(entry) for entry in report["benchmarks"])
    return f'{json.dumps(rest, indent=1)[:-2]},\n "benchmarks": [\n  {lines}\n ]\n}}\n'


def kept(folder: Path, gpu: bool = False) -> list[Path]:
    """The JSON files of a folder of results, which begin with their date, the newest last."""
    return sorted(p for p in folder.glob("[0-9]*.json") if p.name.endswith(GPU) == gpu)


def newest(folder: Path, gpu: bool = False) -> Report | None:
    """What the newest of them says."""
    paths = kept(folder, gpu)
    report: Report | None = json.loads(paths[-1].read_text()) if paths else None
    return report


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
