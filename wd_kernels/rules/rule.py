"""What a rule declares, and what follows from it: states, scalar rows, the arguments of operators.

Everything that depends on lr, step, schedule or decay mode becomes a row of float64 scalars, once per distinct (group,
step count); kernels know no lr and no mode (numerics, section 2). A row is a group part (made from hyperparameters
alone) and a count part (made from the group part, the parameter's own step count t, and whether its buffer is fresh),
end to end.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..averages import AverageDecay, checked, decay_of
from ..formats import EMA_NAME, MASTER_NAME, REFERENCE_NAME, Storage, scale_name
from ..reference import store
from .pull import PULLS, Pull, check_pull
from .scalars import DECAY_MODES, at_least_zero, norm_limit
from .storage import STORAGE, check_storage

__all__ = ["EMA", "MASTER", "REFERENCE", "Hyper", "Hyperparameter", "Part", "Rule", "Settings", "State", "TorchTwin"]

#: The key of torch's groups that tells AdamW from Adam.
FLAG = "decoupled_weight_decay"
#: The key of a group whose gradients are clipped by their own norm.
LIMIT = "max_grad_norm"
#: And of one whose gradients are clipped by value: a setting of every rule, which a row has as `grad_limit`.
VALUE = "max_grad_value"
#: And of one whose parameters are averaged.
AVERAGE = "ema_decay"
#: Keys that a group of any rule may have beside those of storage, and what one without them means.
LIMITS = {LIMIT: None, VALUE: None, AVERAGE: None, **PULLS}
#: Of a group, whatever its rule.
SETTINGS = ("lr", "eta", "weight_decay", "decay", "base_lr", "seed", "decay_center", "decay_threshold")
#: At the end of a row, whatever its rule: kernels that do not pull read the first alone.
LAST = ("seed", "decay_center", "decay_threshold")
MISSING = object()


class _Unnamed(NamedTuple):
    """The decay mode of a group that names none, if torch's flag does not tell another."""

    name: str


#: Values that are what they were under the same key.
PLAIN = (float, int, bool, str, type(None), _Unnamed)

#: The group part or the count part of a row.
Part = tuple[float, ...]


@dataclass(frozen=True)
class State:
    """One state of a rule: a tensor beside each parameter.

    Attributes:
        name: its key in `optimizer.state[p]`.
        plural: what the functional API calls a list of them.
        asked_by: the hyperparameter whose truth asks for it; None: it is always there.
        initial: the hyperparameter that is its first value; None: 0.
        late: it may begin at any step count, as what is asked for later does.
        fresh: the count part of the step that makes it is told so.
        signed: it may be negative.
        of: the state that it has the scales of, where that is in 8 bits; None: it is one itself.
    """

    name: str
    plural: str
    asked_by: str | None = None
    initial: str | None = None
    late: bool = False
    fresh: bool = False
    signed: bool = True
    of: str | None = None

    @cached_property
    def scale(self) -> State:
        """What lies beside it where it is stored in 8 bits."""
        return State(scale_name(self.name), f"{self.plural.removesuffix('s')}_scales", late=True, of=self.name)

    def begin(self, zeros: Tensor, group: Mapping[str, Any], scale: Tensor | None = None) -> Tensor:
        """`zeros`, as the state begins in a group; of a complex one both parts do. `scale`: its scales, zeros too."""
        if self.initial is not None:
            first = float(group[self.initial])
            if scale is not None:
                store(zeros, torch.full_like(zeros, first, dtype=torch.float32), None, scale)
            else:
                (torch.view_as_real(zeros) if zeros.is_complex() else zeros).fill_(first)
        return zeros


#: The average of a parameter, which an epilogue writes: it begins as the parameter, at any step count.
EMA = State(EMA_NAME, "emas", late=True)
#: What a parameter decays to, which is only read: as the parameter, at any step count, where it is not given.
REFERENCE = State(REFERENCE_NAME, "decay_references", late=True)
#: What lies beside a 16-bit parameter that has a master weight: it begins as the parameter, at any step count.
MASTER = State(MASTER_NAME, "master_params", late=True)


@dataclass(frozen=True)
class Hyperparameter:
    """A key of a group that a row depends on, besides "lr" and "eta".

    Attributes:
        kind: "float", "bool" or "str".
        parts: the arguments that operators have for it, where it is several numbers.
        of_states: it says which states there are, or how they begin: whoever holds the states needs it not.
        absent: what a group without it means, which is what torch's class does; None: every group has it.
    """

    name: str
    kind: str = "float"
    parts: tuple[str, ...] = ()
    of_states: bool = False
    absent: Any = None


@dataclass(frozen=True)
class TorchTwin:
    """The class of torch that a rule equals, whose states it exchanges.

    Attributes:
        name: of the class.
        decays: the decay modes that it has, its own first.
        decoupled_flag: its groups have `decoupled_weight_decay`, which is False for "l2".
        capturable: its groups have a key that says so.
        counts_steps: its states have step counts; without one, states that are there have begun.
        all_states: it has the states of all parameters from the start, and cannot step one without.
    """

    name: str
    decays: tuple[str, ...]
    decoupled_flag: bool = False
    capturable: bool = False
    counts_steps: bool = True
    all_states: bool = False


