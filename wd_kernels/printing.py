"""What commands print: aligned tables, and how far long work is."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

__all__ = ["aligned", "failed", "in_bytes", "progress"]


def aligned(rows: Sequence[Sequence[object]], indent: str = "  ") -> str:
    """Rows as lines of aligned columns: numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [all(c[:1].isdigit() or c == "-" for c in column[1:]) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True))
        lines.append((indent + "  ".join(padded)).rstrip())
    return "\n".join(lines)


def in_bytes(size: float) -> str:
    """A size in memory."""
    unit, shift = next(((u, s) for u, s in (("GiB", 30), ("MiB", 20)) if size >= 1 << s), ("KiB", 10))
    return f"{size / (1 << shift):{'.0f' if size >= 100 << shift else '.3g'}} {unit}"


def failed(command: str, error: Exception) -> int:
    """Says on stderr what is wrong with what a command was given; returns its exit status."""
    print(f"python -m wd_kernels {command}: error: {error}", file=sys.stderr)
    return 2


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Within it, what is called after each of so many parts of some work; all is told on stderr.

    A bar, where rich is installed and stderr is a terminal; else a line for every quarter.
    """
    if sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)
    else:
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            if done * 4 // total > (done - 1) * 4 // total:
                print(f"{what}: {100 * done // total}%", file=sys.stderr, flush=True)

        yield advance
