"""Gradients of several backward passes, added up in float32, with the squares of the sums.

    functional.accumulate_(accumulators, grads)   what a caller keeps, and the norm of it
    optimizer.accumulate()                        what `optimizer.step()` takes in the place of gradients

A launch a bucket, which reads gradient and accumulator once and writes the latter; what a norm needs is made of the
values that it has in registers (numerics, section 7), so that clipping needs no pass of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import backends
from . import sums as exact
from .flat.buffers import attached
from .flat.states import FlatGradients
from .formats import FLOAT32, FLOAT64
from .layout import CPU, PARAM, Moving, Place, numel_of
from .norms import Accumulated, empty_sums, reductions, same_objects, slots
from .reference import sqrt
from .rules import RULES
from .sharding import is_sharded, local, same_sharding, sharded_like, sum_over
from .table.lists import Lists, held
from .validation import check_memory, check_parameter, label

__all__ = ["Accumulators", "accumulate"]

#: The rule whose kernels have no states: gradients are added to what lies in the place of its parameters.
CARRIER = RULES["sgdw"]
#: The dtypes that gradients are added up in, of parameters of others in float32.
OWN_DTYPES = (torch.float64, torch.complex64, torch.complex128)
#: How errors call an accumulator.
OF = "the accumulator of "
#: From so many elements on other threads may run meanwhile (csrc/python/uninterrupted.h), which may exchange memory.
LONG = 1 << 23


class _Sums(Lists):
    """The table of accumulators and gradients, in the places of parameters and gradients.

    Args:
        accumulators, grads: one for each.
        new: of all or of each, whether nothing is in it yet.
        name: how errors call the i-th accumulator (role 0) or gradient (role 1).
        backend: by name.
    """

    def __init__(
        self,
        accumulators: list[Tensor],
        grads: list[Tensor],
        new: bool | list[bool],
        name: Callable[[int, int], str],
        backend: str,
    ) -> None:
        roles, self.accumulators = [accumulators, grads], accumulators
        if threading.active_count() > 1 and sum(numel_of(t) for t in accumulators if isinstance(t, Tensor)) >= LONG:
            roles = held(name, roles)
        super().__init__(CARRIER, (), (False, False), name, roles, backend)
        if any(bucket.spec.formats[PARAM] not in (FLOAT32, FLOAT64) for bucket in self.buckets):
            narrow = next(i for i, t in enumerate(accumulators) if t.dtype not in (torch.float32, *OWN_DTYPES))
            raise TypeError(
                f"{name(PARAM, narrow)} has dtype {accumulators[narrow].dtype}: gradients are added up in "
                f"{', '.join(map(str, (torch.float32, *OWN_DTYPES)))}"
            )
        devices = list(dict.fromkeys(bucket.spec.device for bucket in self.buckets))
        if len(devices) > 1:
            raise ValueError(
                f"gradients on {' and '.join(map(str, devices))} are to be added up: the squares of all are, on one "
                "device; allowed is one at a time"
            )
        self.device = devices[0]
        self.segments.moving[:, Moving.ROW] = new if isinstance(new, bool) else self._in_order(new)

    def _in_order(self, values: Sequence[int]) -> Tensor:
        own = torch.tensor(values, dtype=torch.int64, device=CPU)
        return own if isinstance(self.order, range) else own[list(self.order)]

    def add_up(self, sums: Tensor, of_slot: Sequence[int] | None, then: Sequence[Callable[[], object]] = ()) -> None:
        """Adds the gradients, and the squares of what accumulators are then to exact sums.

        Args:
            sums: int64 [copies, slots, sums.WORDS], on the device.
            of_slot: of each, which of them its squares are added to; None: the first.
            then: done as soon as that is launched, whatever a signal's handler raises meanwhile.
        """
        stride = sums.stride(1) * sums.itemsize
        output = self.segments.places[:, Place.OUTPUT]
        output.fill_(sums.data_ptr())
        if of_slot is not None:
            output += self._in_order(of_slot) * stride
        launches, rows = backends.add_up(self, sums)
        torch.autograd.graph.increment_version(self.accumulators)
        backends.launch([*launches, *then], rows)


def _refuse_modes() -> None:
    made = torch.zeros(0, device=CPU)
    if type(made) is not Tensor:
        raise RuntimeError(
            f"what gradients are added up with would be a {type(made).__name__}: that needs memory, and cannot be "
            "under FakeTensorMode or another tensor mode"
        )


def accumulate(accumulators: list[Tensor], grads: list[Tensor], new: bool | list[bool], backend: str) -> Tensor:
    """Adds gradients to a caller's accumulators; the norm of these (`functional.accumulate_`)."""
    if not accumulators:
        return torch.zeros((), dtype=torch.float64, device=CPU)
    _refuse_modes()
    table = _Sums(accumulators, grads, new, lambda role, i: f"{('accumulators', 'grads')[role]}[{i}]", backend)
    of_slot, known = None, {(0, ()): 0}
    if any(map(is_sharded, accumulators)):
        of_slot, known = slots(accumulators, [0] * len(accumulators))
    sums = empty_sums(len(known), table.device)
    table.add_up(sums, of_slot)
    total = sums.sum(0)
    if of_slot is not None:
        for group, rows in reductions(accumulators, of_slot, table.device):
            sum_over(group, total, rows)
    return sqrt(exact.values(total.sum(0, keepdim=True)))[0]


