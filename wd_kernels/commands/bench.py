"""`bench`: the time of a step on this machine, ours beside torch's, on the shapes of a model, in turns."""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import native
from ..byte_model import Stored, stored_as
from ..model_shapes import Shapes, add_model_arguments, asked_shapes, elements
from ..printing import aligned, failed, in_bytes, progress
from ..rules import RULES
from ..turns import MOST_MEMORY, Contender, Timer, filled, first_line, free_memory, random_values, rounds
from ..version import __version__

__all__ = ["HELP", "add_arguments", "run"]

HELP = "Times a step on this machine, beside torch's fused class, on the shapes of a model, in turns of one run."
EXAMPLES = """examples:
  python -m wd_kernels bench --model gpt2
  python -m wd_kernels bench --model llama-8b/64 --dtype bfloat16 --state-dtype int8 --master-weights split24
  python -m wd_kernels bench --shapes model.safetensors --optimizer sgdw --plot step.png"""

OURS, STREAM = "wd_kernels", "stream"
LONGEST_STREAM = 256 << 20  # bytes
TURN = 0.1  # seconds that a turn takes, at least, but for MOST_STEPS
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--optimizer", choices=list(RULES), default="adamw", help="sgdw has momentum; default: adamw")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of parameters and gradients; float32")
    words = ("float32", "bfloat16", "int8")
    parser.add_argument("--state-dtype", choices=words, default="float32", help="of ours; float32")
    masters = ("none", "split32", "split24", "float32")
    parser.add_argument("--master-weights", choices=masters, default="none", help="of ours, in 16 bits; none")
    parser.add_argument(
        "--against", nargs="+", choices=("fused", "foreach", "for-loop"), default=["fused"], metavar="HOW",
        help="torch's implementations, some of fused, foreach, for-loop; fused",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU; by default what torch takes")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="in each all take a turn; default: 15")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture; needs matplotlib")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all that was measured")


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    label: str
    shapes: Shapes
    rule: str
    dtype: torch.dtype
    options: dict[str, Any]  # of ours
    against: Sequence[str]
    device: torch.device

    @property
    def common(self) -> dict[str, Any]:
        """Of all optimizers."""
        return {"lr": 1e-4, "weight_decay": 0.1} | ({"momentum": 0.9} if self.rule == "sgdw" else {})

    def ours(self, params: Sequence[nn.Parameter]) -> Any:
        cls: Any = getattr(importlib.import_module("wd_kernels.optim"), RULES[self.rule].title)
        return cls(params, **self.common, **self.options)

    def torchs(self, params: Sequence[nn.Parameter], how: str) -> Any:
        flags = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False, "fused": False}}
        cls: Any = getattr(torch.optim, RULES[self.rule].torch.name.rpartition(".")[2])
        return cls(params, **self.common, **flags[how])

    def stored(self) -> tuple[Stored, Stored]:
        """Of ours and of torch's."""
        own = stored_as(self.ours([nn.Parameter(torch.empty(1, dtype=self.dtype, device="meta"))]))
        return own, Stored(self.dtype, self.dtype, (self.dtype,) * len(own.states))

    def needed(self, shapes: Shapes) -> dict[str, float]:
        """Bytes of memory that it takes at most, by what they are for."""
        numels = [torch.Size(shape).numel() for shape in shapes]
        own, theirs = (stored.whole(numels) for stored in self.stored())
        weights = own.pop("weights").kept
        kept = {
            "weights and gradients": weights + own.pop("gradients").kept,
            "states of ours": sum(role.kept for role in own.values()),
        }
        kept |= {f"states of torch {how}": theirs["states"].kept for how in self.against}
        kept |= {"what torch foreach makes in between": 2 * weights} if "foreach" in self.against else {}
        return kept | {"the stream": self.stream_bytes(shapes), "values to fill them with": 4 << 20}

    def stream_bytes(self, shapes: Shapes) -> int:
        """As much as a step moves, so that it is as near as that is, but no more than LONGEST_STREAM."""
        return min(int(self.stored()[0].step_bytes * elements(shapes)) // 8 * 4, LONGEST_STREAM) or 4


def setting_of(arguments: argparse.Namespace) -> Setting:
    """What is asked for. Raises OSError or ValueError."""
    label, shapes = asked_shapes(arguments)
    for name, least in (("rounds", 2), ("threads", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: allowed are {least} and more")
    try:
        device = torch.device(arguments.device)
    except RuntimeError as error:
        raise ValueError(f"--device {arguments.device}: {first_line(error)}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {arguments.device}: allowed are cpu and cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {arguments.device}: there are {torch.cuda.device_count()} GPUs here")
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    for path in (arguments.plot, arguments.json):  # not after minutes of measuring
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"{path} cannot be written: it is a folder, or is in one that is not there")
    if arguments.dtype == "float32" and arguments.master_weights != "none":
        raise ValueError("--master-weights with --dtype float32: allowed beside bfloat16 and float16 parameters")
    if arguments.dtype == "float16" and arguments.master_weights.startswith("split"):
        raise ValueError(f"--master-weights {arguments.master_weights} with --dtype float16: allowed are none, float32")
    options = {"state_dtype": arguments.state_dtype, "master_weights": arguments.master_weights}
    dtype = getattr(torch, arguments.dtype)
    return Setting(label, shapes, arguments.optimizer, dtype, options, arguments.against, device)


def check_memory(setting: Setting, arguments: argparse.Namespace) -> None:
    """Raises ValueError, with numbers, where it does not suffice, before anything is allocated."""
    on_device = setting.device.type == "cuda"
    free = torch.cuda.mem_get_info(setting.device)[0] if on_device else free_memory()
    needed = setting.needed(setting.shapes)
    if free is None or sum(needed.values()) <= MOST_MEMORY * free:
        return

    def fits(**other: int) -> bool:
        """Would it, with these of the arguments?"""
        if arguments.model is not None:
            name, _, ranks = arguments.model.partition("/")
            other = {"shard": int(ranks) if ranks else arguments.shard, "model": name, **other}
        shapes = asked_shapes(argparse.Namespace(**{**vars(arguments), **other}))[1]
        return sum(setting.needed(shapes).values()) <= MOST_MEMORY * free

    hints = [f"--shard {n}" for n in (2**k for k in range(1, 13)) if fits(shard=n)][:1]
    if arguments.model is not None and arguments.model.partition("/")[0] != "resnet50":
        hints += [f"--layers {n}" for n in range(arguments.layers or 100, 0, -1) if fits(layers=n)][:1]
    whole = sum(needed.values())
    parts = ", ".join(f"{in_bytes(size)} for {what}" for what, size in needed.items() if size > 0.001 * whole)
    raise ValueError(
        f"memory: {setting.label} needs {in_bytes(whole)} ({parts}); {in_bytes(free)} are free, of which "
        f"{MOST_MEMORY:.0%} may be taken. {' or '.join(hints) + ' would fit' if hints else 'Nothing smaller fits'}"
    )


# Measuring ------------------------------------------------------------------------------------------------------------


def build(setting: Setting, skipped: dict[str, str]) -> list[Contender]:
    """All that take turns, each after its first step: on the same parameters and gradients, and, where torch's states
    have the dtype of ours, on the same states, so that none has the better memory. `skipped` says who fails."""
    values = random_values(setting.device)
    params = [nn.Parameter(filled(shape, setting.dtype, values)) for shape in setting.shapes]
    for p, shape in zip(params, setting.shapes, strict=True):
        p.grad = filled(shape, setting.dtype, values)
    own, theirs = setting.stored()
    ours = setting.ours(params)
    ours.step()
    them = [Contender(OURS, 1, own.step_bytes, ours.step)]
    for how in setting.against:
        name = f"torch {how}"
        try:
            optimizer = setting.torchs(params, how)
            optimizer.step()
            share_states(ours, optimizer)
            them.append(Contender(name, 1, theirs.step_bytes, optimizer.step))
        except Exception as error:  # no such implementation, or no memory
            skipped[name] = first_line(error)
    size = setting.stream_bytes(setting.shapes)
    streamed = filled((size // 4,), torch.float32, values)
    return [*them, Contender(STREAM, 1, 2 * size / elements(setting.shapes), streamed.neg_)]


def share_states(ours: Any, theirs: torch.optim.Optimizer) -> None:
    """Gives torch's optimizer the states of ours, by their names, which are torch's."""
    for p, state in ours.state.items():
        for name, value in state.items():
            own = theirs.state[p].get(name)
            if isinstance(own, Tensor) and own.dim() and own.shape == value.shape and own.dtype == value.dtype:
                theirs.state[p][name] = value


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Within it torch has so many, and no garbage is collected."""
    before, collects = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(number or before)
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if collects:
            gc.enable()


def measured(setting: Setting, number: int) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """By contender: its bytes, the steps of a turn, and the seconds of a step in each round; and who failed."""
    timer, skipped = Timer(setting.device), dict[str, str]()
    with progress(f"measuring {setting.label}", number + 1) as advance:
        them = build(setting, skipped)
        seconds = TURN * number * len(them)
        found = rounds(them, skipped, seconds, timer, elements(setting.shapes), number, number, after=advance)
    results = {
        c.name: {"bytes": c.bytes_per_parameter * elements(setting.shapes), "steps_of_a_turn": steps,
                 "seconds": [turn["wall"] for turn in turns]}
        for c, steps, turns in found
    }  # fmt: skip
    return results, skipped


def quartiles(own: Sequence[float]) -> list[float]:
    return statistics.quantiles(own, n=4, method="inclusive")


def rates(result: dict[str, Any]) -> list[float]:
    """GB/s of every round."""
    return [result["bytes"] / seconds / 1e9 for seconds in result["seconds"]]


# What is shown --------------------------------------------------------------------------------------------------------


def cells_of(results: dict[str, dict[str, Any]], total: int) -> list[list[str]]:
    """The table: ratios are medians of the quotients within rounds."""

    def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
        return statistics.median(x / y for x, y in zip(a, b, strict=True))

    lines = [["", "ms", "quartiles", "B moved", "GB/s", "of the stream", "time / ours"]]
    for name, result in results.items():
        low, middle, high = (1e3 * seconds for seconds in quartiles(result["seconds"]))
        stream = results.get(STREAM)
        share = f"{median_ratio(rates(result), rates(stream)):.0%}" if stream and name != STREAM else "-"
        ratio = f"{median_ratio(result['seconds'], results[OURS]['seconds']):.2f}" if name != STREAM else "-"
        moved = f"{round(result['bytes'] / total, 4):g}" if name != STREAM else "-"
        rate = f"{statistics.median(rates(result)):.3g}"
        lines.append([name, f"{middle:.3g}", f"{low:.3g} to {high:.3g}", moved, rate, share, ratio])
    return lines


def plot(path: Path, title: str, results: dict[str, dict[str, Any]]) -> None:
    """Bars of milliseconds with their quartiles, and of GB/s beside the stream."""
    figure_module: Any = importlib.import_module("matplotlib.figure")
    names = [name for name in results if name != STREAM]
    figure = figure_module.Figure(figsize=(9, 1.5 + 0.45 * len(names)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", size=10)
    left, right = figure.subplots(1, 2, sharey=True)
    colors = ["#1565c0" if name == OURS else "#9a5b13" for name in names]
    scaled: dict[str, Callable[[str], list[float]]] = {
        "ms of a step, with quartiles: shorter is better": lambda name: [1e3 * s for s in results[name]["seconds"]],
        "GB/s": lambda name: rates(results[name]),
    }
    for axis, (what, values) in zip((left, right), scaled.items(), strict=True):
        each = [quartiles(values(name)) for name in names]
        errors = [[q[1] - q[0] for q in each], [q[2] - q[1] for q in each]]
        bars = axis.barh(
            names, [q[1] for q in each], xerr=errors, color=colors, height=0.6, ecolor="#303030", capsize=3
        )
        beside: dict[str, Any] = {"padding": 3, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5}}
        axis.bar_label(bars, [f"{q[1]:.3g}" for q in each], **beside)
        axis.set_xlim(0, 1.15 * max(q[2] for q in each))
        axis.set_xlabel(what, size=9)
        axis.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    left.invert_yaxis()
    if STREAM in results:
        rate = statistics.median(rates(results[STREAM]))
        right.axvline(rate, color="#303030", linestyle="--")
        right.set_xlim(0, max(1.15 * rate, right.get_xlim()[1]))
        right.annotate(f"stream {rate:.3g}", (rate, 1), (3, 2), xycoords=("data", "axes fraction"),
                       textcoords="offset points", size=8)  # fmt: skip
    figure.savefig(path, dpi=110, metadata={"Software": None})


def machine(device: torch.device) -> str:
    """What it was measured on."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"threads: {torch.get_num_threads()}"
    if device.type == "cpu" and native.C is not None:
        where += f", {native.C.instruction_set()}"
    if device.type == "cpu" and hasattr(os, "getloadavg"):  # of what else runs here
        where += f", load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores before it began"
    return f"wd_kernels {__version__}, torch {torch.__version__}, {where}"


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints the table; returns the exit status."""
    try:
        setting = setting_of(arguments)
        check_memory(setting, arguments)
    except (OSError, ValueError) as error:
        return failed("bench", error)
    total = elements(setting.shapes)
    kinds = [f"states {arguments.state_dtype}"]
    kinds += [f"master weights {arguments.master_weights}"] * (arguments.master_weights != "none")
    what = f"{RULES[setting.rule].title}, {arguments.dtype}, {', '.join(kinds)}"
    with threads(arguments.threads):
        here = machine(setting.device)
        print(f"{setting.label}: {len(setting.shapes)} tensors, {total:,} parameters; {what}\n{here}\n", flush=True)
        results, skipped = measured(setting, arguments.rounds)
    if OURS not in results:
        return failed("bench", RuntimeError(f"our own step failed: {skipped.get(OURS)}"))
    print(aligned(cells_of(results, total), indent=""))
    for name, why in skipped.items():
        print(f"left out: {name}: {why}")
    streamed = in_bytes(setting.stream_bytes(setting.shapes))
    print(
        f"\nms: median of {arguments.rounds} rounds, in each of which all take a turn. Ratios: medians of the quotients"
    )
    print("within a round. B moved: a parameter and step, by the byte model.")
    print(f"stream: torch negates {streamed} in place, read and written once.")
    try:
        if arguments.json is not None:
            about = {
                "model": setting.label,
                "tensors": len(setting.shapes),
                "parameters": total,
                "what": what,
                "on": here,
            }
            arguments.json.write_text(json.dumps({**about, "results": results, "left_out": skipped}, indent=1) + "\n")
        if arguments.plot is not None:
            plot(arguments.plot, f"{setting.label}, {what}\n{here}", results)
    except (OSError, ValueError) as error:  # no such folder, or no such kind of picture
        return failed("bench", error)
    return 0
