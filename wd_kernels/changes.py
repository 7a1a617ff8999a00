"""Which elements of the parameters steps have changed, from the pass that steps them, for who sends them elsewhere.

The kernels set a bit for each element whose memory holds another number than before (`epilogues.CHANGES`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layout import Place, numel_of
from .master_weights import named
from .sharding import local
from .validation import is_dense

__all__ = ["Change", "Marks", "apply_changes"]

#: Where a parameter lies: what makes its marks those of another one.
_Lies = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]


@dataclass(frozen=True, eq=False)
class Change:
    """What has changed of one parameter.

    Attributes:
        index: which elements, in order, of the flattened parameter (``p.flatten()``): int32 [n], int64 where there are
            2^31 of them or more. Of a DTensor, of its local tensor.
        values: what they are now: [n], of the parameter's dtype.
        shape: of the parameter.
    """

    index: Tensor
    values: Tensor
    shape: torch.Size

    def counts(self, block: int = 1024) -> Tensor:
        """How many elements of each block of so many, in order, have changed: int64 [blocks]."""
        return torch.bincount(self.index // block, minlength=-(-self.shape.numel() // block))


class _Marked(NamedTuple):
    words: Tensor
    lies: _Lies


def _lies(p: Tensor) -> _Lies:
    here = local(p).detach()
    return here.data_ptr(), tuple(here.shape), here.stride(), here.dtype


class Marks:
    """Of one optimizer: a bit for each element of each parameter that was stepped, in the order of its memory."""

    def __init__(self) -> None:
        self._of: dict[Tensor, _Marked] = {}

    def words(self, p: Tensor) -> Tensor:
        """The words of a parameter, int32; where it lies elsewhere than its marks say, all of it may have changed."""
        known, lies = self._of.get(p), _lies(p)
        if known is None or known.lies != lies:
            here, mark = local(p), 0 if known is None else -1
            words = torch.full((-(-numel_of(here) // Place.MARKED),), mark, dtype=torch.int32, device=here.device)
            known = self._of[p] = _Marked(words, lies)
        return known.words

    def all_changed(self, params: Iterable[Tensor]) -> None:
        """Others have written these."""
        for p in params:
            if p in self._of:
                self._of[p].words.fill_(-1)

    @torch.no_grad()
    def take(self, groups: Sequence[Mapping[str, Any]], model: nn.Module | None) -> dict[str | int, Change]:
        """All that has changed, by name; from here on nothing has."""
        of_model = {id(p): name for name, p in model.named_parameters()} if model is not None else None
        found: dict[str | int, Change] = {}
        for position, p, _, _ in named(groups):
            known = self._of.get(p)
            if known is None:
                continue
            if of_model is not None and id(p) not in of_model:
                raise KeyError(
                    f"a parameter of the optimizer, {position!r}, is none of the model's: pass its own model"
                )
            name = position if of_model is None else of_model[id(p)]
            here = local(p).detach()
            whole = known.lies != _lies(p)
            index = torch.arange(here.numel(), device=here.device) if whole else _marked(known.words, here)
            if index.numel():
                values = here.reshape(-1)[index]
                small = here.numel() < 2**31
                found[name] = Change(index.int() if small else index, values, here.shape)
        mine = {id(p) for group in groups for p in group["params"]}
        self._of = {p: own for p, own in self._of.items() if id(p) in mine and own.lies == _lies(p)}
        for own in self._of.values():
            own.words.zero_()
        return found


def _marked(words: Tensor, here: Tensor) -> Tensor:
    """Which elements of a parameter's flattened tensor are marked, in order: int64 [n]."""
    at = words.nonzero()[:, 0]
    each = (words[at][:, None] >> torch.arange(Place.MARKED, dtype=torch.int32, device=words.device)) & 1
    row, bit = each.nonzero().unbind(1)
    index = at[row] * Place.MARKED + bit
    if here.is_complex():
        index = torch.unique_consecutive(index // 2)
    index = index[index < here.numel()]
    if here.is_contiguous():
        return index
    stride = here.stride() if is_dense(here) else torch.empty_like(here, device="meta").stride()
    flat, logical = 1, torch.zeros_like(index)
    for size, step in zip(reversed(here.shape), reversed(stride), strict=True):
        logical += index // step % size * flat
        flat *= size
    return logical.sort().values


@torch.no_grad()
def apply_changes(target: nn.Module | Mapping[Any, Tensor], changes: Mapping[Any, Change]) -> None:
    """Writes changes that `opt.changes` gave into other copies of the parameters.

    Args:
        target: a module, or its tensors by name.
        changes: of these names. They may be on another device, and are then brought here.

    Raises:
        KeyError, TypeError, ValueError: a name that the target does not have, another shape or dtype, an index that is
            not in it; nothing was written.

    Example:
        >>> import torch, wd_kernels
        >>> trained, served = (torch.nn.Linear(2, 1, bias=False) for _ in range(2))
        >>> served.load_state_dict(trained.state_dict())
        <All keys matched successfully>
        >>> opt = wd_kernels.SGDW(trained.named_parameters(), lr=0.5, track_changes=True)
        >>> trained.weight.grad = torch.tensor([[1.0, 0.0]])
        >>> opt.step()
        >>> changes = opt.changes()
        >>> changes["weight"].index.tolist()
        [0]
        >>> wd_kernels.apply_changes(served, changes)
        >>> torch.equal(served.weight, trained.weight)
        True
    """
    own = dict(target.named_parameters()) if isinstance(target, nn.Module) else target
    writes = []
    for name, change in changes.items():
        if name not in own:
            raise KeyError(f"changes of {name!r}: the target has {[*own][:3]}, ...")
        if not isinstance(change, Change):
            raise TypeError(f"changes[{name!r}] is a {type(change).__name__}: expected a Change, of opt.changes()")
        t = local(own[name]).detach()
        index, values, shape = change.index, change.values, change.shape
        if t.shape != shape:
            raise ValueError(f"changes of {name!r} are of shape {tuple(shape)}, and the target's is {tuple(t.shape)}")
        if t.dtype != values.dtype:
            raise TypeError(f"changes of {name!r} are {values.dtype}, and the target is {t.dtype}")
        if index.dtype not in (torch.int32, torch.int64) or index.shape != values.shape or index.dim() != 1:
            raise ValueError(
                f"changes of {name!r} have an index of {index.dtype}, {tuple(index.shape)}, for values of "
                f"{tuple(values.shape)}: expected int32 or int64 [n], and values [n]"
            )
        index = index.to(t.device).long()
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < t.numel()):
            raise ValueError(
                f"changes of {name!r} have indices from {int(index.min())} to {int(index.max())}: the target has "
                f"{t.numel()} elements"
            )
        writes.append((t, index, values.to(t.device)))
    for t, index, values in writes:
        if t.dim():
            t[torch.unravel_index(index, t.shape)] = values
        elif index.numel():
            t.copy_(values[0])
