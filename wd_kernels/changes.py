"""Which elements of the parameters steps have changed, from the pass that steps them, for who sends them elsewhere.

The kernels set a bit for each element whose memory holds another number than before (`epilogues.CHANGES`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .layout import Place, numel_of
from .master_weights import named
from .sharding import local
from .state_dict import unwrapped
from .validation import is_dense

__all__ = ["Change", "Marks", "apply_changes", "check_model"]

#: Where a parameter lies: what makes its marks those of another one. The memory itself, since addresses come back.
_Lies: TypeAlias = tuple[StorageWeakRef, int, tuple[int, ...], tuple[int, ...], torch.dtype]
#: Words of marks that are looked through at once.
_WORDS = 1 << 20


@dataclass(frozen=True, eq=False)
class Change:
    """What has changed of one parameter. `torch.load` reads it.

    Attributes:
        index: which elements, in order, of the flattened parameter (``p.flatten()``): int32 [n], int64 where there are
            2^31 of them or more. Of a DTensor, of its local tensor.
        values: what they are now: [n], of the parameter's dtype.
        shape: of the parameter; of a DTensor, of its local tensor.
    """

    index: Tensor
    values: Tensor
    shape: torch.Size

    def counts(self, block: int = 1024) -> Tensor:
        """How many elements of each block of so many, in order, have changed: int64 [blocks]."""
        if block < 1:
            raise ValueError(f"block={block}: allowed are whole numbers >= 1")
        return torch.bincount(self.index // block, minlength=-(-self.shape.numel() // block))


torch.serialization.add_safe_globals([Change])  # what is sent may be saved


class _Marked(NamedTuple):
    words: Tensor
    lies: _Lies


def _lies(p: Tensor) -> _Lies:
    here = local(p).detach()
    memory: StorageWeakRef = StorageWeakRef(here.untyped_storage())  # type: ignore[no-untyped-call]
    return memory, here.data_ptr(), tuple(here.shape), here.stride(), here.dtype


def check_model(model: Any) -> nn.Module | None:
    """Raises TypeError where a model is none."""
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected a torch.nn.Module, whose names parameters have")
    return model


class Marks:
    """Of one optimizer: a bit for each element of each parameter that was stepped, in the order of its memory.

    Attributes:
        generation: another number whenever words are replaced or dropped, which a table's launches may write.
    """

    def __init__(self) -> None:
        self._of: dict[Tensor, _Marked] = {}
        self.generation = 0

    def words(self, p: Tensor) -> Tensor:
        """The words of a parameter, int32; where it lies elsewhere than its marks say, all of it may have changed."""
        known, lies = self._of.get(p), _lies(p)
        if known is None or known.lies != lies:
            known = self._put(p, lies, 0 if known is None else -1)
        return known.words

    def _put(self, p: Tensor, lies: _Lies, mark: int) -> _Marked:
        here, known = local(p), self._of.get(p)
        count = -(-numel_of(here) // Place.MARKED)
        if known is None or known.words.numel() != count or known.words.device != here.device:
            self.generation += known is not None
            words = torch.empty(count, dtype=torch.int32, device=here.device)
        else:
            words = known.words
        own = self._of[p] = _Marked(words.fill_(mark), lies)
        return own

    def all_changed(self, params: Iterable[Tensor]) -> None:
        """Others have written these."""
        for p in params:
            self.words(p).fill_(-1)

    @torch.no_grad()
    def take(
        self, groups: Sequence[Mapping[str, Any]], model: nn.Module | None, clear: bool
    ) -> dict[str | int, Change]:
        """All that has changed, by name; from here on nothing has, if it is to be cleared."""
        names = self._names(groups, check_model(model))
        found: dict[str | int, Change] = {}
        for name, p in names:
            here, known = local(p).detach(), self._of[p]
            small = torch.int32 if here.numel() < 2**31 else torch.int64
            if known.lies != _lies(p) or _all_marked(known.words, numel_of(here)):
                if here.numel():
                    every = torch.arange(here.numel(), dtype=small, device=here.device)
                    found[name] = Change(every, here.flatten().clone(), here.shape)
                continue
            index = _marked(known.words, here) if here.numel() else None
            if index is not None and index.numel():
                found[name] = Change(index.to(small), here.reshape(-1)[index], here.shape)
        if not clear:
            return found
        for _, p in names:
            self._put(p, _lies(p), 0)
        mine = {id(p) for group in groups for p in group["params"]}
        left = {p: own for p, own in self._of.items() if id(p) in mine}
        self.generation += len(left) < len(self._of)
        self._of = left
        return found

    def _names(self, groups: Sequence[Mapping[str, Any]], model: nn.Module | None) -> list[tuple[str | int, Tensor]]:
        """(name, parameter) of all that were stepped. Raises KeyError or ValueError."""
        own = [(name, p) for name, p, _, _ in named(groups) if p in self._of]
        if model is not None:
            of_model = {id(p): unwrapped(name) for name, p in model.named_parameters()}
            strange = [name for name, p in own if id(p) not in of_model]
            if strange:
                raise KeyError(
                    f"a parameter of the optimizer, {strange[0]!r}, is none of the model's: pass its own model"
                )
            own = [(of_model[id(p)], p) for _, p in own]
        names = [name for name, _ in own]
        twice = [name for k, name in enumerate(names) if name in names[:k]] if len(set(names)) < len(names) else []
        if twice:
            raise ValueError(
                f"two parameters of the optimizer are called {twice[0]!r}: pass their model, changes(model)"
            )
        return own


def _all_marked(words: Tensor, count: int) -> bool:
    """Are so many elements?"""
    full, rest = divmod(count, Place.MARKED)
    return bool((words[:full] == -1).all()) and (not rest or int(words[full]) & (1 << rest) - 1 == (1 << rest) - 1)


def _marked(words: Tensor, here: Tensor) -> Tensor:
    """Which elements of a parameter's flattened tensor are marked, in order: int64 [n]."""
    bits = torch.arange(8, dtype=torch.uint8, device=words.device)
    parts = []
    for first in range(0, words.numel(), _WORDS):
        own = words[first : first + _WORDS]
        at = own.nonzero()[:, 0]
        few = 4 * at.numel() < own.numel()
        each = (own[at] if few else own).view(torch.uint8)
        found = ((each[:, None] >> bits) & 1).view(torch.bool).flatten().nonzero()[:, 0]
        if few:
            found = at[found // Place.MARKED] * Place.MARKED + found % Place.MARKED
        parts.append(found + first * Place.MARKED)
    index = torch.cat(parts) if len(parts) != 1 else parts[0]
    if here.is_complex():
        index = torch.unique_consecutive(index // 2)
    if here.numel() % Place.MARKED:  # the last word may have bits of no element
        index = index[index < here.numel()]
    if here.is_contiguous():
        return index
    stride = here.stride() if is_dense(here) else torch.empty_like(here, device="meta").stride()
    flat, logical = 1, torch.zeros_like(index)
    for size, step in zip(reversed(here.shape), reversed(stride), strict=True):
        if size > 1:  # a stride of nothing may be anything
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
    own: Mapping[Any, Tensor]
    if isinstance(target, nn.Module):
        own = {unwrapped(name): p for name, p in target.named_parameters(remove_duplicate=False)}
    else:
        own = target
    for what, named_so in (("the target", own), ("changes", changes)):
        if not isinstance(named_so, Mapping):
            raise TypeError(f"{what} is a {type(named_so).__name__}: expected a module or a dict by name")
    writes = []
    for name, change in changes.items():
        if name not in own:
            raise KeyError(
                f"changes of {name!r}: the target has {[*own][:3]}, ...; opt.changes(model) has the model's names"
            )
        if not isinstance(change, Change):
            raise TypeError(f"changes[{name!r}] is a {type(change).__name__}: expected a Change, of opt.changes()")
        given, index, values, shape = own[name], change.index, change.values, change.shape
        for what, tensor in (("target", given), ("index", index), ("values", values)):
            if not isinstance(tensor, Tensor) or tensor.is_meta:
                raise TypeError(f"the {what} of {name!r} is a {type(tensor).__name__}: expected a tensor with memory")
        t = local(given).detach()
        if any(size > 1 and step == 0 for size, step in zip(t.shape, t.stride(), strict=True)):
            raise ValueError(f"the target of {name!r} is expanded: several of its elements are one in memory")
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
