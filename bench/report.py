"""Turns the JSON of the benchmarks into tables, plots, and what README and docs/performance.md show of them.

    python bench/report.py bench.json                   # the tables
    python bench/report.py bench.json --save --docs   # keeps all of it in bench/results, rewrites README and page
    python bench/report.py gpu/gpu.json --save --docs # the same, of what bench/gpu.py measured
    python bench/report.py --docs                     # README and page again, of what is kept

A JSON is pytest-benchmark's (make bench), or bench/gpu.py's, which has the same parts. What is kept of it are the
figures of every round, machine, versions and date; the statistics that pytest-benchmark makes of them are not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from figures import Cases, Report, copy_rate, device, is_peer, of_gpu, points, results, stem_of
from internals import KINDS
from peers import FLAT, FUSED, OURS
from tables import filled, filled_columns, lost, ms, percent, render, scaling, size
from workloads import CEILING, LEAD

ROOT = Path(__file__).parent.parent
RESULTS, README, PAGE = ROOT / "bench" / "results", ROOT / "README.md", ROOT / "docs" / "performance.md"
CPU = ("brand_raw", "count", "l3_cache_size")  # what is kept of it


def slim(report: Report) -> Report:
    """What is kept of a report: nothing is lost that a table says. A clock has no more than six digits."""

    def short(value: object) -> object:
        return [float(f"{v:.6g}") for v in value] if isinstance(value, list) else value

    machine, commit = dict(report["machine_info"]), report.get("commit_info", {})
    if not of_gpu(report):
        machine["cpu"] = {key: value for key, value in machine.get("cpu", {}).items() if key in CPU}
        machine = {key: machine[key] for key in ("machine", "system", "cpu", "wd_kernels") if key in machine}
    entries = []
    for entry in report["benchmarks"]:
        info = {key: short(value) for key, value in entry["extra_info"].items()}
        entries.append({"group": entry["group"], "extra_info": info, "stats": {"data": short(entry["stats"]["data"])}})
    kept = {name: value for name, value in report.items() if name not in ("version", "benchmarks")}
    own = {"commit_info": {key: commit.get(key) for key in ("id", "dirty")}, "machine_info": machine}
    return kept | own | {"benchmarks": entries}


def newest(gpu: bool = False) -> Report | None:
    """The newest report that is kept; names begin with their date."""
    paths = [path for path in sorted(RESULTS.glob("[0-9]*.json")) if path.name.endswith("-gpu.json") == gpu]
    return dict(json.loads(paths[-1].read_text())) if paths else None


def save(report: Report) -> list[Path]:
    """Writes the JSON, the text and the plots, named by date and device; returns the paths."""
    from plots import plot

    report, stem = slim(report), stem_of(report)
    paths = [RESULTS / f"{stem}.json", RESULTS / f"{stem}.txt"]
    head = json.dumps({**report, "benchmarks": []}, indent=1).removesuffix("[]\n}")
    lines = ",\n  ".join(map(json.dumps, report["benchmarks"]))  # one for each contender
    paths[0].write_text(f"{head}[\n  {lines}\n ]\n}}\n")
    paths[1].write_text(render(report))
    return paths + plot(report, RESULTS, stem)


# README and page ------------------------------------------------------------------------------------------------------

HEADER = (
    "tensors × elements", "rule", "dtype", "gradients", "ours, ms", "ours, device ms", "flat, ms", "torch fused, ms",
    "best of the others, ms", "against the best", "fused takes, device", "of the ceiling",
)  # fmt: skip


def replaced(text: str, part: str, content: str) -> str:
    """A text with what stands between the markers of a part made anew.

    Raises:
        ValueError: the markers are not there, each once and in order.
    """
    begin, end = f"<!-- {part}:begin -->", f"<!-- {part}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin} and {end} once each, in this order")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def opening(text: str, report: Report) -> str:
    """README's text with its plot and its few rows made anew. Raises as `replaced` does."""
    lead = {name: them for name, them in results(report).items() if name in LEAD}
    plot = f"![Time of a step, ours and others'](bench/results/{stem_of(report)}-lead.png)" if lead else ""
    return replaced(replaced(text, "plot", plot), "figures", table(lead))


def rewritten(text: str, report: Report, gpu: Report | None) -> str:
    """The page's text with its section made anew. Raises as `replaced` does."""
    return replaced(text, "performance", section(report, gpu))


