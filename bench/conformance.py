"""What the optimizers of this and other libraries keep of what they claim: runs `wd_kernels.testing` on each, in turn.

python bench/conformance.py [--only NAME] [--check CHECK] [--save]

Needs the environment of `make test-ecosystem` for the other libraries; what is not installed is named. `--save` keeps
the table in bench/results/conformance.txt and shows its summary in docs/conformance.md; with `--only` the other
optimizers' lines stay as they are.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from wd_kernels import testing

ROOT = Path(__file__).resolve().parent.parent
KEPT, DOCS = ROOT / "bench" / "results" / "conformance.txt", ROOT / "docs" / "conformance.md"
NO_RUN = "does not run here"


@dataclass(frozen=True)
class Subject:
    """An optimizer: where it is, what it claims, how it is made."""

    package: str  # as it is installed
    path: str  # "module:Class"
    claim: testing.Claim
    options: dict[str, Any] = field(default_factory=dict)

    def load(self) -> Callable[..., Any]:
        module, name = self.path.split(":")
        made: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return made


ADAMW, ADAM = testing.AdamW(), testing.AdamW(decay="l2")
MOMENTUM, L2 = testing.SGD(momentum=0.9), testing.SGD(momentum=0.9, decay="l2")
SUBJECTS = {
    "wd_kernels.AdamW": Subject("wd_kernels", "wd_kernels:AdamW", ADAMW),
    "wd_kernels.AdamW, masters": Subject("wd_kernels", "wd_kernels:AdamW", ADAMW, {"master_weights": True}),
    "wd_kernels.AdamW, stochastic": Subject("wd_kernels", "wd_kernels:AdamW", ADAMW, {"stochastic_rounding": True}),
    "wd_kernels.AdamW, 8 bits": Subject("wd_kernels", "wd_kernels:AdamW", ADAMW, {"state_dtype": "int8"}),
    "wd_kernels.SGDW": Subject("wd_kernels", "wd_kernels:SGDW", MOMENTUM),
    "wd_kernels.AdagradW": Subject("wd_kernels", "wd_kernels:AdagradW", testing.Adagrad()),
    "torch.AdamW, for-loop": Subject("torch", "torch.optim:AdamW", ADAMW, {"foreach": False}),
    "torch.AdamW, foreach": Subject("torch", "torch.optim:AdamW", ADAMW, {"foreach": True}),
    "torch.AdamW, fused": Subject("torch", "torch.optim:AdamW", ADAMW, {"fused": True}),
    "torch.Adam": Subject("torch", "torch.optim:Adam", ADAM),
    "torch.SGD": Subject("torch", "torch.optim:SGD", L2),
    "torch.SGD, fused": Subject("torch", "torch.optim:SGD", L2, {"fused": True}),
    "torch.Adagrad": Subject("torch", "torch.optim:Adagrad", testing.Adagrad(decay="l2")),
    "optimi.AdamW": Subject("torch-optimi", "optimi:AdamW", ADAMW),
    "optimi.SGD": Subject("torch-optimi", "optimi:SGD", L2, {"torch_init": True}),
    "bitsandbytes.AdamW": Subject("bitsandbytes", "bitsandbytes.optim:AdamW", ADAMW),
    "bitsandbytes.AdamW8bit": Subject("bitsandbytes", "bitsandbytes.optim:AdamW8bit", ADAMW, {"min_8bit_size": 1}),
    "torchao._AdamW": Subject("torchao", "torchao.optim:_AdamW", ADAMW),
    "torchao.AdamW8bit": Subject("torchao", "torchao.optim:AdamW8bit", ADAMW),
    "pytorch_optimizer.SGDW": Subject("pytorch-optimizer", "pytorch_optimizer:SGDW", MOMENTUM),
    "flashoptim.FlashAdamW": Subject("flashoptim", "flashoptim:FlashAdamW", ADAMW),
    "flashoptim.FlashAdamW, plain": Subject(
        "flashoptim", "flashoptim:FlashAdamW", ADAMW, {"quantize": False, "master_weight_bits": None, "fused": False}
    ),
}


def lines_of(name: str, only: list[str]) -> list[str]:
    """A subject here and now: a line of counts, and one for each check that does not hold."""
    subject = SUBJECTS[name]
    (first,) = testing.checks(subject.load(), subject.claim, only=["in-place"], **subject.options)
    if " raises " in (why := f" {first.finding().found}"):
        return [f"{name} as {subject.claim}: {NO_RUN}: {why.removeprefix(' raises ')}"]
    report = testing.check(subject.load(), subject.claim, only=only, **subject.options)
    counts = {v: sum(f.verdict == v for f in report.findings) for v in ("holds", "does not", "not offered")}
    lines = [f"{name} as {subject.claim}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())]
    return lines + [
        f"  {f.check:<20} {f.verdict:<11} {f.found}" for f in report.findings if f.verdict != "holds" or only
    ]


def apart(name: str, only: list[str]) -> list[str]:
    """The same in a process of its own, without torch.compile: what a library does to it stays there."""
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--here", "--only", name, *(w for c in only for w in ("--check", c))]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in found.stdout.splitlines() if line.startswith((name, "  "))]
    if found.returncode == 0 and lines:
        return lines
    why = (found.stderr.strip().splitlines() or ["no word"])[-1]
    return [f"{name} as {SUBJECTS[name].claim}: {NO_RUN}: the process ended with {found.returncode}, {why}"]


def verdicts(lines: list[str]) -> dict[str, dict[str, str]]:
    """Of a table: subject to check to verdict, of what does not hold."""
    found: dict[str, dict[str, str]] = {}
    for line in lines:
        if " as " in line and not line.startswith(" "):
            name = line.split(" as ")[0]
            found[name] = {NO_RUN: ""} if NO_RUN in line else {}
        elif line.startswith("  "):
            check, rest = line.split(maxsplit=1)
            found[name][check] = "does not" if rest.startswith("does not") else "not offered"
    return found


def merged(kept: list[str], lines: list[str]) -> list[str]:
    """The kept lines of all subjects, those of `lines` instead of their own."""
    blocks: dict[str, list[str]] = {}
    for line in (*kept, *lines):
        if " as " in line and not line.startswith(" "):
            blocks[name := line.split(" as ")[0]] = [line]
        elif line.startswith("  "):
            blocks[name].append(line)
    return [line for name in SUBJECTS for line in (*blocks.get(name, []), "") if name in blocks]


def summary(lines: list[str]) -> str:
    """Markdown: a row for each subject."""
    rows = ["| optimizer | as | holds | does not hold | not offered |", "|---|---|---|---|---|"]
    heads = {line.split(" as ")[0]: line.split(" as ", 1)[1] for line in lines if " as " in line and line[0] != " "}
    for name, own in verdicts(lines).items():
        claim, _, counts = heads[name].partition(": ")
        cells = [", ".join(f"`{c}`" for c, v in own.items() if v == kind) for kind in ("does not", "not offered")]
        holds = counts.split(" holds")[0] if NO_RUN not in counts else counts
        rows.append(
            f"| `{name.split(',')[0]}`{name[len(name.split(',')[0]) :]} | {claim} | {holds} | {' | '.join(cells)} |"
        )
    return "\n".join(rows)


def checks() -> str:
    """Markdown: a row for each check, by the first sentence of its docstring."""
    rows = ["| check | dtypes, where not float32 alone | what holds |", "|---|---|---|"]
    for name, (function, dtypes) in testing.CHECKS.items():
        own = ", ".join(testing.plain(d) for d in dtypes) if len(dtypes) > 1 else ""
        first = " ".join((function.__doc__ or "").split("\n\n")[0].split())
        rows.append(f"| `{name}` | {own} | {first} |")
    return "\n".join(rows)


def shown(text: str, name: str, table: str) -> str:
    """A text with a table between the markers of its name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    return f"{text.split(begin, 1)[0]}{begin}\n{table}\n{end}{text.split(end, 1)[1]}"


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", default=[], choices=SUBJECTS, metavar="NAME", help=", ".join(SUBJECTS)
    )
    parser.add_argument("--check", action="append", default=[], help="a check, such as decay or decay-bfloat16")
    parser.add_argument("--save", action="store_true", help="keep the table, and show it in the documentation")
    parser.add_argument("--here", action="store_true", help="in this process")
    own = parser.parse_args()
    if own.save and own.check:
        parser.error("--save keeps all checks of an optimizer: leave --check out")
    lines: list[str] = []
    for name in own.only or SUBJECTS:
        try:
            subject = f"{SUBJECTS[name].package} {version(SUBJECTS[name].package)}"
        except ImportError:
            subject = ""
        if not subject and SUBJECTS[name].package != "wd_kernels":
            lines.append(f"{name}: {SUBJECTS[name].package} is not installed")
            print(lines[-1])
            continue
        found = lines_of(name, own.check) if own.here else apart(name, own.check)
        print("\n".join([*found, ""]), flush=True)
        lines += [*found, ""]
    if own.save:
        lines = merged(KEPT.read_text().splitlines() if own.only else [], lines)
        packages = dict.fromkeys(s.package for s in SUBJECTS.values() if s.package != "wd_kernels")
        head = f"CPU tensors; {', '.join(f'{p} {version(p)}' for p in packages)}; without torch.compile"
        KEPT.write_text("\n".join([head, "", *lines]).rstrip() + "\n")
        text = shown(DOCS.read_text(), "conformance", summary(lines))
        DOCS.write_text(shown(text, "checks", checks()))


if __name__ == "__main__":
    main()
