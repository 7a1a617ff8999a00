"""States in 8 bits and their scales: shapes, where tiles end beside sharded parameters, and checkpoints.

Tiles are cut in storage order. Where the last dimensions of a contiguous tensor are whole tiles, scales keep the
dimensions before them, so that they are sharded along any of those as the state itself is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .formats import SCALE, TILE, Storage, code_name, has_scales, scale_name, tiles
from .reference import load, store
from .rules import EMA, REFERENCE, RULES, State
from .sharding import check_sharding, is_sharded, local, sharded_like, spec_of
from .validation import check_address, check_type, conform_state, same_layout, without_memory

__all__ = [
    "SCALES",
    "STATES",
    "carried",
    "check_tiles",
    "conform_scale",
    "exported",
    "imported",
    "lies_otherwise",
    "like_scale",
    "restored",
    "scale_of",
    "widened",
]

#: The states of every rule, averages and references, and their scales, by name.
STATES: dict[str, State] = {state.name: state for rule in RULES.values() for state in (*rule.states, EMA, REFERENCE)}
SCALES: dict[str, State] = {state.scale.name: state.scale for state in STATES.values() if state is not REFERENCE}


def _first_cut(shape: Sequence[int]) -> int:
    """From which dimension on the elements are cut into tiles: the last one that makes them whole, or the first."""
    return next((k for k in reversed(range(len(shape))) if math.prod(shape[k:]) % TILE == 0), 0)


def _shape(shape: Sequence[int], cut: int) -> tuple[int, ...]:
    return (*shape[:cut], tiles(math.prod(shape[cut:])))


def like_scale(p: Tensor, theta: Tensor) -> Tensor:
    """The scales of a state of `p`, whose local tensor lies as `theta`: a shape on the meta device.

    Example:
        >>> import torch
        >>> [tuple(like_scale(t, t).shape) for t in map(torch.ones, [(4, 64), (7, 5, 32), (6, 16), (5, 3)])]
        [(4, 2), (7, 5, 1), (3,), (1,)]
    """
    cut = _first_cut(p.shape) if theta.is_contiguous() else 0
    return torch.empty(_shape(theta.shape, cut), dtype=SCALE.dtype, device="meta")


def scale_of(p: Tensor, t: Tensor) -> Tensor:
    """`t`, the scales of a state of `local(p)`, as those of one of `p`."""
    return sharded_like(p, t, _shape(p.shape, _first_cut(p.shape)))


def check_tiles(p: Tensor, what: str) -> None:
    """Raises ValueError where `p` is sharded within a tile: in every process alike."""
    if not is_sharded(p):
        return
    spec, shape = spec_of(p), tuple(p.shape)
    cut, over = _first_cut(shape), dict[int, list[int]]()
    for size, placement in zip(spec.mesh.shape, spec.placements, strict=True):
        if hasattr(placement, "dim") and size > 1:
            over.setdefault(placement.dim, []).append(size)
    for dim, sizes in over.items():
        n, rest = math.prod(sizes), math.prod(shape[dim + 1 :])
        chunk, whole = -(-shape[dim] // n) * rest, tiles(shape[dim] * rest)
        regular = len(sizes) == 1 or shape[dim] % n == 0
        fits = chunk % TILE == 0 and -(-whole // n) * TILE == chunk and regular
        if dim > cut or (dim == cut and not fits and (shape[dim] > 1 or whole > 1)):
            raise ValueError(
                f"{what} of shape {shape} is sharded along dimension {dim} over {n} processes, {chunk} elements each: "
                f"states in 8 bits have a scale for every {TILE} neighbours, which must lie in one process. Give it a "
                "group with state_dtype=torch.bfloat16 (averages: ema_dtype)"
            )
    if over and not local(p).is_contiguous():
        raise ValueError(f"{what} is sharded and not contiguous: states in 8 bits want contiguous shards")


def conform_scale(p: Tensor, like: Tensor, value: Any, what: str, move: bool = False) -> Tensor:
    """`value`, the scales of a state of `p`, as what lies in this process of them, of the shape of `like`.

    `move`: to the device of `p`, of a saved one; else it must be there, in any shape. Raises TypeError or ValueError,
    naming what was found.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} is a {type(value).__name__}: expected a tensor")
    check_type(value, what)
    check_sharding(p, value, what, shape=_shape(p.shape, _first_cut(p.shape)))
    device = local(p).device
    here = local(value).detach().to(device) if move else local(value).detach()
    if here.dtype != SCALE.dtype:
        raise TypeError(f"{what} has dtype {here.dtype}: scales are {SCALE.dtype}")
    if here.numel() != like.numel() or (move and here.shape != like.shape):
        raise ValueError(
            f"{what} has shape {tuple(here.shape)}; allowed is {tuple(like.shape)}, one for every {TILE} elements"
        )
    if here.device != device:
        raise ValueError(f"{what} is on {here.device}; allowed is the parameter's device, {device}")
    check_address(here, what)
    return here.contiguous().view(like.shape)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def _in_8_bits(own: Mapping[str, Any]) -> list[str]:
    """Which states of a parameter are: of its state in an optimizer."""
    named = [name for name in STATES if isinstance(own.get(name), Tensor)]
    return [name for name in named if has_scales(own[name].dtype) and isinstance(own.get(scale_name(name)), Tensor)]