OPENING = """
Whole `opt.step()` on {threads} threads of {cpu} ({instruction set}), torch {torch}, {date}. Contenders take turns in
one run: ours, {names}. Times are medians over rounds, ratios medians of the quotients within a round. {missing}"""
LEGEND = """
"Against the best" is how many times longer the fastest of all peers takes than ours. "Flat" is ours after
`wd_kernels.flatten_`. The ceiling is the rate of a plain stream over as many bytes with the same mix of reads and
writes, measured in the same rounds."""
AGAIN = """All rows, with quartile ranges and rates, are in [bench/results]({}.txt); to measure again:

    make peers  # optional: the other libraries; the benchmark names those that are missing
    make bench
    .venv/bin/python bench/report.py bench.json --save --docs"""


def section(report: Report, gpu: Report | None) -> str:
    """What stands between the markers."""
    cases, files, own = results(report), f"../bench/results/{stem_of(report)}", report["machine_info"]["wd_kernels"]
    names = dict.fromkeys(name for them in cases.values() for name, _ in them if is_peer(name))
    about = own | {"cpu": device(report), "date": report["datetime"][:10], "names": ", ".join(names)}
    about["missing"] = f"Missing: {', '.join(report['missing'])}." if report.get("missing") else ""
    parts = [filled(OPENING.format(**about)), table(cases), filled(LEGEND), lost(cases), scaling(cases)]
    parts.append(f"![All contenders side by side]({files}-peers.png)")
    if points(cases, "tensors"):
        parts.append(f"![Scaling over tensors, elements and groups]({files}-scaling.png)")
    if gpu is not None:
        rate, torch = copy_rate(gpu), gpu["machine_info"]["wd_kernels"].get("torch")
        copy = f"; a copy, the ceiling there, moves {rate:.0f} GB/s" if rate else ""
        parts.append(filled(f"On a GPU: {device(gpu)}, torch {torch}, {gpu['datetime'][:10]}{copy}."))
        parts += [table(results(gpu)), f"![Contenders on a GPU](../bench/results/{stem_of(gpu)}-peers.png)"]
    return "\n\n".join(part for part in (*parts, AGAIN.format(files)) if part)


def table(cases: Cases) -> str:
    """A row per case of one group that is no point of a sweep."""
    rows = [HEADER]
    most = max((r.info["threads"] for them in cases.values() for r in them.values()), default=1)
    for them in cases.values():
        ours = them.get((OURS, 1))
        peers = [r for (name, _), r in them.items() if is_peer(name)]
        if ours is None or not peers or ours.info["sweep"] or any(groups > 1 for _, groups in them):
            continue
        info, on_device = ours.info, ours.info["device"]
        fused, flat = (them.get((name, 1)) for name in (FUSED, FLAT))
        share = ours.share(them.get((CEILING, 1)))
        next_best = min((r for r in peers if r is not fused), key=ours.ratio, default=None)
        rows.append(
            (size(info).replace(" x ", " × "), KINDS[info["rule"]][0].title,
             info["dtype"] + ("" if info["threads"] == most else f", {info['threads']} thread"), info["gradients"],
             ms(ours.median), ms(statistics.median(on_device)) if on_device else "", ms(flat.median) if flat else "",
             ms(fused.median) if fused else "", f"{next_best.contender}: {ms(next_best.median)}" if next_best else "",
             f"{min(ours.ratio(r) for r in peers):.2f}×",
             f"{ours.device_ratio(fused):.2f}×" if fused and on_device else "",
             "" if share is None else f"{percent(share)}%")
        )  # fmt: skip
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a table, without the columns that are empty."""
    head, *rest = filled_columns(rows)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rest))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables of a report; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("report", type=Path, nargs="?", help="a benchmark's JSON (default: the newest of a CPU, kept)")
    parser.add_argument("--save", action="store_true", help="keep it, in bench/results")
    parser.add_argument("--docs", action="store_true", help="rewrite what README and docs/performance.md show")
    arguments = parser.parse_args(argv)
    report = json.loads(arguments.report.read_text()) if arguments.report else newest()
    if report is None:
        parser.error(f"no report is in {RESULTS}: give one")
    if report.get("rehearsal") and (arguments.save or arguments.docs):
        parser.error(f"{arguments.report} is of a rehearsal: no figure in it is a GPU's")
    if arguments.report or not arguments.docs:
        print(render(report), end="")
    for path in save(report) if arguments.save else ():
        print(f"saved: {path}")
    if arguments.docs:
        cpu, gpu = (slim(report) if of_gpu(report) == gpu else newest(gpu) for gpu in (False, True))
        assert cpu is not None, f"no report of a CPU is in {RESULTS}"
        README.write_text(opening(README.read_text(), cpu))
        PAGE.write_text(rewritten(PAGE.read_text(), cpu, gpu))
        print(f"rewritten: {README}, {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
