"""What one parameter's tensors must be: layouts, dtypes, devices, overlaps. Errors name the parameter."""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .formats import FORMATS, Storage, dtype_key, exact_in, gradient_dtypes, is_steppable, master_dtypes, state_dtypes
from .reference import store
from .rules import State
from .sharding import local

__all__ = [
    "Extent",
    "check_address",
    "check_disjoint",
    "check_gradient",
    "check_memory",
    "check_parameter",
    "check_roles",
    "check_storage",
    "check_type",
    "conform_state",
    "has_memory",
    "is_dense",
    "is_plain",
    "label",
    "meeting",
    "read_counts",
    "same_layout",
    "step_count",
    "without_memory",
]

Key = TypeVar("Key", bound=Hashable)

#: Of a group that is part of others: the (group, index) of each of its parameters.
PLACES = "_places"
_ALLOWED_DTYPES = ", ".join(
    [*(f.name for f in FORMATS if not f.stochastic and f.part is None), "complex64", "complex128"]
)


def label(group: Mapping[str, Any], group_index: int, index: int) -> str:
    """How errors call a parameter: by its name where the group has names, else by its place."""
    names, places = group.get("param_names"), group.get(PLACES)
    name = names[index] if isinstance(names, (list, tuple)) and index < len(names) else None
    if places is not None:
        group_index, index = places[index]
    place = f"group {group_index}, index {index}"
    if name is not None:
        return f"parameter {name!r} ({place})"
    return f"parameter {index} of group {group_index}"


def is_dense(t: Tensor) -> bool:
    """True if the elements fill a stretch of memory without gaps or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != expected and t.numel():
            return False
        expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """True if equal indices lie at equal offsets: shapes, and strides where they matter."""
    if a.shape != b.shape:
        return False
    if a.stride() == b.stride() or a.numel() == 0:
        return True
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def is_plain(t: Tensor) -> bool:
    """False for subclasses that dispatch for themselves: their memory is not their own."""
    return type(t).__torch_dispatch__ is Tensor.__torch_dispatch__


def has_memory(t: Tensor) -> bool:
    """Has `t` elements that lie at addresses of its own?"""
    strided = not is_lazy(t) and is_plain(t) and t.layout == torch.strided
    return strided and t.numel() > 0 and t.device.type != "meta" and not t._is_zerotensor()


def without_memory(t: Tensor) -> bool:
    """Is `t` a shape alone: on the meta device, or a FakeTensor?"""
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    return t.device.type == "meta" or (fakes is not None and isinstance(t, fakes.FakeTensor))


def check_type(t: Tensor, what: str) -> None:
    """Raises TypeError for a tensor whose memory is not its own: subclasses that dispatch, sparse layouts."""
    here = local(t)
    if not is_plain(here) and not without_memory(here):
        whole = "" if here is t else f"{type(t).__name__} of a "
        raise TypeError(
            f"{what} is a {whole}{type(here).__name__}: subclasses of Tensor that dispatch for themselves cannot be "
            "stepped; allowed are torch.Tensor, torch.nn.Parameter, plain subclasses of them and DTensors of them. "
            "Where it wraps ordinary tensors, step those: wd_kernels.functional takes them"
        )
    if t.layout != torch.strided:
        raise RuntimeError(f"{what} has layout {t.layout}: sparse tensors are not supported; allowed is torch.strided")


def check_parameter(p: Tensor, what: str) -> None:
    """Raises if `p` cannot be stepped at all, whatever its gradient."""
    check_type(p, what)
    p = local(p)
    if not is_steppable(p.dtype):
        raise TypeError(
            f"{what} has dtype {p.dtype}: allowed are {_ALLOWED_DTYPES}. "
            "Leave out what is not trained: [p for p in model.parameters() if p.requires_grad]"
        )
    if not p.is_contiguous() and not is_dense(p) and _overlaps_itself(p):
        raise ValueError(
            f"{what} of shape {tuple(p.shape)} and strides {p.stride()} overlaps itself (an expanded view?): each "
            "element must have memory of its own; pass a contiguous copy"
        )
    if p.is_conj() or p.is_neg():
        raise ValueError(f"{what} is a lazily conjugated or negated view: pass p.resolve_conj().resolve_neg()")


def check_address(t: Tensor, what: str) -> None:
    """Raises if the elements of `t` lie nowhere. Those of torch's tensors of zeros need not."""
    if t.numel() and not t._is_zerotensor() and t.data_ptr() == 0:
        raise ValueError(f"{what} of shape {tuple(t.shape)} on {t.device} has no memory (address 0)")


def check_memory(p: Tensor, what: str) -> None:
    """Raises if the parameter's elements have no address."""
    if without_memory(p):
        raise ValueError(f"{what} is {'on the meta device' if p.is_meta else 'fake'}: it has no memory to step")
    check_address(p, what)


