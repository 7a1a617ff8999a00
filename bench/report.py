"""Turns the JSON of the benchmarks into tables, plots, and the README's section on performance.

    python bench/report.py bench.json                   # the tables
    python bench/report.py bench.json --save --readme   # keeps all of it in bench/results, rewrites the section
    python bench/report.py --readme                     # the section again, of what is kept
    python bench/report.py bench.json --gpu gpu.json    # with what bench/gpu.py measured

The first JSON is pytest-benchmark's (make bench). What is kept of it are the figures of every round, machine, versions
and date; the statistics that pytest-benchmark makes of them are not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_plots
import gpu_report
from report_figures import gpu_stem_of, stem_of
from report_readme import rewritten
from report_tables import render

__all__ = ["kept", "main", "newest", "save", "slim"]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
GPU = "-gpu.json"


def slim(report: dict[str, Any]) -> dict[str, Any]:
    """What is kept of pytest-benchmark's JSON: nothing is lost that a table says."""
    machine, cpu = report["machine_info"], report["machine_info"].get("cpu", {})
    return {
        "datetime": report["datetime"],
        "commit_info": {key: report.get("commit_info", {}).get(key) for key in ("id", "dirty")},
        "machine_info": {
            "machine": machine.get("machine", "unknown"),
            "system": machine.get("system", "unknown"),
            "cpu": {key: cpu[key] for key in ("brand_raw", "count", "l3_cache_size") if key in cpu},
            "wd_kernels": machine.get("wd_kernels", {}),
        },
        "missing": report.get("missing", {}),
        "left_out": report.get("left_out", {}),
        "benchmarks": [
            {
                "group": entry["group"],
                "extra_info": entry["extra_info"] | {"launches": _short(entry["extra_info"].get("launches", []))},
                "stats": {"data": _short(entry["stats"]["data"])},
            }
            for entry in report["benchmarks"]
        ],
    }


def _short(values: Sequence[float]) -> list[float]:
    """To six digits: a clock has no more."""
    return [float(f"{value:.6g}") for value in values]


def dumped(report: dict[str, Any]) -> str:
    """As JSON with a line for each contender."""
    rest = {key: value for key, value in report.items() if key != "benchmarks"}
    lines = ",\n  ".join(json.dumps(entry) for entry in report["benchmarks"])
    return f'{json.dumps(rest, indent=1)[:-2]},\n "benchmarks": [\n  {lines}\n ]\n}}\n'


def kept(folder: Path, gpu: bool = False) -> list[Path]:
    """The JSON files of a folder of results, which begin with their date, the newest last."""
    return sorted(p for p in folder.glob("[0-9]*.json") if p.name.endswith(GPU) == gpu)


def newest(folder: Path, gpu: bool = False) -> dict[str, Any] | None:
    """What the newest of them says."""
    paths = kept(folder, gpu)
    report: dict[str, Any] | None = json.loads(paths[-1].read_text()) if paths else None
    return report


def save(report: dict[str, Any], gpu: dict[str, Any] | None, folder: Path) -> list[Path]:
    """Writes the JSON, the text and the plots, named by date and processor; returns the paths."""
    from report_plots import plot

    folder.mkdir(parents=True, exist_ok=True)
    report = slim(report)
    stem = stem_of(report)
    paths = [folder / f"{stem}.json", folder / f"{stem}.txt"]
    paths[0].write_text(dumped(report))
    paths[1].write_text(render(report))
    paths += plot(report, folder, stem)
    return paths + (save_gpu(gpu, folder) if gpu is not None else [])


def save_gpu(gpu: dict[str, Any], folder: Path) -> list[Path]:
    """The same of what bench/gpu.py measured."""
    stem = gpu_stem_of(gpu)
    paths = [folder / f"{stem}.json", folder / f"{stem}.txt"]
    paths[0].write_text(json.dumps(gpu, indent=1) + "\n")
    paths[1].write_text(gpu_report.render(gpu))
    with tempfile.TemporaryDirectory() as drawn:
        for path in gpu_plots.plot(gpu, Path(drawn)):
            paths.append(folder / f"{stem}-{path.name}")
            paths[-1].write_bytes(path.read_bytes())
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables of a report; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("report", type=Path, nargs="?", help="what --benchmark-json wrote (default: the newest kept)")
    parser.add_argument("--gpu", type=Path, metavar="JSON", help="what bench/gpu.py wrote")
    parser.add_argument(
        "--save", nargs="?", type=Path, const=RESULTS, metavar="FOLDER", help="keep it (default: bench/results)"
    )
    parser.add_argument(
        "--readme",
        nargs="?",
        type=Path,
        const=ROOT / "README.md",
        metavar="FILE",
        help="rewrite its performance section",
    )
    arguments = parser.parse_args(argv)
    folder: Path = arguments.save or RESULTS
    report = json.loads(arguments.report.read_text()) if arguments.report else newest(RESULTS)
    if report is None:
        parser.error(f"no report is in {RESULTS}: give one")
    gpu = json.loads(arguments.gpu.read_text()) if arguments.gpu else None
    if gpu is not None and gpu.get("rehearsal"):
        parser.error(f"{arguments.gpu} is of a rehearsal: no figure in it is a GPU's")
    if arguments.report or not arguments.readme:
        print(render(report), end="")
        if gpu is not None:
            print("\n" + gpu_report.render(gpu), end="")
    if arguments.save:
        for path in save(report, gpu, folder):
            print(f"saved: {path}")
    if arguments.readme:
        gpu = gpu or newest(folder, gpu=True)
        arguments.readme.write_text(rewritten(arguments.readme.read_text(), slim(report), gpu, stem_of(report)))
        print(f"rewritten: {arguments.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
