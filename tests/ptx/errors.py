"""The one error of the executor."""

from __future__ import annotations

__all__ = ["PtxError"]


class PtxError(Exception):
    """PTX that is not known here, or that does what no kernel may; the message names the line of the text."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(f"line {line}: {message}" if line else message)