def check_gradient(p: Tensor, grad: Tensor, what: str) -> None:
    """Raises if `grad` cannot be the gradient of `p`, by its shape, device and dtype."""
    if grad.shape != p.shape:
        raise ValueError(f"{what} has shape {tuple(grad.shape)}; allowed is that of the parameter, {tuple(p.shape)}")
    if grad.device != p.device:
        raise ValueError(f"{what} is on {grad.device}; allowed is the parameter's device, {p.device}")
    allowed = gradient_dtypes(p.dtype)
    if grad.dtype not in allowed:
        raise TypeError(
            f"{what} has dtype {grad.dtype}; allowed for a parameter of {p.dtype} are "
            f"{', '.join(sorted(map(str, allowed)))}"
        )


def check_roles(p: Tensor, grad: Tensor | None, what: str, of_grad: str) -> None:
    """Raises if `p`, with `grad` as its gradient, cannot be stepped: what every way to a step checks of its tensors."""
    check_parameter(p, what)
    check_memory(p, what)
    if grad is not None:
        check_type(grad, of_grad)
        check_gradient(p, grad, of_grad)
        check_address(grad, of_grad)


def check_storage(p: Tensor, storage: Storage, states: Iterable[State], what: str) -> None:
    """Raises TypeError if a parameter, or a state of it, cannot be stored as its group asks."""
    for state in states:
        dtype, allowed = storage.state_dtype(state, p.dtype), state_dtypes(p.dtype, state.signed)
        if dtype not in allowed:
            raise TypeError(
                f"{dtype_key(state.name)}={storage.word(state.name)!r} for the state {state.name!r} of {what}, which "
                f"has dtype {p.dtype}: allowed for it are {', '.join(map(str, allowed))}. A group of its own may "
                "ask for another"
            )
    master = storage.master_dtype(p.dtype)
    if master is not None and master not in master_dtypes(p.dtype):
        raise TypeError(
            f"master_weights={storage.masters!r} for {what}, which has dtype {p.dtype}: bfloat16 has the exponent of a "
            "float32, so that a remainder beside it is one. Give float16 parameters a group with "
            "master_weights='float32'"
        )
    if storage.stochastic_params and p.dtype == torch.float16:
        raise TypeError(
            f"stochastic_rounding for {what}, which has dtype {p.dtype}: bfloat16 is what is rounded so. Give float16 "
            "parameters a group with stochastic_rounding='states' or False"
        )


def conform_state(p: Tensor, like: Tensor, value: Any, dtype: torch.dtype, what: str, narrow: bool = False) -> Tensor:
    """`value` as a state of `p` in `dtype`: itself, or a copy in that, laid out as `like`.

    Args:
        narrow: round it to nearest even where `dtype` is narrower; else that is an error.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} is a {type(value).__name__}: expected a tensor")
    check_type(value, what)
    if value.shape != p.shape:
        raise ValueError(f"{what} has shape {tuple(value.shape)}; allowed is that of the parameter, {tuple(p.shape)}")
    if value.device != p.device:
        raise ValueError(f"{what} is on {value.device}; allowed is the parameter's device, {p.device}")
    convertible = narrow and value.is_floating_point() and dtype.is_floating_point
    if not exact_in(value.dtype, dtype) and not convertible:
        raise TypeError(
            f"{what} has dtype {value.dtype}, which does not fit the {dtype} that this optimizer keeps it in (by the "
            f"parameter's dtype, {p.dtype}, and its group's state_dtype or ema_dtype): give the optimizer the one that "
            "it was saved with, or round it, load_state_dict(..., convert_states=True)"
        )
    check_address(value, what)
    if value.dtype == dtype and same_layout(value, like) and not (value.is_conj() or value.is_neg()):
        return value
    made = torch.empty_like(like, dtype=dtype)
    if exact_in(value.dtype, dtype):
        return made.copy_(value)
    store(made, value.detach().float())
    return made


def step_count(value: Any, what: str) -> float:
    """A step count as a number: a non-negative integer, in a tensor of one element or by itself."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{what} has shape {tuple(value.shape)}: expected one number")
        value = value.item()
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{what} is {value!r}: expected a whole number >= 0")
    kept = torch.tensor(float(value), dtype=torch.float32, device="cpu").item()  # as torch keeps counts
    if not 0 <= kept < 2**53 or not float(value).is_integer():
        raise ValueError(f"{what} is {value!r}: allowed are whole numbers >= 0 and < 2**53, in float32")
    return float(kept)


def read_counts(steps: Mapping[Key, Tensor]) -> dict[Key, float]:
    """The numbers in tensors of one element, on whatever device: all are read at once, which waits for it."""
    if not steps:
        return {}
    first = next(iter(steps.values())).device
    together = torch.stack([step.detach().reshape(()).to(first, torch.float64) for step in steps.values()])
    return dict(zip(steps, together.tolist(), strict=True))


