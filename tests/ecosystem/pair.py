"""Two processes of one gloo group, kept for all tests of a file, as the suite has them (`tests/ranks.py`)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))
import ranks

ranks.MOST = 2
ranks.PATIENCE = 300.0  # seconds: to import a library, where others do so, too


def run(function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns on each of the two; raises where one raises."""
    return ranks.run(2, function, *args)
