"""Flat buffers and the functional API on a GPU, against the same on the CPU: equal to the bit.

WD_KERNELS_TEST_DEVICE=cpu rehearses them, in Triton's interpreter and as the test build of the CUDA kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import assert_same, assert_same_bits, bf16, f16, f32, f64, snapshot
from engines import TEST_DEVICE
from torch import Tensor, nn

import wd_kernels
from wd_kernels import functional

pytestmark = pytest.mark.gpu

REHEARSAL = TEST_DEVICE == "cpu"
DEVICE = torch.device("cpu") if REHEARSAL else torch.device(TEST_DEVICE, 0)
SIZES = (5, 1024, 33, 1, 700, 2048) if REHEARSAL else (5, 1024, 33, 1, 70_000, 2048, 4099) * 20
KINDS: tuple[tuple[type[Any], dict[str, Any]], ...] = (
    (wd_kernels.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    (wd_kernels.AdamW, {"lr": 0.02, "weight_decay": 0.1, "amsgrad": True, "decay": "proximal"}),
    (wd_kernels.SGDW, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
)


def model(dtype: torch.dtype, device: torch.device | str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    return [nn.Parameter(torch.randn(n, generator=generator).to(device, dtype)) for n in SIZES]


def gradients(params: list[nn.Parameter], step: int, flat: bool) -> None:
    """The same numbers on every device; in place where the gradients are flat."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        values = torch.randn(p.shape, generator=generator).to(p)
        if flat and p.grad is not None:
            p.grad.copy_(values)
        else:
            p.grad = values


@pytest.mark.parametrize("dtype", [f32, bf16, f16, f64])
@pytest.mark.parametrize(("cls", "options"), KINDS)
def test_flat(
    backend: str, cls: Callable[..., Any], options: dict[str, Any], dtype: torch.dtype, launches: list[int]
) -> None:
    here, there = model(dtype, DEVICE), model(dtype, "cpu")
    (buffer,) = wd_kernels.flatten_(here)
    flat = cls(here, backend=backend, **options)
    plain = cls(there, backend="cpu", **options)
    for step in range(7):
        gradients(here, step, flat=True)
        gradients(there, step, flat=False)
        if step == 3:  # one is missing in the middle, one lies elsewhere
            here[2].grad = there[2].grad = None
            assert here[4].grad is not None
            here[4].grad = here[4].grad.clone()
        if step == 5:
            wd_kernels.flatten_(here)
        launches.clear()
        flat.step()
        plain.step()
        assert len(launches) == 1
        # From step 3 on the third has another step count, and so another row.
        assert len(flat._table.segments.moving) == (1, 1, 1, 5, 5, 3, 3)[step]
    assert_same(snapshot(here, flat), snapshot(there, plain))
    assert buffer.data is not None
    flat.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in here)


def roles(states: int, dtype: torch.dtype, device: torch.device | str) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(9)
    kinds = [dtype, dtype, *[f64 if dtype == f64 else f32] * states]
    return [[torch.randn(n, generator=generator).abs().to(device, kind) for n in SIZES] for kind in kinds]


@pytest.mark.parametrize("dtype", [f32, bf16, f64])
def test_lists_and_buffers(backend: str, dtype: torch.dtype, launches: list[int]) -> None:
    for (states, step_), flat in itertools.product(((2, functional.adamw_), (1, functional.sgdw_)), (False, True)):
        options = {"momentum": 0.9} if states == 1 else {"decay": "independent"}
        here, there = roles(states, dtype, DEVICE), roles(states, dtype, "cpu")
        if flat:
            step_ = {2: functional.adamw_flat_, 1: functional.sgdw_flat_}[states]
            here, there = ([torch.cat(own) for own in lists] for lists in (here, there))
        for step in (1, 2, 3):
            launches.clear()
            for lists, name in ((here, backend), (there, "cpu")):
                step_(*lists, step=step, lr=0.1 / step, weight_decay=0.1, grad_factor=0.5, backend=name, **options)
            assert len(launches) == 1
        for own, other in zip(here, there, strict=True):
            pairs = [(own, other)] if flat else zip(own, other, strict=True)
            for a, b in pairs:
                assert_same_bits(a.cpu(), b)


def test_opcheck(backend: str) -> None:
    lists = roles(2, f32, DEVICE)
    numbers = (2, 0.01, 0.9, 0.99, 1e-8, 0.1, 1.0, 1.0)
    options = ("lr_scaled", False, backend)
    packet = torch.ops.wd_kernels.adamw_
    torch.library.opcheck(packet.default, (*lists, [], *numbers, *options))
    tensors = [torch.tensor(number, dtype=f64) for number in numbers]
    torch.library.opcheck(packet.tensor, (*lists, [], *tensors, *options))


def test_compiled(backend: str) -> None:
    """Numbers in CPU tensors: no compilation after the first, no wait for the device."""
    compilations: list[int] = []

    def counted(graph: Any, example: Any) -> Any:
        compilations.append(1)
        return graph.forward

    def one(lists: list[list[Tensor]], step: Tensor, lr: Tensor) -> None:
        functional.adamw_(*lists, step=step, lr=lr, weight_decay=0.1, backend=backend)

    compiled = torch.compile(one, fullgraph=True, backend=counted)
    here, there = roles(2, f32, DEVICE), roles(2, f32, DEVICE)
    for step in range(1, 5):
        lr = torch.tensor(0.1 / step, dtype=f64)
        compiled(here, torch.tensor(step), lr)
        one(there, torch.tensor(step), lr)
    assert len(compilations) == 1
    for own, other in zip(here, there, strict=True):
        for a, b in zip(own, other, strict=True):
            assert_same_bits(a.cpu(), b.cpu())