def exported(own: Any) -> Any:
    """A state as it leaves an optimizer: what is in 8 bits under another name."""
    names = {name: code_name(name) for name in _in_8_bits(own)} if isinstance(own, Mapping) else {}
    return {names.get(name, name): value for name, value in own.items()} if names else own


def imported(own: Any, what: str) -> Any:
    """A saved state with what is in 8 bits under its name.

    Raises TypeError where it has been cast, or is not whole: the numbers are lost.
    """
    names = {code_name(name): name for name in STATES if code_name(name) in own} if isinstance(own, Mapping) else {}
    for key, name in names.items():
        for part, dtype in ((key, torch.int8 if STATES[name].signed else torch.uint8), (scale_name(name), SCALE.dtype)):
            value = own.get(part)
            if isinstance(value, Tensor) and value.dtype != dtype:
                raise TypeError(
                    f"the saved state {part!r} of {what} has dtype {value.dtype}, which was {dtype}: it has been cast, "
                    "or loaded into an optimizer of another kind, and is lost"
                )
    return {names.get(key, key): value for key, value in own.items()} if names else own


def widened(own: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A saved state with what is in 8 bits as the float32 numbers that it stands for."""
    own = imported(own, what)
    names = _in_8_bits(own)
    found = {key: value for key, value in own.items() if key not in map(scale_name, names)}
    for name in names:
        codes = local(own[name]).detach()
        found[name] = sharded_like(own[name], load(codes, torch.float32, local(own[scale_name(name)]).to(codes.device)))
    return found


def lies_otherwise(what: str, codes: Tensor, like: Tensor) -> ValueError:
    """The error where a state in 8 bits lies otherwise than its parameter does by now."""
    return ValueError(
        f"{what} has strides {codes.stride()}, the parameter's are {like.stride()}: tiles are cut as they lie in "
        "memory. Have it rounded again: load_state_dict(state, convert_states=True), where state is a saved one, or "
        "optimizer.state_dict()"
    )


def carried(value: Tensor, factor: float, what: str) -> Tensor:
    """A state of another form of its rule, as this one has it: `factor` times."""
    if factor == 1.0:
        return value
    if not math.isfinite(factor):
        raise ValueError(
            f"{what} cannot be carried over: the lr of the next step is 0, by which it would be divided. Give the "
            "optimizer the form that it was saved with"
        )
    return value * factor


def restored(
    saved: Mapping[str, Any], p: Tensor, what: str, storage: Storage, factors: Mapping[str, float], convert: bool
) -> dict[str, Any]:
    """A saved state of `p`, with states in 8 bits where `storage` has them so, and in float32 where it has not.

    Args:
        storage: of the optimizer that loads it.
        factors: what a state is multiplied by, by its name: done here of those that are in 8 bits then.
        convert: round what is saved in more bits to nearest; else it is left as it is.

    Raises TypeError or ValueError, naming the state.
    """
    theta, found = local(p).detach(), dict(saved)
    dense = torch.empty_like(theta, device="meta")  # of a parameter with gaps, states lie without
    for name in [name for name in STATES if isinstance(found.get(name), Tensor)]:
        value, key, of_state = found[name], scale_name(name), f"the saved state {name!r} of {what}"
        live, factor = storage.state_dtype(STATES[name], theta.dtype), factors.get(name, 1.0)
        saved_so = has_scales(value.dtype)
        if without_memory(value) or without_memory(p) or not (saved_so or has_scales(live)):
            continue
        check_type(value, of_state)
        check_sharding(p, value, of_state)
        here = local(value).detach()
        if saved_so:
            scale = found.get(key)
            scale = conform_scale(
                value, like_scale(value, here), scale, f"the saved state {key!r} of {what}", move=True
            )
            alike = value.dtype == live and same_layout(here, dense)
            if alike and factor == 1.0:
                continue
            if value.dtype == live and not alike and not convert:
                raise lies_otherwise(of_state, here, dense)
            here = load(here, torch.float32, scale)
            found[name] = sharded_like(p, here)
            del found[key]
        if has_scales(live) and (saved_so or convert):
            check_tiles(p, what)
            here = conform_state(theta, theta, here.to(theta.device), torch.float32, of_state, convert)
            if not STATES[name].signed and bool((here < 0).any()):
                raise ValueError(f"{of_state} has negative numbers: it is stored in {live}, as it never has any")
            codes = torch.empty_like(theta, dtype=live)
            scale = torch.empty_like(like_scale(p, dense), device=theta.device)
            store(codes, carried(here, factor, of_state), None, scale)
            found[name], found[key] = sharded_like(p, codes), scale_of(p, scale)
    return found
