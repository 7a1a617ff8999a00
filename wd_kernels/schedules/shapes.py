"""One schedule each: constant, step drop, linear warm-up, cosine, warm restarts, warm-up-stable-decay."""

from __future__ import annotations

import contextlib
import dis
import functools
import hashlib
import inspect
import math
import operator
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from types import CellType, CodeType
from typing import Any

from ..opaque import opaque

__all__ = [
    "Constant",
    "Cosine",
    "Schedule",
    "StepDrop",
    "WarmRestarts",
    "Warmup",
    "WarmupStableDecay",
    "is_called",
    "named",
    "where",
    "whole",
]

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    "1-sqrt": lambda x: 1.0 - math.sqrt(x),
}


def whole(value: Any, what: str, least: int = 1) -> int:
    """`value` as an int, or ValueError."""
    with contextlib.suppress(TypeError):
        if not isinstance(value, bool) and operator.index(value) >= least:
            return operator.index(value)
    raise ValueError(f"{what}: allowed are whole numbers >= {least}")


def _count(schedule: Schedule, name: str, least: int = 1) -> None:
    value = getattr(schedule, name)
    what = f"{name}={value!r} of {type(schedule).__name__}"
    schedule._set(**{name: whole(value, what, least)})


def _multiplier(schedule: Schedule, name: str) -> None:
    value = getattr(schedule, name)
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= float(value) < math.inf:
        raise ValueError(f"{name}={value!r} of {type(schedule).__name__}: allowed are finite numbers >= 0")
    schedule._set(**{name: float(value)})


class Schedule(ABC):
    """What the schedules here share: a length, and the restart period that a step lies in.

    Attributes:
        steps: how many steps it lasts; None if it has no end. Past its end a schedule keeps its last value.
        restarts: whether it has warm restarts.
    """

    steps: int | None
    restarts: bool = False

    @abstractmethod
    def __call__(self, t: int) -> float:
        """The multiplier of the step that follows `t` completed ones."""

    @property
    def settles(self) -> int | None:
        """From which number of completed steps on it keeps its value; None: it never does."""
        return getattr(self, "steps", None)

    def _set(self, **attributes: Any) -> None:
        """In the making: afterwards a schedule does not change."""
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    def where(self, t: int) -> tuple[int, int]:
        """(T_cur, T_i): steps completed since the last warm restart, and the length of that period.

        Raises:
            ValueError: the schedule has no end.
        """
        steps = getattr(self, "steps", None)
        if steps is None:
            raise ValueError(f"{self!r} has no end, so that there is no period to speak of: give it steps=")
        return min(t, steps), steps


@opaque
@dataclass(frozen=True)
class Constant(Schedule):
    r""":math:`\eta_t =` `value`.

    Args:
        value: the multiplier, at least 0.
        steps: how long, for use in `Sequential` and `NormalizedDecay`; None: for ever.

    Example:
        >>> Constant(0.5)(1000)
        0.5
    """

    value: float = 1.0
    steps: int | None = None

    def __post_init__(self) -> None:
        _multiplier(self, "value")
        if self.steps is not None:
            _count(self, "steps")

    @property
    def settles(self) -> int:
        return 0

    def __call__(self, t: int) -> float:
        return self.value


@opaque
@dataclass(frozen=True)
class StepDrop(Schedule):
    r""":math:`\eta_t = \gamma^{k}`, where :math:`k` milestones are at or before :math:`t`.

    Args:
        milestones: numbers of completed steps, rising, from 1.
        factor: :math:`\gamma`, at least 0.
        steps: how long, for use in `Sequential` and `NormalizedDecay`; None: for ever.

    Example:
        >>> [StepDrop((30, 60), factor=0.1)(t) for t in (0, 29, 30, 59)]
        [1.0, 1.0, 0.1, 0.1]

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
    """

    milestones: tuple[int, ...]
    factor: float = 0.1
    steps: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.milestones, (str, bytes)) or not isinstance(self.milestones, Iterable):
            raise TypeError(f"milestones={self.milestones!r} of StepDrop: expected a sequence of whole numbers")
        found = [whole(m, f"milestones[{k}]={m!r} of StepDrop") for k, m in enumerate(self.milestones)]
        self._set(milestones=tuple(found))
        if any(a >= b for a, b in zip(self.milestones, self.milestones[1:], strict=False)):
            raise ValueError(f"milestones={self.milestones} of StepDrop: each must be larger than the one before")
        _multiplier(self, "factor")
        if self.steps is not None:
            _count(self, "steps")

    @property
    def settles(self) -> int:
        return max(self.milestones, default=0)

    def __call__(self, t: int) -> float:
        return float(self.factor ** sum(milestone <= t for milestone in self.milestones))