@dataclass(frozen=True)
class Extent:
    """The memory of a tensor of a step."""

    tensor: Tensor
    what: str
    written: bool = True

    def span(self) -> tuple[int, int]:
        t = self.tensor
        begin = t.data_ptr()
        last = sum(s * (n - 1) for s, n in zip(t.stride(), t.shape, strict=True))
        return begin, begin + (last + 1) * t.element_size()

    def addresses(self) -> Tensor:
        """The address of every element: for tensors with gaps, whose spans may cross without a common element."""
        t = self.tensor
        at = torch.tensor(0 if t.device.type == "meta" else t.data_ptr(), device="cpu")
        for stride, size in zip(t.stride(), t.shape, strict=True):
            at = at.unsqueeze(-1) + torch.arange(size, device="cpu") * stride * t.element_size()
        return at.flatten()


#: (begin, end, position among all, extent)
_Span = tuple[int, int, int, Extent]


def _overlaps_itself(t: Tensor) -> bool:
    span, nested = 1, True
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride == 0:
            return True
        nested = nested and stride >= span
        span += stride * (size - 1)
    if nested:  # every stride steps over all that the smaller ones reach, as in any slice
        return False
    return len(set(Extent(t, "").addresses().tolist())) < t.numel()


def check_disjoint(extents: Iterable[Extent]) -> None:
    """Raises ValueError if two of the tensors share an element that is written.

    Sorted by where they begin, only what meets is compared: n tensors that do not meet take n log n comparisons, and
    gapped ones that lie in each other's gaps, columns of a matrix, say, are marked in a map of their memory.
    """
    by_device: dict[torch.device, list[_Span]] = {}
    for k, extent in enumerate(extents):
        t = extent.tensor
        if has_memory(t) and t.data_ptr():
            by_device.setdefault(t.device, []).append((*extent.span(), k, extent))
    for spans in by_device.values():
        spans.sort(key=lambda span: span[:3])
        cluster: list[_Span] = []  # of spans that meet one before
        end = 0
        for span in spans:
            if span[0] >= end:
                _check_meeting(cluster)
                cluster = []
            cluster.append(span)
            end = max(end, span[1])
        _check_meeting(cluster)


def meeting(extents: Iterable[Extent], spans: Mapping[Key, tuple[int, int]]) -> list[Key]:
    """The keys of the spans that meet one of the extents', on whatever device."""
    own = sorted(extent.span() for extent in extents if extent.tensor.numel())
    begins = [begin for begin, _ in own]
    ends = list(accumulate((end for _, end in own), max))
    found = []
    for key, (begin, end) in spans.items():
        before = bisect_left(begins, end)  # so many begin before it ends
        if before and ends[before - 1] > begin:
            found.append(key)
    return found


def _check_meeting(spans: Sequence[_Span]) -> None:
    """The same for tensors whose spans meet: every element marks where it lies, those that are only read last."""
    if len(spans) < 2 or not any(extent.written for *_, extent in spans):
        return
    for a, b in pairwise(spans):  # no map is needed to see that whole stretches overlap
        if b[0] < a[1] and (a[3].written or b[3].written) and is_dense(a[3].tensor) and is_dense(b[3].tensor):
            raise _overlap(a, b)
    begin, end = spans[0][0], max(span[1] for span in spans)
    unit = math.gcd(*(extent.tensor.element_size() for *_, extent in spans), *(span[0] - begin for span in spans))
    marks = torch.zeros((end - begin) // unit, dtype=torch.bool, device="cpu")
    in_turn = sorted(spans, key=lambda span: not span[3].written)
    for k, span in enumerate(in_turn):
        extent = span[3]
        t = extent.tensor
        own = t.element_size() // unit
        strides = (*(stride * own for stride in t.stride()), 1)
        at = marks.as_strided((*t.shape, own), strides, (t.data_ptr() - begin) // unit)
        if bool(at.any()):
            raise _overlap(next(other for other in in_turn[:k] if other[3].written and _share(other[3], extent)), span)
        if extent.written:
            at.fill_(True)


def _overlap(*spans: _Span) -> ValueError:
    a, b = (span[3] for span in sorted(spans, key=lambda span: span[2]))
    return ValueError(f"{a.what} and {b.what} overlap in memory: each element must belong to one of them")


def _share(a: Extent, b: Extent) -> bool:
    """Have they an element in common?"""
    (begin, end), (other, last) = a.span(), b.span()
    if end <= other or last <= begin:
        return False
    return (is_dense(a.tensor) and is_dense(b.tensor)) or bool(torch.isin(a.addresses(), b.addresses()).any())
