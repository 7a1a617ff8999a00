"""What the kit finds of other libraries' optimizers is what bench/results/conformance.txt keeps of them."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import conformance

PEERS = [
    pytest.param(name, id=name, marks=pytest.mark.works(subject.package))
    for name, subject in conformance.SUBJECTS.items()
    if subject.package not in ("torch", "wd_kernels")  # of the main suite: tests/test_testing.py
]


@pytest.mark.parametrize("name", PEERS)
def test_the_kept_table(name: str) -> None:
    kept = conformance.verdicts(conformance.KEPT.read_text().splitlines())
    assert conformance.verdicts(conformance.apart(name, [])) == {name: kept[name]}