class Settings(NamedTuple):
    """A group's hyperparameters but lr and eta, checked, as plain numbers; `own` are those of its rule alone."""

    decay: str
    weight_decay: float
    states: tuple[State, ...]
    own: tuple[Any, ...]
    storage: Storage = Storage()
    seed: int = 0
    max_grad_norm: float | None = None  # of the group alone
    average: Callable[[int], float] | None = None  # what is kept of the average of a parameter, by its step count
    pull: Pull = Pull()


#: All that a row takes from a group: (settings, lr, eta, a), where a, the scaled learning rate, is eta * lr.
Hyper = tuple[Settings, float, float, float]


@dataclass(frozen=True, eq=False)
class Rule:
    """One update rule, declared. All but `check`, the parts of a row and the equation is data.

    Attributes:
        name: of its equation in every backend.
        title: of its class.
        hyperparameters, states: in order.
        own: the names of `Settings.own`, in order.
        group_scalars, count_scalars: the names of a row's two parts. "frozen", "grad_scale", "l2", "decay" and "t"
            are among them, and "grad_limit": movers read these.
        check: (group, where) to Settings, or an error that names the hyperparameter and the group.
        group_part: (settings, lr, eta, a) to the values of `group_scalars`.
        count_part: (group part, t, fresh) to the values of `count_scalars`.
        equation: the normative arithmetic: (scalars by name, theta, g, states by name) to (u, new states), where g has
            its factor and its share of "l2", and the step is theta - (decay * theta + u).
        torch: the class of torch that it equals.
        metric: what its steps are divided by, in words; empty: by nothing.
        carry: (saved group, live group, its scaled learning rate in the next step) to what a saved state is multiplied
            by, by name, to be one of the live group.
        variants: options that between them show all it can do, by name; the self-check runs them.
    """

    name: str
    title: str
    hyperparameters: tuple[Hyperparameter, ...]
    states: tuple[State, ...]
    own: tuple[str, ...]
    group_scalars: tuple[str, ...]
    count_scalars: tuple[str, ...]
    check: Callable[[Mapping[str, Any], str], Settings]
    group_part: Callable[[Settings, float, float, float], Part]
    count_part: Callable[[Part, int, bool], Part]
    equation: Callable[[SimpleNamespace, Tensor, Tensor, Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]
    torch: TorchTwin
    metric: str
    variants: Mapping[str, Mapping[str, Any]]
    carry: Callable[[Mapping[str, Any], Mapping[str, Any], float], Mapping[str, float]] = lambda saved, live, a: {}
    _memo: dict[tuple[Any, ...], Settings] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scalars", (*self.group_scalars, *self.count_scalars, *LAST))
        object.__setattr__(self, "settings", (*SETTINGS, *self.own))
        object.__setattr__(self, "keys", tuple(own.name for own in self.hyperparameters))
        flag = {FLAG: None} if self.torch.decoupled_flag else {}
        absent = {own.name: own.absent for own in self.hyperparameters if own.absent is not None}
        object.__setattr__(self, "read", ("lr", "eta", *self.keys, *flag, *STORAGE, *LIMITS))
        object.__setattr__(self, "absent", {"eta": 1.0, **absent, **flag, **STORAGE, **LIMITS})

    #: The names of a row's scalars: its two parts, then `LAST`.
    scalars: tuple[str, ...] = field(init=False)
    #: The names of what a device makes a group part of (csrc/layout.h, `SettingWord`).
    settings: tuple[str, ...] = field(init=False)
    #: The keys of `hyperparameters`.
    keys: tuple[str, ...] = field(init=False)
    #: The keys of a group that a row depends on.
    read: tuple[str, ...] = field(init=False, repr=False)
    #: What groups without a key mean, but for "decay" (`mode_of`).
    absent: Mapping[str, Any] = field(init=False, repr=False)

    # States -----------------------------------------------------------------------------------------------------------

    def variant(self, states: Iterable[str]) -> int:
        """Which of the states that need not be there are: a bit for each, in order."""
        there = set(states)
        optional = [state.name for state in self.states if state.asked_by is not None]
        return sum(1 << bit for bit, name in enumerate(optional) if name in there)

    def sets_of_states(self) -> list[tuple[State, ...]]:
        """Every set of states that a group may ask for, the smallest first: there is a kernel for each."""
        optional = [state for state in self.states if state.asked_by is not None]
        asked = [set(own) for n in range(len(optional) + 1) for own in combinations(optional, n)]
        return [tuple(s for s in self.states if s.asked_by is None or s in own) for own in asked]

    # Rows -------------------------------------------------------------------------------------------------------------

    def mode_of(self, group: Mapping[str, Any], default: str) -> Any:
        """The decay mode of a group: its "decay"; else what torch's flag says; else the optimizer's own.

        Torch's `decoupled_weight_decay` is False for "l2"; True is any other mode.
        """
        if "decay" in group:
            return group["decay"]
        decoupled = group.get(FLAG) if self.torch.decoupled_flag else None
        if decoupled is None or bool(decoupled) == (default != "l2"):
            return default
        return "lr_scaled" if decoupled else "l2"

    def hypers(
        self,
        groups: Sequence[Mapping[str, Any]],
        first: int = 0,
        where: str = "param group {}",
        default: str | None = None,
    ) -> list[Hyper]:
        """The checked hyperparameters of every group. Raises before anything was written.

        Args:
            first: the number of the first of `groups`.
            where: what errors call a group, by its number.
            default: the decay mode of groups that name none; by default that of torch's class.

        Raises:
            KeyError, TypeError, ValueError: naming the hyperparameter, the group, what was found and what is allowed.
        """
        result = []
        memo = self._memo
        mode = _Unnamed(self.torch.decays[0] if default is None else default)
        absent = [mode if name == "decay" else self.absent.get(name, MISSING) for name in self.read]
        for i, group in enumerate(groups, first):
            lr, eta, *own = map(group.get, self.read, absent)
            key = tuple(own)
            try:
                settings = memo.get(key)
            except TypeError:  # an unhashable value: betas as a list, say
                settings = None
            if settings is None:
                settings = self._checked(group, key, mode, where.format(i))
            if type(lr) is not float or not 0.0 <= lr < math.inf:
                lr = at_least_zero("lr", _there("lr", lr, group, where.format(i)), where.format(i))
            if type(eta) is not float or not 0.0 <= eta < math.inf:
                eta = at_least_zero("eta", eta, where.format(i))
            result.append((settings, lr, eta, eta * lr))
        return result

    def _checked(self, group: Mapping[str, Any], key: tuple[Any, ...], mode: _Unnamed, where: str) -> Settings:
        whole = {name: _there(name, value, group, where) for name, value in zip(self.read[2:], key, strict=True)}
        settings = self.check({**whole, "decay": self.mode_of(group, mode.name)}, where)
        storage, seed = check_storage(whole, [state.name for state in self.states], where)
        average = checked(whole[AVERAGE], where)
        if average is not None:
            settings = settings._replace(states=(*settings.states, EMA), average=average)
        pull = check_pull(whole, settings.decay, where)
        if pull.refers:
            settings = settings._replace(states=(*settings.states, REFERENCE))
        settings = settings._replace(
            pull=pull, storage=storage, seed=seed, max_grad_norm=norm_limit(whole[LIMIT], where)
        )
        # A tensor may hold another number under the same key: only plain values are remembered.
        if all(type(v) in PLAIN or isinstance(v, AverageDecay) for k in key for v in (k if type(k) is tuple else (k,))):
            if len(self._memo) >= 4096:  # a schedule that moves weight_decay makes a new key a step
                self._memo.clear()
            self._memo[key] = settings
        return settings

    def storage(self, group: Mapping[str, Any], where: str) -> Storage:
        """How a group has its tensors stored. Raises as `hypers` does."""
        return check_storage({**STORAGE, **group}, [state.name for state in self.states], where)[0]

    def asked(self, **truths: Any) -> tuple[State, ...]:
        """The states of a group whose hyperparameters have these values."""
        return tuple(s for s in self.states if s.asked_by is None or truths[s.asked_by])

    def settings_rows(self, hypers: Sequence[Hyper], base_lrs: Sequence[float]) -> Tensor:
        """What a device makes rows of, which counts by itself: float64 [groups, settings], by `settings`.

        Args:
            base_lrs: of groups whose eta is lr over it; of others 0.
        """
        rows = [
            (lr, eta, own.weight_decay, DECAY_MODES.index(own.decay), base_lr, own.seed, *own.pull.scalars, *own.own)
            for (own, lr, eta, _), base_lr in zip(hypers, base_lrs, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.float64, device="cpu").view(len(rows), len(self.settings))

    def rows(self, hypers: Sequence[Hyper], keys: Iterable[tuple[int, int, bool]], averages: bool = False) -> Tensor:
        """The rows of the given (group, step count, fresh) keys: float64 [len(keys), len(scalars)].

        `averages`: the scalars of that epilogue follow.
        """
        flat: list[float] = []
        group_part, count_part = self.group_part, self.count_part
        part: Part = ()
        last, of_group = -1, (0.0, 0.0, 0.0)
        for group, t, fresh in keys:
            if group != last:
                last, part, own = group, group_part(*hypers[group]), hypers[group][0]
                of_group = (own.seed, *own.pull.scalars)
            flat += part
            flat += count_part(part, t, fresh)
            flat += of_group
            if averages:
                kept = decay_of(hypers[group][0].average, t)
                flat += (kept, 1.0 - kept)
        width = len(self.scalars) + 2 * averages
        if not flat:
            return torch.empty(0, width, dtype=torch.float64, device="cpu")
        return torch.frombuffer(array("d", flat), dtype=torch.float64).view(-1, width)


def _there(name: str, value: Any, group: Mapping[str, Any], where: str) -> Any:
    if value is MISSING:
        raise KeyError(f"{where} has no {name!r}; it has {sorted(map(str, group))}")
    return value
