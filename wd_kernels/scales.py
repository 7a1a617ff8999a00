"""The scales of 8-bit states: their shape, and where tiles end beside flat and sharded parameters.

Tiles are cut in storage order. Where the last dimensions of a contiguous tensor are whole tiles, scales keep the
dimensions before them, so that they are sharded along any of those as the state itself is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .formats import SCALE, TILE, tiles
from .sharding import check_sharding, is_sharded, local, sharded_like, spec_of
from .validation import check_address, check_type

__all__ = ["check_tiles", "conform_scale", "like_scale", "scale_of"]


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
                "group with state_dtype=torch.bfloat16"
            )
    if over and not local(p).is_contiguous():
        raise ValueError(f"{what} is sharded and not contiguous: states in 8 bits want contiguous shards")


def conform_scale(p: Tensor, like: Tensor, value: Any, what: str) -> Tensor:
    """`value`, the scales of a state of `p`, as what lies in this process of them, of the shape of `like`.

    Raises TypeError or ValueError, naming what was found and what is allowed.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} is a {type(value).__name__}: expected a tensor")
    check_type(value, what)
    check_sharding(p, value, what, shape=_shape(p.shape, _first_cut(p.shape)))
    here, device = local(value).detach(), local(p).device
    if here.dtype != SCALE.dtype:
        raise TypeError(f"{what} has dtype {here.dtype}: scales are {SCALE.dtype}")
    if here.numel() != like.numel():
        raise ValueError(
            f"{what} has shape {tuple(here.shape)}; allowed is {tuple(like.shape)}, one for every {TILE} elements"
        )
    if here.device != device:
        raise ValueError(f"{what} is on {here.device}; allowed is the parameter's device, {device}")
    check_address(here, what)
    return here.contiguous().view(like.shape)
