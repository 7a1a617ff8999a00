"""The seam of epilogues, by one that only tests have (probe.py): every engine gives the reference's bits."""

from __future__ import annotations

import math
from typing import Any

import codegen
import codegen_cuda
import compiled
import numpy as np
import pytest
import torch
from bits import assert_same_bits
from cases import BODIES, Case, Piece, bf16, f16, f32, f64, gradient, guarded, states_of, with_dtypes
from covering import covering
from engines import CPU, absent
from on_cpu import OnCPU
from on_ptx import KIND_OF, CUDAOnPTX, TritonOnPTX
from probe import PROBE, ProbeTable, extension, operators
from torch import Tensor

from wd_kernels import backends, native, reference
from wd_kernels.backends import BACKENDS, cpu, device
from wd_kernels.epilogues import AVERAGE, CHANGES, STATISTICS, Epilogue
from wd_kernels.formats import arithmetic_dtype, format_of
from wd_kernels.rules import RULES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow

#: Sizes about blocks, one that is missing, one that is empty; (n, offset from alignment).
PIECES = ((1, 0), (1023, 0), (1024, 0), (1025, 1), (5000, 0), (0, 0), (2600, 3), (700, 0), (4096, 0))
MISSING = 7
#: For the CPU, too: threads take parts of it.
LARGE = (70_000, 0)
DTYPES = ((f32, f32), (bf16, bf16), (f16, f32), (f64, f64))
SCALARS = (0.75, -0.3)


def group_of(case: Case) -> dict[str, Any]:
    """A group with every hyperparameter."""
    own = {"adamw": {"betas": (0.9, 0.99), "eps": 1e-8, "amsgrad": False},
           "sgdw": {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "form": "torch"},
           "adagradw": {"lr_decay": 0.1, "eps": 1e-10, "initial_accumulator_value": 0.0}}[case.rule]  # fmt: skip
    return {"weight_decay": 0.2, "maximize": False, "eta": 0.9, **own, **case.options}


def made(case: Case, large: bool = False, epilogues: tuple[Epilogue, ...] = (PROBE,)) -> ProbeTable:
    """Parameters of every piece and one that is transposed, in rows 0, 1 and 2, of which the last is frozen."""
    generator = torch.Generator().manual_seed(0)
    shaped = torch.randn(37, 41, generator=generator).to(case.dtype).mT
    roles: list[list[Any]] = []
    arithmetic = f64 if case.dtype == f64 else f32
    output = bf16 if case.dtype != f64 and PROBE in epilogues else arithmetic
    outputs = (output for own in epilogues for _ in own.outputs)
    dtypes = (case.dtype, case.grad_dtype, *(arithmetic for _ in states_of(case)), *outputs)
    for role, dtype in enumerate(dtypes):
        own = []
        for n, offset in (*PIECES, *[LARGE] * large):
            values = torch.randn(n, generator=generator).to(dtype)
            own.append(guarded(values.abs() if role >= 2 else values, offset if role % 2 == 0 else 0)[1])
        like = shaped if role == 0 else torch.randn(37, 41, generator=generator).to(dtype).mT
        roles.append([*own, like.abs() if role >= 2 else like])
    roles[1][MISSING] = None
    rows = [k % 3 for k in range(len(roles[0]))]
    return ProbeTable(RULES[case.rule], states_of(case), roles, rows, epilogues=epilogues)


def rows_of(case: Case, t: int, scalars: int = 2) -> Tensor:
    """Three rows, each with the epilogues' scalars behind it."""
    rule, group = RULES[case.rule], group_of(case)
    groups = [{**group, "lr": 0.1 / t}, {**group, "lr": 0.02 * t, "weight_decay": 0.05}, {**group, "lr": 0.0}]
    rows = rule.rows(rule.hypers(groups), [(g, t, t == 1) for g in range(3)])
    own = [[s * (1 + 0.1 * t + g) for s in SCALARS[:scalars]] for g in range(3)]
    return torch.cat([rows, torch.tensor(own, dtype=f64).view(3, scalars)], 1)


