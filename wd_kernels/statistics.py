"""What a step has made of every tensor: norms, changes, what is not finite, from the pass that steps them.

The kernels leave numbers of blocks (`epilogues.STATISTICS`); what is here adds them up when somebody looks.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import operator
import os
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import sums
from .epilogues import STATISTICS
from .norms import reductions
from .reference import sqrt
from .sharding import largest_over, sum_over
from .state_dict import unwrapped
from .table import Watched

__all__ = ["Measured", "Statistics", "checked_every"]

_SUMMED = ("grad", "param", "change")


class Measured(NamedTuple):
    r"""Numbers of tensors, of groups, or of all together: float64 [n] each, on the parameters' device.

    NaN where nothing was measured: no gradient, or a skipped step.

    Attributes:
        grad_norm: :math:`\|g\|_2` of gradients as they are stepped: unscaled, clipped, negative if they are maximized.
        param_norm: :math:`\|\theta\|_2` after the step, as parameters are stored.
        update_norm: :math:`\|\Delta\theta\|_2` of what the step has changed.
        max_update: :math:`\max|\Delta\theta|`.
        update_ratio: update_norm / param_norm.
        nonfinite: how many elements of the gradients are infinite or NaN, as they are stepped.
    """

    grad_norm: Tensor
    param_norm: Tensor
    update_norm: Tensor
    max_update: Tensor
    update_ratio: Tensor
    nonfinite: Tensor


class _Blocks:
    """What the launches of a step have left: numbers of blocks, by bucket, and whose they are.

    Attributes:
        numbers: [blocks, numbers of STATISTICS] of each bucket.
        slots: of each of these blocks, its parameter; on the host.
        stepped: which parameters had a gradient.
        live: the numbers are those of a captured step, whose replays write them.
    """

    def __init__(self, watched: Watched, stepped: Tensor, live: bool) -> None:
        self.numbers, self.slots, self.stepped, self.live = [], watched.slots, stepped != 0, live
        for bucket, numbers in zip(watched.buckets, watched.numbers, strict=True):
            before = bucket.spec.epilogues[: bucket.spec.epilogues.index(STATISTICS)]
            first = sum(len(own.numbers) for own in before)
            own = numbers[:, first : first + len(STATISTICS.numbers)]
            self.numbers.append(own if live else own.clone())


class Statistics:
    """What `opt.statistics` returns: the numbers of the last step that was measured.

    It is the same object for all steps. Looking at numbers adds up what the kernels have left; on a GPU that is
    launched, and nobody waits. Where parameters are sharded the first look after a step sums over processes: all of
    them look.

    Attributes:
        fresh: did the last step measure?
        names, group_names: of parameters and groups, in order.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], every: int, model: nn.Module | None) -> None:
        self._every, self.fresh = every, False
        self._taken = self._step = 0
        self._blocks: _Blocks | None = None
        self._reductions: list[tuple[Any, Tensor]] = []
        self._known: tuple[weakref.ref[Watched], list[Any]] | None = None  # what these are of
        self._group_of: list[int] = []
        self._found: tuple[Measured, Measured, Measured, Tensor] | None = None
        of_model = model.named_parameters() if model is not None else ()
        self._of_model = {id(p): (weakref.ref(p), unwrapped(name)) for name, p in of_model}
        self._name(groups)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_of_model": {}, "_reductions": [], "_known": None}

    # The optimizer's part ---------------------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Does the next step measure?"""
        return self._taken % self.every == 0

    def take(
        self, watched: Watched | None, params: Sequence[Tensor], places: Sequence[tuple[int, int]],
        groups: Sequence[Mapping[str, Any]], stepped: Tensor, captured: bool,
    ) -> None:  # fmt: skip
        """A step is taken: with `watched` it was measured, of these parameters of groups.

        Args:
            stepped: which of them had a gradient.
            captured: in a graph, whose replays write the numbers again.
        """
        self._taken += 1
        self.fresh = watched is not None and STATISTICS in watched.epilogues
        if not self.fresh or watched is None:
            return
        self._step, self._found, self._blocks = self._taken, None, _Blocks(watched, stepped, captured)
        # Where parameters or groups are others, the launches are.
        named = [(own.get("name"), id(own.get("param_names")), len(own.get("param_names") or ())) for own in groups]
        known = self._known
        if known is None or known[0]() is not watched or known[1] != named:
            self._known = weakref.ref(watched), named
            self._name(groups)
            self._group_of = [g for g, _ in places]
            device = watched.buckets[0].spec.device if watched.buckets else torch.device("cpu")
            self._reductions = reductions(params, list(range(len(params))), device)

    def _name(self, groups: Sequence[Mapping[str, Any]]) -> None:
        def unlike(name: str, otherwise: str) -> str:
            known.add(own := otherwise if name in known else name)
            return own

        known: set[str] = set()
        self.group_names: tuple[str, ...] = tuple(
            unlike(str(own.get("name", g)), f"{own.get('name', g)} (group {g})") for g, own in enumerate(groups)
        )
        known = {"all", *(f"groups.{name}" for name in self.group_names)}
        names = []
        for g, group in enumerate(groups):
            own = group.get("param_names") or ()
            for k, p in enumerate(group["params"]):
                name = str(own[k]) if k < len(own) else f"{g}.{k}"
                known_as = self._of_model.get(id(p))
                if known_as is not None and known_as[0]() is p:
                    name = known_as[1]
                names.append(unlike(name, f"{name} (group {g}, index {k})"))
        self.names: tuple[str, ...] = tuple(names)

    # What was measured ------------------------------------------------------------------------------------------------

    @property
    def every(self) -> int:
        """So many steps apart it measures."""
        return self._every

    @property
    def step(self) -> int:
        """The number of the step that the numbers are of, counted from 1 since it was asked for; 0: none yet."""
        return self._step

    @property
    def tensors(self) -> Measured:
        """Of every parameter, in the order of `names`."""
        return self._all()[0]

    @property
    def groups(self) -> Measured:
        """Of every group, in the order of `group_names`."""
        return self._all()[1]

    @property
    def total(self) -> Measured:
        """Of all parameters together: [1] each."""
        return self._all()[2]

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @torch.no_grad()
    def _all(self) -> tuple[Measured, Measured, Measured, Tensor]:
        if self._blocks is None:
            raise RuntimeError("no step has been measured yet: the next step() is")
        if self._found is None or self._blocks.live:
            with torch._C.DisableTorchFunction():
                self._found = _measured(self._blocks, self._group_of, len(self.group_names), self._reductions)
        return self._found

    def scalars(self, prefix: str = "", tensors: bool = True) -> dict[str, float]:
        """All numbers by name, for a logger; this waits for the device, once.

        Args:
            prefix: before every key.
            tensors: those of every parameter too, not of groups and all alone.

        Returns:
            ``"grad_norm/all"``, ``"grad_norm/groups.0"``, ``"grad_norm/layer.weight"``, ... of all fields of
            :class:`Measured`: TensorBoard and Weights & Biases make a section of what comes before the last slash. What
            was not measured is not there.

        Example:
            >>> import torch, wd_kernels
            >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
            >>> opt = wd_kernels.SGDW([("w", w)], lr=0.5)
            >>> stats = opt.statistics(every=10)
            >>> w.grad = torch.tensor([6.0, 8.0])
            >>> opt.step()
            >>> found = stats.scalars("optim/", tensors=False)
            >>> found["optim/grad_norm/all"], found["optim/update_norm/all"], found["optim/nonfinite/groups.0"]
            (10.0, 5.0, 0.0)
        """
        *parts, known = self._all()
        names = [*self.names, *(f"groups.{name}" for name in self.group_names), "all"]
        fields = torch.stack([torch.cat(own) for own in zip(*parts, strict=True)], 1)
        here = torch.cat([fields, known[:, None].double()], 1).tolist()
        skipped = 0 if tensors else len(self.names)
        return {
            f"{prefix}{field}/{name}": value
            for name, (*values, there) in zip(names[skipped:], here[skipped:], strict=True)
            if there
            for field, value in zip(Measured._fields, values, strict=True)
        }

    def __str__(self) -> str:
        if self._blocks is None:
            return "statistics: no step has been measured yet"
        of_tensors, of_groups, of_all, known = self._all()
        each = iter(known.tolist())
        lines: list[tuple[str, ...]] = [("", "|g|", "|p|", "|dp|", "max |dp|", "|dp|/|p|", "non-finite")]
        groups = [f"group {name}" for name in self.group_names]
        for own, names in ((of_tensors, self.names), (of_groups, groups), (of_all, ["all"])):
            for name, (*floats, count) in zip(names, torch.stack(own, 1).tolist(), strict=True):
                there = next(each)
                numbers = [f"{x:.4g}" if there else "-" for x in floats]
                if names is not groups or len(groups) > 1:
                    lines.append((name, *numbers, f"{count:.0f}" if there else "-"))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = "\n".join(
            "  ".join(cell.rjust(width) if k else cell.ljust(width) for k, (cell, width) in enumerate(own)).rstrip()
            for own in (zip(line, widths, strict=True) for line in lines)
        )
        return f"step {self.step}\n{table}"

    def __repr__(self) -> str:
        return f"<Statistics every={self.every}, of step {self.step}, {len(self.names)} tensors>"

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """The norms of every tensor and what a step changes of it, side by side, as a matplotlib figure.

        Args:
            path: where it is written, too.

        Raises:
            ImportError: matplotlib is missing.
        """
        try:
            figures = importlib.import_module("matplotlib.figure")
        except ImportError as error:
            raise ImportError("a plot of statistics wants matplotlib: pip install matplotlib") from error
        own = self.tensors
        n = len(self.names)
        figure = figures.Figure(figsize=(10, max(2.5, 1.2 + 0.22 * n)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        places = list(range(n))
        shown = (("|g|", own.grad_norm, "o"), ("|p|", own.param_norm, "s"), ("|dp|", own.update_norm, "^"))
        for name, values, mark in shown:
            left.plot(values.cpu().tolist(), places, mark, markersize=4, label=name)
        right.plot(own.update_ratio.cpu().tolist(), places, "o", markersize=4, color="tab:purple")
        right.axvline(1e-3, color="0.6", linewidth=1, linestyle="--")
        for axes, title in ((left, "norms"), (right, "|dp| / |p|")):
            axes.set_xscale("log")
            axes.set_title(title)
            axes.grid(visible=True, axis="x", alpha=0.3)
        left.set_yticks(places, self.names, fontsize=7)
        left.invert_yaxis()
        left.legend(fontsize=8)
        figure.suptitle(f"step {self.step}", fontsize=10)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def checked_every(every: Any) -> int:
    """A number of steps. Raises TypeError or ValueError."""
    number = None
    if not isinstance(every, bool):
        with contextlib.suppress(TypeError):
            number = operator.index(every)
    if number is None:
        raise TypeError(
            f"every={every!r}: expected a number of steps, or None, which ends it; a model is given as model="
        )
    if number < 1:
        raise ValueError(f"every={every!r}: allowed are whole numbers >= 1, and None, which ends it")
    return number


def _measured(
    blocks: _Blocks, group_of: Sequence[int], groups: int, over: Sequence[tuple[Any, Tensor]]
) -> tuple[Measured, Measured, Measured, Tensor]:
    """Of tensors, of groups, of all; and of all of these, in order, whether they were measured.

    `over`: (process group, parameters) whose numbers are added up.
    """
    n = len(group_of)
    device = blocks.numbers[0].device if blocks.numbers else torch.device("cpu")
    make = partial(torch.zeros, dtype=torch.int64, device=device)
    wide = len(_SUMMED) * sums.WORDS
    rows = make(
        n, wide + 2
    )  # the words of the sums, then how many gradients are not finite, and blocks without numbers
    largest = make(n)
    for numbers, of_host in zip(blocks.numbers, blocks.slots, strict=True):
        slots = of_host.to(device, non_blocking=True)
        named = dict(zip(STATISTICS.numbers, numbers.double().to(device).unbind(1), strict=True))
        words = torch.stack([sums.scattered(named[name], slots, n) for name in _SUMMED], 1)
        missing = named["nonfinite"].isnan()
        rows[:, :wide] += words.view(n, wide)
        rows[:, wide].index_add_(0, slots, named["nonfinite"].nan_to_num(0.0).long())
        rows[:, wide + 1].index_add_(0, slots, missing.long())
        largest.scatter_reduce_(0, slots, named["largest"].view(torch.int64) & ((1 << 63) - 1), "amax")
    stepped = blocks.stepped.to(device, non_blocking=True)
    rows *= stepped[:, None]
    largest *= stepped
    for process_group, which in over:
        sum_over(process_group, rows, which)
        largest_over(process_group, largest, which)
    of_group = torch.tensor(group_of, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
    group_rows, group_largest = make(groups, wide + 2), make(groups)
    group_rows.index_add_(0, of_group, rows)
    group_largest.scatter_reduce_(0, of_group, largest, "amax")
    group_stepped = make(groups).scatter_reduce_(0, of_group, stepped.long(), "amax") != 0
    each = torch.cat([rows, group_rows, rows.sum(0, keepdim=True)])
    maxima = torch.cat([largest, group_largest, group_largest.amax(0, keepdim=True)])
    known = torch.cat([stepped, group_stepped, stepped.any(0, keepdim=True)]) & (each[:, wide + 1] == 0)
    squares = sums.values(each[:, :wide].reshape(-1, sums.WORDS)).view(-1, len(_SUMMED))
    grad, param, change = (torch.where(known, sqrt(own), math.nan) for own in squares.unbind(1))
    largest_change = torch.where(known, maxima.view(torch.float64), math.nan)
    nonfinite = torch.where(known, each[:, wide].double(), math.nan)
    all_fields = (grad, param, change, largest_change, change / param, nonfinite)
    parts = [torch.split_with_sizes(field, [n, groups, 1]) for field in all_fields]
    of_tensors, of_groups, of_all = (Measured(*(part[k] for part in parts)) for k in range(3))
    return of_tensors, of_groups, of_all, known
