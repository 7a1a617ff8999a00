"""`plan`: bytes of a model's step by storage format, and the time that a memory of some rate would take for them."""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..byte_model import Moved, Stored, stored_as
from ..formats import master_dtypes
from ..model_shapes import add_model_arguments, asked_shapes
from ..printing import aligned, failed
from ..rules import RULES

__all__ = ["GPUS", "HELP", "add_arguments", "run"]

HELP = "Bytes, memory and predicted time of a step, for a model, storage formats and a GPU. Nothing is measured."
EXAMPLES = """examples:
  python -m wd_kernels plan --model llama-8b --shard 64 --gpu h200
  python -m wd_kernels plan --model llama-8b/64 --gpu h200 --state-dtype int8 --master-weights split24
  python -m wd_kernels plan --shapes model.safetensors --bandwidth 900 --clip --ema"""

#: GB/s that a GPU's memory has by its maker's datasheet.
GPUS = {
    "a100-80gb": 2039, "b200": 8000, "h100-sxm": 3350, "h200": 4800, "mi300x": 5300, "rx7900xtx": 960,
}  # fmt: skip
#: Of which a step is assumed to have this share.
FRACTION = 0.9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STATES, MASTERS = ("float32", "bfloat16", "int8"), ("none", "split32", "split24", "float32")