@opaque
@dataclass(frozen=True)
class Warmup(Schedule):
    r"""Linear warm-up: :math:`\eta_t = s + (1 - s)\,(t + 1)/n` for :math:`t < n`, then 1.

    The first step already moves, by :math:`1/n` of the whole way, and the n-th has :math:`\eta = 1`.

    Args:
        steps: :math:`n \ge 1`.
        start: :math:`s \ge 0`, what lies before the first step.

    Example:
        >>> [Warmup(4)(t) for t in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]

    Source: Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 2.2.
    """

    steps: int
    start: float = 0.0

    def __post_init__(self) -> None:
        _count(self, "steps")
        _multiplier(self, "start")

    def __call__(self, t: int) -> float:
        return self.start + (1.0 - self.start) * min((t + 1) / self.steps, 1.0)


@opaque
@dataclass(frozen=True)
class Cosine(Schedule):
    r"""Cosine annealing: :math:`\eta_t = e + (1 - e)\,\tfrac12(1 + \cos(\pi t/n))` for :math:`t < n`, then :math:`e`.

    Args:
        steps: :math:`n \ge 1`.
        end: :math:`e \ge 0`.

    Example:
        >>> [round(Cosine(4)(t), 4) for t in range(5)]
        [1.0, 0.8536, 0.5, 0.1464, 0.0]

    Source: Loshchilov & Hutter, "SGDR", ICLR 2017, equation 5, without restarts.
    """

    steps: int
    end: float = 0.0

    def __post_init__(self) -> None:
        _count(self, "steps")
        _multiplier(self, "end")

    def __call__(self, t: int) -> float:
        return self.end + (1.0 - self.end) * SHAPES["cosine"](min(t, self.steps) / self.steps)


@opaque
@dataclass(frozen=True)
class WarmRestarts(Schedule):
    r"""Cosine annealing with warm restarts, which makes AdamW AdamWR and SGDW SGDWR.

    .. math::
        \eta_t = e + (1 - e)\,\tfrac12(1 + \cos(\pi\,T_{cur}/T_i)), \qquad T_i = T_0\,T_{mult}^{\,i}

    :math:`T_{cur}` counts the completed steps since the last restart: a restart's first step has :math:`\eta = 1`, the
    last one before it :math:`T_{cur} = T_i - 1`. (The authors' Lua code counts before use in the first period alone,
    from :math:`1/T_0` to 1, whose last step has :math:`\eta = 0`; its later periods run as here.)

    Args:
        period: :math:`T_0 \ge 1`, in steps.
        mult: :math:`T_{mult} \ge 1`, a whole number.
        end: :math:`e \ge 0`.

    Example:
        >>> [round(WarmRestarts(2, mult=2)(t), 4) for t in range(7)]
        [1.0, 0.5, 1.0, 0.8536, 0.5, 0.1464, 1.0]

    Source: Loshchilov & Hutter, "SGDR", ICLR 2017, section 3; "Decoupled Weight Decay Regularization", ICLR 2019,
    appendix B.2.
    """

    period: int
    mult: int = 1
    end: float = 0.0
    steps = None
    restarts = True

    def __post_init__(self) -> None:
        _count(self, "period")
        _count(self, "mult")
        _multiplier(self, "end")

    def where(self, t: int) -> tuple[int, int]:
        if self.mult == 1:
            return t % self.period, self.period
        length = self.period
        while t >= length:
            t -= length
            length *= self.mult
        return t, length

    def __call__(self, t: int) -> float:
        done, length = self.where(t)
        return self.end + (1.0 - self.end) * SHAPES["cosine"](done / length)


