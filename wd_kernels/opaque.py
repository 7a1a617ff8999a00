"""Dataclasses that libraries of configurations leave alone."""

from __future__ import annotations

from typing import TypeVar

__all__ = ["opaque"]

T = TypeVar("T")


def opaque(cls: type[T]) -> type[T]:
    """Of a dataclass, one that does not look like it: OmegaConf, and so Hydra, would take its objects apart."""
    del cls.__dataclass_fields__  # type: ignore[attr-defined]
    return cls