def _drop_gradients(params: Sequence[Tensor], flat: FlatGradients) -> None:
    """Flat ones become zeros where they lie."""
    if flat.zero_(params):
        return
    for p in params:
        if p.grad is not None and attached(p):
            p.grad.zero_()
        else:
            p.grad = None


class Accumulators:
    """Those of an optimizer's parameters: what is in them is stepped in the place of gradients.

    Attributes:
        of: the accumulators, by parameter.
        full: the parameters whose accumulators hold something, in order.
        lent: somebody else was given them, and may write them.
    """

    def __init__(self) -> None:
        self.of: dict[Tensor, Tensor] = {}
        self.full: dict[Tensor, None] = {}
        self.lent = False
        self._params: list[Tensor] = []
        self._slot_of: list[int] = []
        self._sums: Tensor | None = None
        self._complete = False  # the sums are those of all that is in them
        self._device_copies: dict[torch.device, Any] = {}

    def add(self, groups: Sequence[dict[str, Any]], backend: str, flat: FlatGradients) -> None:
        """Adds the gradients of all parameters that have one, and drops them; flat ones become zeros.

        Raises:
            TypeError, ValueError, RuntimeError: naming the parameter; nothing was written.
        """
        for group in groups:
            if not isinstance(group["params"], (list, tuple)):
                group["params"] = list(group["params"])
        places = [(g, k, p) for g, group in enumerate(groups) for k, p in enumerate(group["params"])]
        params = [p for _, _, p in places]
        having = [i for i, p in enumerate(params) if isinstance(p, Tensor) and p.grad is not None]
        if not having:
            return
        if backends.capturing(local(params[having[0]]).device):
            raise RuntimeError(backends.ACCUMULATED)
        _refuse_modes()
        self._lay_out(params, [g for g, _, _ in places])

        def name(role: int, k: int) -> str:
            g, index, _ = places[having[k]]
            own = label(groups[g], g, index)
            return f"{OF}{own}" if role == PARAM else f"the gradient of {own}"

        own = [self._of(params[i], name(PARAM, k)) for k, i in enumerate(having)]
        new = [params[i] not in self.full for i in having]
        table = _Sums(own, [params[i].grad for i in having], new, name, backend)
        table.device_copies = self._device_copies
        n = max(self._slot_of) + 1
        if self._sums is None or self._sums.device != table.device or self._sums.shape[1] != n:
            with torch.inference_mode(False):  # they outlive the caller's mode
                self._sums = empty_sums(n, table.device)
        self._complete = False
        self._sums.zero_()
        note = partial(self._note, [params[i] for i in having], own)
        table.add_up(self._sums, [self._slot_of[i] for i in having], [note, partial(_drop_gradients, params, flat)])

    def _note(self, params: Sequence[Tensor], own: Sequence[Tensor]) -> None:
        self.of.update(zip(params, own, strict=True))
        self.full.update(dict.fromkeys(params))
        self._complete = len(params) == len(self.full)

    def _lay_out(self, params: list[Tensor], group_of: list[int]) -> None:
        """Notes which sum each parameter's squares go to; what is no parameter any more has no accumulator."""
        if same_objects(params, self._params):
            return
        self._complete = False
        known = set(params)
        for p in [p for p in self.of if p not in known]:
            del self.of[p]
            self.full.pop(p, None)
        self._params, self._slot_of = params, slots(params, group_of)[0]

    def _of(self, p: Tensor, what: str) -> Tensor:
        """The accumulator of a parameter, or a new one, which is not yet its own."""
        found, dtype = self.of.get(p), p.dtype if p.dtype in OWN_DTYPES else torch.float32
        if found is not None and p in self.full:
            return found
        check_parameter(p, what.removeprefix(OF))
        here = local(p).detach()
        check_memory(here, what.removeprefix(OF))
        if found is not None and same_sharding(p, found):
            there = local(found)
            if (there.shape, there.device, there.dtype) == (here.shape, here.device, dtype):
                return found
        with torch.inference_mode(False):
            return sharded_like(p, torch.empty_like(here, dtype=dtype))

    def in_place_of_gradients(self) -> Accumulated:
        """What a step has of them."""
        known = self._complete and not self.lent
        of = {p: self.of[p] for p in self.full}
        return Accumulated(of, self._params, self._slot_of, self._sums if known else None)

    def clear(self) -> None:
        """Nothing is in them any more; their memory stays."""
        self.full.clear()
        self._complete = False
