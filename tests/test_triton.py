"""The host's side of backend="triton", where test_interpreter.py and test_gpu.py would not come to it."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import (
    REAL,
    Case,
    Piece,
    assert_same,
    f32,
    f64,
    gradient,
    ids,
    make_params,
    peculiar_run,
    snapshot,
    with_dtypes,
)

import wd_kernels
import wd_kernels.commands.check as program
from wd_kernels.backends import device, triton


def late_and_double(backend: str, before: Any = None) -> dict[str, torch.Tensor]:
    """Three parameters of two dtypes, whose last has its first gradient late: a bucket then begins elsewhere."""
    params: list[Any] = [make_params([Piece((2 + k,))], dtype, dtype, k)[0] for k, dtype in enumerate((f32, f64, f32))]
    opt = wd_kernels.AdamW(params, lr=0.1, weight_decay=0.2, backend=backend)
    for step in range(4):
        for k, p in enumerate(params):
            p.grad = gradient(Piece((2 + k,)), p.dtype, 10 * step + k) if k < 2 or step >= 2 else None
        if before is not None and step == 2:
            before(opt)
        opt.step()
    return snapshot(params, opt)


def test_a_cut_that_failed_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(opt: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(device, "cut", lambda *arguments: (_ for _ in ()).throw(MemoryError("no room")))
            with pytest.raises(MemoryError):
                opt.step()

    assert_same(late_and_double("triton", interrupted), late_and_double("reference"))


ROOTS = [Case("adamw", f"amsgrad-{amsgrad}", {"amsgrad": amsgrad, "eps": 1e-30}) for amsgrad in (False, True)]


@pytest.mark.parametrize("case", with_dtypes(ROOTS, REAL), ids=ids)
def test_the_root_of_amd(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is scaled where numbers are small, and still exact: among the peculiar numbers are subnormals and zeros."""
    kernels = triton._kernels()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(kernels, "root", None)  # it is not taken
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [("ignore", None, RuntimeWarning, None, 0)])
        found = peculiar_run(case, "triton")
    assert_same(found, peculiar_run(case, "reference"))


def test_whether_a_graph_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "current", lambda device: nullcontext())
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert device.capturing(torch.device("cuda", 0)) is capturing
        assert not device.capturing(torch.device("cpu"))
        with pytest.raises(RuntimeError, match="not on cuda:0 yet") if capturing else nullcontext():
            device.refuse_loading(torch.device("cuda", 0))


def test_a_gpu_that_triton_cannot_use_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """So "auto" warns and takes the reference, and the name is an error that says why."""
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    triton._no_driver.cache_clear()
    try:  # there is no driver at all here
        why = triton.Triton().why_not()
    finally:
        triton._no_driver.cache_clear()
    assert why is not None
    assert why.startswith("Triton cannot use this GPU (RuntimeError: ")


def test_a_module_of_that_name_is_not_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.importlib, "import_module", lambda name: SimpleNamespace())
    assert triton.version() is None
    assert triton._kernels.__wrapped__().startswith("Triton is not there")


def test_the_self_check_on_a_build_for_gpus_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch names the accelerator that it was built for, unless it is asked whether it is there."""

    def there(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", there)
    assert ("accelerator", "none") in program.choices()
    assert program.device_of("triton") == torch.device("cpu")


def test_options() -> None:
    """Registers so that the programs at once are 6 with two states, 5 with three, 4 of float64; for NVIDIA alone.

    Random bits take those of one program, on newer ones of two where all roles have 16 bits; narrow gradients beside
    float32, on the oldest, of one; marks, of one. With numbers of
    blocks they are 3, or 2 of float64.
    """
    from wd_kernels.epilogues import AVERAGE, CHANGES, STATISTICS
    from wd_kernels.formats import format_of

    def of(
        dtype: torch.dtype, states: int, warp: int = 32, capability: int | None = 90, *,
        state: torch.dtype | None = None, grad: torch.dtype | None = None, averages: bool = False,
        numbers: bool = False, marks: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        kept = state or (f64 if dtype == f64 else f32)
        formats = (format_of(dtype), format_of(grad or dtype), *(format_of(kept, state is not None),) * states)
        formats += (format_of(f64 if dtype == f64 else f32),) * averages
        return triton.options(
            formats, warp, capability, (AVERAGE,) * averages + (STATISTICS,) * numbers + (CHANGES,) * marks
        )

    exact = {"num_warps": 4, "enable_fp_fusion": False}
    assert of(f32, 2) == {**exact, "maxnreg": 80}
    assert of(torch.bfloat16, 3) == {**exact, "maxnreg": 96}
    assert of(f64, 2) == of(f64, 3) == {**exact, "maxnreg": 128}
    assert of(f32, 1) == of(f64, 0) == exact
    assert of(f32, 2, 64, None) == {**exact, "num_warps": 2}
    bf16 = torch.bfloat16
    assert of(f32, 2, state=bf16) == of(bf16, 2, 32, 80, state=bf16) == {**exact, "maxnreg": 96}
    assert of(bf16, 2, state=bf16) == of(bf16, 3, state=bf16) == {**exact, "maxnreg": 128}
    assert of(bf16, 3, 32, 100, state=bf16) == {**exact, "maxnreg": 160}
    assert of(f32, 2, 32, 100, state=bf16) == {**exact, "maxnreg": 96}
    assert of(f32, 2, 32, 80, grad=bf16) == {**exact, "maxnreg": 96}
    assert of(f32, 2, 32, 90, grad=bf16) == {**exact, "maxnreg": 80}
    assert of(f32, 2, averages=True) == {**exact, "maxnreg": 96}
    assert of(f64, 2, averages=True) == {**exact, "maxnreg": 160}
    assert of(f64, 2, 32, 80, averages=True) == of(f64, 1, averages=True) == {**exact, "maxnreg": 128}
    assert of(bf16, 1, 32, 100, averages=True) == {**exact, "maxnreg": 96}
    assert of(bf16, 1, averages=True) == {**exact, "maxnreg": 80}
    assert (
        of(f32, 0, numbers=True) == of(bf16, 2, numbers=True) == of(f64, 1, numbers=True) == {**exact, "maxnreg": 160}
    )
    assert of(f64, 2, numbers=True) == {**exact, "maxnreg": 255}
    assert of(f32, 2, marks=True) == {**exact, "maxnreg": 96}
    assert of(f32, 1, marks=True) == exact