@opaque
@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    r"""Linear warm-up, then :math:`\eta = 1`, then a decay to :math:`e`.

    With :math:`x` the part of the decay's steps that is completed, its shapes are ``"linear"`` :math:`1 - x`,
    ``"cosine"`` :math:`\tfrac12(1 + \cos \pi x)` and ``"1-sqrt"`` :math:`1 - \sqrt{x}`, scaled to end at :math:`e`.

    Args:
        warmup, stable, decay: steps of each phase; the decay has at least one, the others may have none.
        shape: of the decay.
        end: :math:`e \ge 0`.

    Example:
        >>> [WarmupStableDecay(2, 2, 4)(t) for t in range(9)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]

    Source: Hu et al., "MiniCPM", 2024, section 4; for "1-sqrt" Hägele et al., "Scaling Laws and Compute-Optimal
    Training Beyond Fixed Training Durations", NeurIPS 2024.
    """

    warmup: int
    stable: int
    decay: int
    shape: str = "linear"
    end: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("warmup", 0), ("stable", 0), ("decay", 1)):
            _count(self, name, least)
        if self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r} of WarmupStableDecay: allowed are {', '.join(map(repr, SHAPES))}")
        _multiplier(self, "end")
        self._set(steps=self.warmup + self.stable + self.decay)

    def __call__(self, t: int) -> float:
        if t < self.warmup:
            return (t + 1) / self.warmup
        x = min(max(t - self.warmup - self.stable, 0) / self.decay, 1.0)
        return self.end + (1.0 - self.end) * SHAPES[self.shape](x)


def named(schedule: object) -> str | None:
    """How a schedule is called in checkpoints and pictures: the same in every process, another for another one.

    A function is called by its name, with what it has captured and its defaults, a lambda by its code besides; others
    as they print, without addresses.
    """
    return schedule if schedule is None or isinstance(schedule, str) else _called(schedule, 0)


_CODE = re.compile(r"#\d+\.\d+-[0-9a-f]{8}")
_PYTHON = f"#{sys.version_info.major}.{sys.version_info.minor}-"
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def is_called(schedule: object, saved: str) -> bool:
    """Is `saved` how `named` calls a schedule, or has called it under another Python, or in version 0.1?"""
    now = named(schedule)
    if saved == now or now is None:
        return saved == now
    if _PYTHON not in saved and _CODE.sub("", saved) == _CODE.sub("", now):
        return True
    return saved == getattr(schedule, "__qualname__", None) or _ADDRESS.search(saved) is not None


def _called(value: object, depth: int) -> str:
    if depth > 4:
        return "..."
    if isinstance(value, functools.partial):
        own = [*(_called(v, depth + 1) for v in value.args), *_pairs(value.keywords, depth)]
        return f"partial({', '.join([_called(value.func, depth + 1), *own])})"
    if inspect.ismethod(value):
        return f"{_called(value.__self__, depth + 1)}.{value.__name__}"
    if inspect.isfunction(value):
        names, cells = value.__code__.co_freevars, value.__closure__ or ()
        moved = {i.argval for i in dis.get_instructions(value) if i.opname == "STORE_DEREF"}  # what counts calls, say
        captured = {name: _content(cell) for name, cell in zip(names, cells, strict=True) if name not in moved}
        own = [*_pairs(captured, depth), *_pairs(value.__kwdefaults__ or {}, depth)]
        own += [_called(v, depth + 1) for v in value.__defaults__ or ()]
        code = _PYTHON + _digest(value.__code__) if value.__name__ == "<lambda>" else ""
        return value.__qualname__ + code + (f"({', '.join(own)})" if own else "")
    name = getattr(value, "__qualname__", None)
    if isinstance(name, str):
        return name
    if isinstance(value, tuple) and len(value) <= 16:
        return f"({', '.join(_called(v, depth + 1) for v in value)})"
    if depth and not (value is None or isinstance(value, (Schedule, Real, str))):
        return type(value).__qualname__  # a model that was captured prints pages
    return _ADDRESS.sub("", repr(value))


def _pairs(values: Mapping[str, object], depth: int) -> list[str]:
    return [f"{name}={_called(value, depth + 1)}" for name, value in sorted(values.items())]


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _digest(code: CodeType) -> str:
    """A few digits that tell a function's code from another's, wherever it stands."""

    def parts(code: CodeType) -> tuple[object, ...]:
        inner = [parts(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
        return code.co_code, code.co_names, code.co_varnames, inner

    return hashlib.sha256(repr(parts(code)).encode()).hexdigest()[:8]


def where(part: Callable[[int], float], t: int) -> tuple[int, int]:
    """`part.where(t)`; ValueError if it has no such thing."""
    if isinstance(part, type) or not hasattr(part, "where"):
        raise ValueError(
            f"{part!r} does not say where it restarts: expected a schedule of wd_kernels.schedules, or its where(t)"
        )
    found: tuple[int, int] = part.where(t)
    return found