class Row(NamedTuple):
    """A line of the table."""

    name: str
    roles: dict[str, Moved]  # of all tensors together
    more: float = 0.0  # bytes that other functions beside the step move

    @property
    def kept(self) -> float:
        return sum(role.kept for role in self.roles.values())

    @property
    def moved(self) -> float:
        return sum(role.read + role.written for role in self.roles.values()) + self.more

    def kept_as(self, *names: str) -> float:
        return sum(self.roles[name].kept for name in names if name in self.roles)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--optimizer", choices=list(RULES), default="adamw", help="sgdw has momentum; default: adamw")

    def some_of(name: str, words: Sequence[str], what: str) -> None:
        parser.add_argument(name, nargs="+", choices=words, metavar="WORD", help=f"{what}: some of {', '.join(words)}")

    some_of("--dtype", list(DTYPES), "of parameters, float32 and bfloat16 unless asked for")
    some_of("--state-dtype", STATES, "all unless asked for")
    some_of("--master-weights", MASTERS, "beside 16-bit parameters, all unless asked for")
    parser.add_argument("--grad-dtype", choices=list(DTYPES), help="of gradients; default: the parameters'")
    parser.add_argument("--amsgrad", action="store_true", help="with the largest second moments")
    parser.add_argument("--clip", action="store_true", help="max_grad_norm: gradients are read once more")
    parser.add_argument("--accumulate", type=int, default=0, metavar="N", help="accumulate() of N gradients a step")
    parser.add_argument("--ema", nargs="?", const="float32", choices=STATES, help="ema_decay, stored as; float32")
    parser.add_argument("--decay-to", action="store_true", help="decay_to: a tensor of what weights decay to is read")
    parser.add_argument("--statistics", action="store_true", help="a step whose statistics are taken")
    parser.add_argument("--track-changes", action="store_true", help="a bit for each element that a step changes")
    parser.add_argument("--gpu", choices=list(GPUS), help=f"{FRACTION:.0%} of its datasheet's GB/s".replace("%", "%%"))
    parser.add_argument(
        "--bandwidth", type=float, metavar="GB/S", help="of the memory, measured say, in place of --gpu"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the table, in numbers")


def formats(arguments: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """(dtype, states, masters) of what is asked for. Raises ValueError, where nothing is left."""
    found = 0
    for dtype in arguments.dtype or ("float32", "bfloat16"):
        known = {"none": None, "float32": torch.float32, "split32": torch.int16, "split24": torch.int8}
        allowed = [m for m in MASTERS if known[m] is None or known[m] in master_dtypes(DTYPES[dtype])]
        masters = [m for m in arguments.master_weights or allowed if m in allowed]
        if not masters and arguments.dtype:
            raise ValueError(
                f"master_weights {' '.join(arguments.master_weights)} beside {dtype}: allowed are {', '.join(allowed)}"
            )
        for master in masters:
            for state in arguments.state_dtype or STATES:
                found += 1
                yield dtype, state, master
    if not found:
        raise ValueError("no storage format has all of that")


def memory_rate(arguments: argparse.Namespace) -> tuple[float | None, str]:
    """GB/s, and what it is. Raises ValueError."""
    if arguments.bandwidth is not None:
        if not 0 < arguments.bandwidth < math.inf:
            raise ValueError(f"--bandwidth {arguments.bandwidth}: allowed are numbers > 0, of GB/s")
        return arguments.bandwidth, f"{arguments.bandwidth:g} GB/s, as given by --bandwidth"
    if arguments.gpu is None:
        return None, ""
    rate = FRACTION * GPUS[arguments.gpu]
    return rate, f"{rate:.0f} GB/s: {FRACTION:.0%} of the {GPUS[arguments.gpu]} of {arguments.gpu}'s datasheet"


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of our class, beside the formats. Raises ValueError."""
    if arguments.accumulate < 0:
        raise ValueError(f"--accumulate {arguments.accumulate}: allowed are 0 and more")
    if arguments.amsgrad and arguments.optimizer != "adamw":
        raise ValueError(f"--amsgrad with --optimizer {arguments.optimizer}: adamw alone has it")
    options: dict[str, Any] = {"momentum": 0.9} if arguments.optimizer == "sgdw" else {}
    options |= {"amsgrad": True} if arguments.amsgrad else {}
    options |= {"ema_decay": 0.999, "ema_dtype": arguments.ema} if arguments.ema else {}
    return options | ({"decay_to": "initial"} if arguments.decay_to else {})


def rows(arguments: argparse.Namespace, numels: Sequence[int]) -> list[Row]:
    """Torch's fused steps, then ours. Raises ValueError, where they cannot be."""
    rule, options = RULES[arguments.optimizer], options_of(arguments)
    cls: Any = getattr(importlib.import_module("wd_kernels.optim"), rule.title)
    more: dict[str, Any] = {
        "clips": arguments.clip, "accumulated": arguments.accumulate, "statistics": arguments.statistics,
        "marks": arguments.track_changes,
    }  # fmt: skip
    ours, torchs = [], {}
    for dtype, state, master in formats(arguments):
        own = DTYPES[dtype]
        p = torch.nn.Parameter(torch.empty(1, dtype=own, device="meta"))
        stored = stored_as(
            cls([p], state_dtype=state, master_weights=master, **options), DTYPES.get(arguments.grad_dtype), **more
        )
        masters = {"none": "", "float32": " + float32 master"}.get(master, f" + {master}")
        ours.append(Row(f"{dtype}{masters}, {state} states", stored.whole(numels)))
        for name in ("float32", dtype):
            torchs[name] = len(stored.states)
    return [torchs_row(name, states, arguments, rule.torch.name, numels) for name, states in torchs.items()] + ours


def torchs_row(dtype: str, states: int, arguments: argparse.Namespace, name: str, numels: Sequence[int]) -> Row:
    """Of torch's fused class, with clip_grad_norm_ and AveragedModel where we clip and average."""
    own, total = DTYPES[dtype], sum(numels)
    stored = Stored(own, own, (own,) * states, average=own if arguments.ema else None, clips=arguments.clip)
    # To clip is to read gradients, and then to read and to write them; AveragedModel reads the weights once more.
    more = own.itemsize * total * (2 * arguments.clip + (arguments.ema is not None))
    return Row(f"{name.removeprefix('torch.optim.')} of torch, {dtype}", stored.whole(numels), more)


def run(arguments: argparse.Namespace) -> int:
    """Prints the table and what it assumes; returns the exit status."""
    try:
        label, shapes = asked_shapes(arguments)
        rate, why = memory_rate(arguments)
        numels = [math.prod(shape) for shape in shapes]
        table = rows(arguments, numels)
    except (OSError, ValueError) as error:
        return failed("plan", error)
    total = sum(numels)
    print(f"{label}: {len(shapes)} tensors, {total:,} parameters; {RULES[arguments.optimizer].title}")
    print(f"PREDICTED by counting bytes; nothing was measured{f'. Memory: {why}' if why else ''}\n")
    more = arguments.accumulate or arguments.decay_to or arguments.statistics or arguments.track_changes
    print(aligned(cells_of(table, total, rate, alike=not more), indent=""))
    print("\n" + "\n".join(f"- {line}" for line in assumptions(arguments, rate)))
    if arguments.json is not None:
        try:
            arguments.json.write_text(json.dumps(numbers_of(label, table, numels, rate), indent=1) + "\n")
        except OSError as error:
            return failed("plan", error)
    return 0


def cells_of(table: Sequence[Row], total: int, rate: float | None, alike: bool) -> list[list[str]]:
    """The table: bytes a parameter, and of all of them; quotients where torch's rows do the same, `alike`."""
    columns: dict[str, tuple[str, ...]] = {
        "weights": ("weights",),
        "grads": ("gradients",),
        "states": ("states",),
        "masters": ("masters",),
    }
    named = [name for names in columns.values() for name in names]
    more = tuple(dict.fromkeys(role for row in table for role in row.roles if role not in named))
    columns |= {"more": more} if more else {}
    times = (["ms"] if rate else []) + (["torch float32 / it"] if alike else [])
    lines = [["kept, B a parameter:", *columns, "all", "GiB", "moved, B", "GB a step", *times]]
    for row in table:
        each = [*(row.kept_as(*names) for names in columns.values()), row.kept]
        line = [row.name, *(f"{round(size / total, 4):g}" for size in each), f"{row.kept / 2**30:.3g}"]
        line += [f"{round(row.moved / total, 4):g}", f"{row.moved / 1e9:.3g}"]
        line += [f"{row.moved / rate / 1e6:.3g}"] if rate else []
        lines.append([*line, *([f"{table[0].moved / row.moved:.2f}"] if alike else [])])
    return lines


def assumptions(arguments: argparse.Namespace, rate: float | None) -> Iterator[str]:
    """What the numbers mean."""
    yield "kept: in the memory of one process, gradients too. moved: read and written by a step, of long tensors"
    yield "scalars, step counts and the table of tensors are left out: a few hundred bytes a tensor"
    if rate:
        yield "ms: bytes moved by the rate of the memory. Arithmetic, launches and caches are left out, for all rows"
    if arguments.clip:
        yield "clipping: gradients are read once more; torch's clip_grad_norm_ also reads and rewrites them"
    if arguments.accumulate:
        yield f"accumulation: {arguments.accumulate} gradients are added up, and the sum stepped; torch's row has none"
    if arguments.ema:
        yield "average: in the pass of the step; torch's AveragedModel reads the weights once more, and has their dtype"
    if arguments.decay_to:
        yield "decay_to: a tensor that is read, in the parameters' dtype (float32 beside masters); torch's row has none"
    if arguments.statistics:
        yield "statistics: five numbers for each 1024 elements; torch's row has none"
    if arguments.track_changes:
        yield "changes: a bit for each element, read and written at most; torch's row has none"


def numbers_of(label: str, table: Sequence[Row], numels: Sequence[int], rate: float | None) -> dict[str, Any]:
    """The table, for programs."""
    found = [
        {
            "stored": row.name,
            "bytes_kept": {role: moved.kept for role, moved in row.roles.items()},
            "bytes_moved": row.moved,
            "predicted_ms": row.moved / rate / 1e6 if rate else None,
        }
        for row in table
    ]
    return {"model": label, "tensors": len(numels), "parameters": sum(numels), "assumed_gb_per_s": rate, "rows": found}
