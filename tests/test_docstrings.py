"""The examples of the docstrings do what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import wd_kernels

OWN = [
    f"wd_kernels.{name}"
    for name in (
        "averages", "backends.device_copy", "changes", "clipping", "decay_conversion", "flat.flatten", "functional",
        "gradient_release", "layout", "optim", "optimizer", "param_groups", "rules.scalars", "rules.storage",
        "scales", "sharding", "state_conversion", "statistics", "sums", "weight_decay_rules",
    )
]  # fmt: skip
OWN += [
    f"wd_kernels.schedules.{name}"
    for name in ("composed", "drawing", "normalized", "published", "reporting", "shapes", "tables")
]
OWN += ["wd_kernels.byte_model", "wd_kernels.model_shapes"]
# A program, the libraries, and what only a machine with Triton can import.
NOT_IMPORTED = (
    "wd_kernels.__main__",
    "wd_kernels._C",
    "wd_kernels._cuda",
    "wd_kernels.backends.triton_begin",
    "wd_kernels.backends.triton_kernels",
)


@pytest.mark.parametrize("name", OWN)
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0


def test_every_module_with_examples_is_here() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = [m.name for m in pkgutil.walk_packages(wd_kernels.__path__, "wd_kernels.")]
    for name in names:
        if name not in OWN and name not in NOT_IMPORTED:
            assert not any(test.examples for test in finder.find(importlib.import_module(name))), name