def steps(case: Case, backend: Any, large: bool, epilogues: tuple[Epilogue, ...] = (PROBE,)) -> list[list[Tensor]]:
    """All that is written, after each step; the second has a gradient factor, the third is skipped."""
    table = made(case, large, epilogues)
    table.buckets[0].backend = backend
    found = []
    for t in (1, 2, 3):
        table.control.copy_(torch.tensor([(1.0, 0.5, math.nan)[t - 1], float(t == 3)], dtype=f64))
        for k, grad in enumerate(table.roles[1]):
            if grad is not None:
                grad.copy_(gradient(Piece(tuple(grad.shape)), case.grad_dtype, 100 * t + k))
        grads = [grad if grad is None else grad.clone() for grad in table.roles[1]]
        (plans, ready, *_), rows = (
            backend.prepare(table, table.buckets),
            rows_of(case, t, sum(len(own.scalars) for own in epilogues)),
        )
        backends.launch([*plans, *(ready(table, rows) if ready is not None else [])], rows)
        for grad, before in zip(table.roles[1], grads, strict=True):
            assert grad is before is None or torch.equal(grad, before)
        found.append(
            [t.clone() for role in (table.roles[0], *table.roles[2:], table.numbers, table.marks) for t in role]
        )
    return found


ENGINES = [
    *(f"cpu-{engine.form}" for engine in CPU), "cuda-on_cpu", "triton-interpreted",
    "triton-newest/sm_90", "triton-newest/sm_100", "triton-oldest/sm_90", "cuda-nvcc/sm_90",
]  # fmt: skip


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend of an engine; what has the probe has nothing else."""
    name, form = request.param.split("-", 1)
    probe = request.function is test_every_engine_gives_the_references_bits
    if name == "cpu":
        if absent(form):
            pytest.skip(f"this processor has no {form}")
        monkeypatch.setenv("WD_KERNELS_ISA", form)
        if probe:
            monkeypatch.setattr(native, "C", extension())
        return BACKENDS["cpu"]
    if "/" in form:
        version, target = form.split("/")
        if name == "cuda" and (why_not := codegen_cuda.no_toolkit()):
            pytest.skip(why_not)
        return {"triton": TritonOnPTX, "cuda": CUDAOnPTX}[name](version, target)
    if name == "cuda":
        if probe:
            monkeypatch.setattr(OnCPU, "ops", property(lambda self: operators()))
        return OnCPU()
    return BACKENDS["triton"]


ROWS = covering({"engine": ENGINES, "case": BODIES, "dtypes": DTYPES, "size": [1024, 4096]})
for of in ROWS:
    if of["engine"].startswith("triton-") and "/" in of["engine"]:
        kind, formats = KIND_OF[of["case"].rule, states_of(of["case"])], map(format_of, of["dtypes"])
        kernel = codegen.Kernel(kind, *formats, format_of(arithmetic_dtype(of["dtypes"][0])))
        compiled.probes.setdefault(of["engine"].removeprefix("triton-"), set()).add(str(kernel))


@pytest.mark.parametrize(
    ("backend", "case", "size"),
    [(of["engine"], with_dtypes([of["case"]], [of["dtypes"]])[0], of["size"]) for of in ROWS],
    indirect=["backend"], ids=[f"{of['engine']}-{of['case'].rule}-{of['dtypes']}-{of['size']}" for of in ROWS],
)  # fmt: skip
def test_every_engine_gives_the_references_bits(
    backend: Any, case: Case, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "chunk_size", lambda elements, processors: size)
    monkeypatch.setattr(cpu, "CHUNK", size)
    large = backend is BACKENDS["cpu"]
    found, expected = steps(case, backend, large), steps(case, BACKENDS["reference"], large)
    for t, (a, b) in enumerate(zip(found, expected, strict=True)):
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"step {t + 1}, tensor {k}")
    for b, c in zip(*expected[1:], strict=True):
        assert_same_bits(b, c, "a skipped step")
    assert sum(not torch.equal(a, b) for a, b in zip(*expected[:2], strict=True)) > len(expected[0]) / 2


#: The package's own, and all of these at once, which only some backends run.
OWN = {"statistics": (STATISTICS,), "changes": (CHANGES,), "all": (AVERAGE, STATISTICS, CHANGES)}
OWN_ENGINES = [*ENGINES, "triton-newest/sm_80", "cuda-nvcc/library"]
OWN_ROWS = covering({"engine": OWN_ENGINES, "own": list(OWN), "dtypes": [(f32, f32), (bf16, bf16), (f64, f64)]})


@pytest.mark.parametrize(
    ("backend", "own", "dtypes"), [(of["engine"], of["own"], of["dtypes"]) for of in OWN_ROWS],
    indirect=["backend"], ids=[f"{of['engine']}-{of['own']}-{of['dtypes'][0]}" for of in OWN_ROWS],
)  # fmt: skip
def test_every_engine_gives_the_references_numbers_and_marks(
    backend: Any, own: str, dtypes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "chunk_size", lambda elements, processors: 2048)
    monkeypatch.setattr(cpu, "CHUNK", 2048)
    if own == "all" and (backend.name == "cuda" or isinstance(backend, TritonOnPTX)):  # compiled of this one alone
        dtypes = (f32, f32)
        if backend.name == "cuda":
            own = "statistics"
    (case,) = with_dtypes(BODIES[:1], [dtypes])
    found, expected = steps(case, backend, False, OWN[own]), steps(case, BACKENDS["reference"], False, OWN[own])
    for t, (a, b) in enumerate(zip(found, expected, strict=True)):
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"step {t + 1}, tensor {k}")


# The arithmetic, by other hands ---------------------------------------------------------------------------------------


def tree(values: Any) -> Any:
    """The sum of a block of 1024, as recursions: of 8 neighbours, by halves; of these sums, what is even and odd."""
    if len(values) == 1:
        return np.float32(values[0])
    if len(values) == 1024:
        return tree([halves(values[k : k + 8]) for k in range(0, 1024, 8)])
    return np.float32(tree(values[::2]) + tree(values[1::2]))


def halves(values: Any) -> Any:
    middle = len(values) // 2
    return np.float32(halves(values[:middle]) + halves(values[middle:]) if middle else values[0])


def test_sums_of_blocks() -> None:
    """Neighbours meet three times, then the sums i and i + 64: what is left is the even ones' sum and the odd ones'."""
    x = torch.randn(2500, generator=torch.Generator().manual_seed(7)) * torch.logspace(-3, 3, 2500)
    found = reference.block_sums(x)
    padded = [*x.tolist(), *[0.0] * (3 * 1024 - 2500)]
    expected = [tree(padded[k : k + 1024]) for k in (0, 1024, 2048)]
    assert found.tolist() == expected
    assert found[0].item() != x[:1024].sum().item() or found[1].item() != x[1024:2048].sum().item()
    for k in range(3):
        assert found[k].item() == pytest.approx(math.fsum(padded[1024 * k : 1024 * (k + 1)]), rel=1e-4)
    assert_same_bits(reference.block_sums(x.view(50, 50).t()), found)  # in storage order
    assert_same_bits(reference.block_sums(torch.full((3,), -0.0)), torch.zeros(1))
    assert reference.block_sums(torch.empty(0)).shape == (0,)
    exact = torch.arange(1024.0) % 7
    assert reference.block_sums(exact.double()).item() == float(exact.sum())


@pytest.mark.parametrize("case", with_dtypes(BODIES, [(bf16, f32), (f64, f64)]), ids=str)
def test_what_an_epilogue_sees(case: Case) -> None:
    """The parameter before and as stored, the gradient before its decay, the update; nothing of the step changes."""
    rule, lr = RULES[case.rule], 0.1
    hypers = rule.hypers([{**group_of(case), "decay": "l2", "lr": lr}])
    row = torch.cat([rule.rows(hypers, [(0, 3, False)])[0], torch.tensor(SCALARS, dtype=f64)])
    table, plain = made(case), made(case)
    k = 4
    theta, grad, states, _, outputs, *_ = table.tensors(k)
    before, trace = (x.to(f64, copy=True) for x in (theta, outputs["trace"]))
    reference.step_(rule, row, 0.5, theta, grad, states, (PROBE,), outputs, table.numbers[k], table.marks[k])
    others = {name: role[k] for name, role in zip(states, plain.roles[2:], strict=False)}
    reference.step_(rule, row, 0.5, plain.roles[0][k], plain.roles[1][k], others)
    for name, role in zip(("theta", *states), (0, *range(2, 2 + len(states))), strict=True):
        assert_same_bits(table.roles[role][k], plain.roles[role][k], name)
    close = {"rtol": 1e-2, "atol": 1e-3} if case.dtype == bf16 else {"rtol": 1e-12, "atol": 1e-14}
    moved = theta.double() - before
    last = list(states.values())[-1].double() if states else 0.0
    torch.testing.assert_close(outputs["trace"].double(), SCALARS[0] * trace + SCALARS[1] * moved + last, **close)
    torch.testing.assert_close(outputs["copy"].double(), SCALARS[1] * theta.double(), **close)
    sign = -1 if case.options["maximize"] else 1
    g = sign * 0.5 * grad.double()
    assert table.numbers[k].shape == (5, 3)
    for block in range(5):
        at = slice(1024 * block, 1024 * (block + 1))
        assert table.numbers[k][block, 0].item() == pytest.approx(float(moved[at].square().sum()), rel=1e-5)
        if not states:  # the update is lr times the gradient with its decay
            u = lr * group_of(case)["eta"] * (g + 0.2 * before)
            assert table.numbers[k][block, 1].item() == pytest.approx(float((g * u)[at].sum()), rel=1e-4)
