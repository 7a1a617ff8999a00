"""torch's Optimizer contract, once: groups, the way of a step, saving and loading."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from . import backends, native
from . import state_dict as state_dicts
from .flat.states import FlatGradients
from .rules import Rule
from .schedules import stepping
from .table import TensorTable
from .validation import Extent, check_disjoint, check_parameter, label, meeting

__all__ = ["DecoupledOptimizer"]


class DecoupledOptimizer(Optimizer):
    """A torch.optim.Optimizer that steps all its parameters through one table."""

    rule: Rule

    def __init__(self, params: ParamsT, backend: str, **defaults: Any) -> None:
        defaults = {**stepping.SETTINGS, **defaults}
        _refuse_flags(defaults, "")
        if backend not in backends.NAMES:
            raise ValueError(f"backend={backend!r}: allowed are {', '.join(map(repr, backends.NAMES))}")
        self.backend = backend
        self._warned_of_export = False
        self.rule.hypers([defaults])
        stepping.check(defaults, "the arguments")
        if defaults["schedule"] is not None and defaults["eta"] != 1:
            raise ValueError(f"eta={defaults['eta']!r} with a schedule, which sets it: allowed is one of them")
        super().__init__(params, defaults)
        self._check_overlaps(0)
        self._new_table()

    def _new_table(self) -> None:
        # No reference to this optimizer: what is dropped is freed at once, not when the garbage collector comes.
        self._table = TensorTable(self.rule, cache(partial(backends.resolve, self.backend)))
        self._flat_gradients = FlatGradients()

    # One native call already, nothing to trace; spelled as torch.optim does, since torch.compiler.disable would import
    # dynamo with this package.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step: one launch for every (device, dtype) of the parameters.

        Args:
            closure: re-evaluates the model and returns the loss, which is returned.

        Raises:
            TypeError, ValueError, RuntimeError: naming the parameter or the hyperparameter; nothing was written.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups if type(self.param_groups) is list else list(self.param_groups)
        table = self._table
        if table.lock._is_owned():  # type: ignore[attr-defined]
            raise RuntimeError(
                "step() was called within a step of the same optimizer, by a signal's handler, a callback of the "
                "garbage collector or a schedule: it cannot be taken there"
            )
        with table.lock, _plain_tensors():
            hypers, ticks = stepping.follow(groups, self.rule.hypers(groups))
            table.step(groups, self.state, hypers, ticks)
        return loss

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. Flat gradients that are kept are zeroed in one go."""
        if set_to_none or not self._flat_gradients.zero_([p for group in self.param_groups for p in group["params"]]):
            super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group. As torch's, and a bad parameter or hyperparameter is an error here, by name."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group is a {type(param_group).__name__}: expected a dict")
        index, given = len(self.param_groups), dict(param_group)
        try:
            state_dicts.adopt_group(param_group, self.defaults)
            asked = dict(param_group)
            try:
                super().add_param_group(param_group)
            except ValueError:
                self._check_repeats(param_group, index, {id(p) for own in self.param_groups for p in own["params"]})
                raise
            group = self.param_groups[-1]
            _refuse_flags(group, f" in param group {index}")
            self.rule.hypers([group], first=index)
            stepping.adopt(group, asked, self.param_groups[:index], f"param group {index}")
            self._check_repeats(group, index, set())
            for k, p in enumerate(group["params"]):
                if not is_lazy(p):
                    check_parameter(p, label(group, index, k))
            if "_table" in self.__dict__:  # the constructor checks all groups at once
                self._check_overlaps(index)
        except BaseException:
            undo = [partial(param_group.clear), partial(param_group.update, given)]  # the caller's, to be tried again
            native.insist([partial(self.param_groups.__delitem__, slice(index, None)), *undo])
            raise

    def _check_repeats(self, group: dict[str, Any], index: int, known: set[int]) -> None:
        for k, p in enumerate(group["params"]):
            if id(p) in known:
                what = label(group, index, k)
                raise ValueError(f"{what} of shape {tuple(p.shape)} is given twice: each parameter has one place")
            known.add(id(p))

    def _check_overlaps(self, first: int) -> None:
        """Raises if a parameter of the groups from `first` on shares memory with another one.

        Of those before them, only such are looked at as lay near when they were added; the rest is for the next step.
        """
        new = {}
        for g, group in enumerate(self.param_groups[first:], first):
            for k, p in enumerate(group["params"]):
                if not is_lazy(p):
                    new[g, k] = Extent(p.detach(), label(group, g, k))
        known: dict[tuple[int, int], tuple[int, int]] = self.__dict__.setdefault("_spans", {})
        near = meeting(new.values(), known) if known else []
        near = [(g, k) for g, k in near if g < first and k < len(self.param_groups[g]["params"])]
        others = {(g, k): self.param_groups[g]["params"][k] for g, k in near}
        old = [Extent(p.detach(), label(self.param_groups[g], g, k)) for (g, k), p in others.items() if not is_lazy(p)]
        check_disjoint([*old, *new.values()])
        known.update((at, extent.span()) for at, extent in new.items() if extent.tensor.numel())

    def state_dict(self) -> dict[str, Any]:
        """As torch's, whose Adam, AdamW and SGD load it. Step counts are copies, not views of the table's vector."""
        hooks = self._optimizer_state_dict_post_hooks
        self._optimizer_state_dict_post_hooks = OrderedDict()  # they see what is exported
        try:
            packed = state_dicts.export(self.rule, super().state_dict(), self.param_groups)
        finally:
            self._optimizer_state_dict_post_hooks = hooks
        lost = None if self._warned_of_export else state_dicts.lost_on_torch(self.rule, packed["param_groups"])
        if lost is not None:
            self._warned_of_export = True
            warnings.warn(lost, stacklevel=2)
        for hook in hooks.values():
            changed = hook(self, packed)
            packed = packed if changed is None else changed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class, or of torch's. Tensors are copied; states keep their stored precision.

        A key that a saved group lacks keeps the live group's value. `decoupled_weight_decay=False` means
        `decay="l2"`. A momentum buffer without a step count counts as started. Narrower states are widened, which is
        exact; a state that would have to be narrowed is an error.

        Raises:
            ValueError, TypeError: naming what does not fit; the optimizer is as it was.
        """
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            if changed is not None:
                state_dict = changed
        groups, state, flat = state_dicts.load(self.rule, self.param_groups, state_dict)
        self.__setstate__({"state": state, "param_groups": groups})
        self._table.flat_states = flat
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        packed: dict[str, Any] = super().__getstate__()
        packed["state"] = state_dicts.with_own_counts(packed["state"])
        # multiprocessing hands these to the process that it starts, which is after this has returned.
        self._handed_over = [own["step"] for own in packed["state"].values() if isinstance(own, dict) and "step" in own]
        packed["backend"] = self.backend
        return packed

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("backend", "auto")
        self.__dict__.setdefault("_warned_of_export", False)
        self.defaults = {**stepping.SETTINGS, **self.defaults}
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self._new_table()


def _plain_tensors() -> AbstractContextManager[object]:
    """Where a torch function mode is on, such as a default device, it is not asked about every attribute."""
    return torch._C.DisableTorchFunction() if torch._C._len_torch_function_stack() else nullcontext()


def _refuse_flags(settings: Mapping[str, Any], where: str) -> None:
    if settings.get("differentiable"):
        raise ValueError(f"differentiable=True{where} is not supported: the step writes in place, outside autograd")
    if settings.get("capturable"):
        raise ValueError(f"capturable=True{where} is not supported yet: allowed is False")
