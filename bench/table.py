"""Turns pytest-benchmark's JSON into aligned tables: medians, quartile ranges, rates, ratios over rounds.

    python bench/table.py bench.json [--save]

A ratio is the median over rounds of the quotient of two contenders' turns in the same round.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wd_kernels.__main__ import aligned

__all__ = ["Result", "group_costs", "heading", "iqr", "main", "ratio", "render", "results", "steps"]

RESULTS = Path(__file__).parent / "results"
OURS, FUSED, FOREACH = "wd_kernels", "torch fused", "torch foreach"


def iqr(values: Sequence[float]) -> float:
    """The distance of the quartiles; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """How many times longer the other takes, round by round."""
    return statistics.median(b / a for a, b in zip(own, other, strict=True))


@dataclass(frozen=True)
class Result:
    """One contender on one case: seconds per step of every round."""

    case: str
    info: dict[str, Any]
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        return iqr(self.seconds)

    @property
    def rate(self) -> float:
        """GB/s of the byte model."""
        elements: int = self.info["tensors"] * self.info["elements"]
        return float(elements * self.info["bytes_per_parameter"] / self.median / 1e9)

    def ratio(self, other: Result) -> float:
        return ratio(self.seconds, other.seconds)


def results(report: dict[str, Any]) -> dict[str, dict[tuple[str, int], Result]]:
    """The results of a report by case, and there by (contender, groups), in the order of the report."""
    cases: dict[str, dict[tuple[str, int], Result]] = {}
    for entry in report["benchmarks"]:
        info = entry["extra_info"]
        result = Result(entry["group"], info, tuple(entry["stats"]["data"]))
        cases.setdefault(result.case, {})[info["contender"], info["groups"]] = result
    return cases


def heading(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Machine, versions and date."""
    machine = report["machine_info"]
    cpu = machine.get("cpu", {})
    commit = report.get("commit_info", {})
    return [
        ("date", str(report["datetime"])[:16].replace("T", " ") + " UTC"),
        ("commit", str(commit.get("id", "unknown"))[:12] + (" and uncommitted changes" if commit.get("dirty") else "")),
        ("processor", f"{cpu.get('brand_raw', machine.get('processor', 'unknown'))}, {cpu.get('count', '?')} cores"),
        *machine.get("wd_kernels", {}).items(),
    ]


def steps(cases: dict[str, dict[tuple[str, int], Result]]) -> list[tuple[str, ...]]:
    """A row per contender of every case with one group."""
    rows: list[tuple[str, ...]] = [
        ("tensors", "dtype", "gradients", "optimizer", "ms", "IQR", "GB/s", "B/param", "vs fused", "vs foreach")
    ]
    for contenders in cases.values():
        if any(groups > 1 for _, groups in contenders):
            continue
        for i, (name, _) in enumerate(contenders):
            own = contenders[name, 1]
            info = own.info
            what = (size(info["tensors"], info["elements"]), info["dtype"], info["gradients"])
            others = (contenders.get((other, 1)) for other in (FUSED, FOREACH))
            rows.append(
                (
                    *(what if i == 0 else ("",) * 3),
                    name,
                    f"{own.median * 1e3:.3f}",
                    f"{own.iqr * 1e3:.3f}",
                    f"{own.rate:.1f}",
                    str(info["bytes_per_parameter"]),
                    *(f"{own.ratio(other):.2f}" if other else "-" for other in others),
                )
            )
    return rows


def size(tensors: int, elements: int) -> str:
    """Tensors x elements, with Mi where it is whole."""
    return f"{tensors} x {elements}" if elements % 2**20 else f"{tensors} x {elements >> 20}Mi"


def group_costs(cases: dict[str, dict[tuple[str, int], Result]]) -> list[tuple[str, ...]]:
    """A row per contender of every case with many groups: what each group after the first costs."""
    rows: list[tuple[str, ...]] = [
        ("tensors", "lr", "optimizer", "1 group, ms", "many groups, ms", "groups", "us per group", "IQR")
    ]
    for contenders in cases.values():
        many = max(groups for _, groups in contenders)
        names = [name for name, groups in contenders if groups == many > 1 and (name, 1) in contenders]
        for i, name in enumerate(names):
            one, all_of_them = contenders[name, 1], contenders[name, many]
            costs = [(b - a) / (many - 1) for a, b in zip(one.seconds, all_of_them.seconds, strict=True)]
            cost = Result("", {}, tuple(costs))
            info = one.info
            rows.append(
                (
                    *((size(info["tensors"], info["elements"]), info["lr"]) if i == 0 else ("", "")),
                    name,
                    f"{one.median * 1e3:.3f}",
                    f"{all_of_them.median * 1e3:.3f}",
                    str(many),
                    f"{cost.median * 1e6:.2f}",
                    f"{cost.iqr * 1e6:.2f}",
                )
            )
    return rows


def render(report: dict[str, Any]) -> str:
    """The whole text."""
    cases = results(report)
    parts = [aligned(heading(report), indent="")]
    whole, groups = steps(cases), group_costs(cases)
    if len(whole) > 1:
        parts.append(
            "Whole AdamW steps, contenders in turns. ms: median over rounds; GB/s: by the byte model;\n"
            "vs: how many times longer torch's fused and foreach AdamW take (median over rounds).\n"
            "bare loop: the launch alone, on one flat buffer of as many elements.\n\n" + aligned(whole, indent="")
        )
    if len(groups) > 1:
        parts.append("Host cost of parameter groups.\n\n" + aligned(groups, indent=""))
    return "\n\n".join(parts) + "\n"


def save(report: dict[str, Any], text: str, folder: Path) -> Path:
    """Writes the JSON and the text, named by date and processor; returns the path of the text."""
    folder.mkdir(parents=True, exist_ok=True)
    brand = str(report["machine_info"].get("cpu", {}).get("brand_raw", "unknown"))
    name = f"{str(report['datetime'])[:10]}-{re.sub(r'[^a-z0-9]+', '-', brand.lower()).strip('-')}"
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    path = folder / f"{name}.txt"
    path.write_text(text)
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables of a report; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("report", type=Path, help="what --benchmark-json wrote")
    parser.add_argument(
        "--save", nargs="?", type=Path, const=RESULTS, metavar="FOLDER", help="keep it too (default: bench/results)"
    )
    arguments = parser.parse_args(argv)
    report = json.loads(arguments.report.read_text())
    text = render(report)
    print(text, end="")
    if arguments.save:
        print(f"\nsaved as {save(report, text, arguments.save)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
