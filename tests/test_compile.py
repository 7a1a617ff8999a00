"""The functional API inside of torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import assert_same
from callers import FLAT, LISTS, Caller, options_of
from cases import BODIES, Case, Piece, bf16, covered, f32, f64, gradient, ids, make_params, with_dtypes
from torch import Tensor

import wd_kernels
from wd_kernels import native
from wd_kernels.torch_ops import OPERATORS


class Compiler:
    """A backend of torch.compile that counts the graphs it is given, and what they call."""

    def __init__(self, inner: str) -> None:
        self.inner, self.graphs, self.calls = inner, 0, []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        self.calls += [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        return torch._dynamo.lookup_backend(self.inner)(graph, inputs)


def compiled_run(
    case: Case, flat: bool, compiler: Any, schedule_of: Callable[[int], dict[str, Any]], steps: int
) -> list[int]:
    """Gradients made, a step, and parameters read in one graph, against the same in eager mode.

    Returns the number of frames compiled until the end of each step.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compilations = []
    pieces = (Piece((65,)),) if flat else (Piece((7, 3)), Piece(()), Piece((4, 5), "transposed"), Piece((0,)))
    function = (FLAT if flat else LISTS)[case.rule]

    def one(params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]], numbers: dict[str, Any]) -> Tensor:
        grads = [g * 2 for g in grads]
        roles = [params, grads, *states]
        tensors = [role[0] for role in roles] if flat else roles
        function(*tensors, weight_decay=0.1, backend="cpu", **{**options_of(case), **numbers})
        return sum(p.sum() for p in params)

    callers = [
        Caller(case, [p.detach() for p in make_params(pieces, case.dtype, case.grad_dtype, 4)]) for _ in range(2)
    ]
    compiled = torch.compile(one, backend=compiler, fullgraph=True)
    for step in range(steps):
        grads = [gradient(piece, case.grad_dtype, 10 * step + k) for k, piece in enumerate(pieces)]
        numbers = schedule_of(step)
        sums = [
            run(caller.params, grads, caller.states, dict(numbers))
            for run, caller in zip((one, compiled), callers, strict=True)
        ]
        eager, ours = (caller.result() for caller in callers)
        assert_same(ours, eager)
        assert all(bool(role[0].any()) for role in callers[0].states)
        torch.testing.assert_close(*sums)
        compilations.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
    return compilations


def as_tensors(step: int) -> dict[str, Any]:
    return {"step": torch.tensor(step + 1), "lr": torch.tensor(0.01 * (step + 1), dtype=f64)}


@covered(body=BODIES, dtypes=((f32, f32), (bf16, f32)), flat=(False, True))
def test_compiled(body: Case, dtypes: tuple[torch.dtype, torch.dtype], flat: bool) -> None:
    """One graph; 20 values of lr and step in tensors do not compile it again."""
    (case,) = with_dtypes([body], [dtypes])
    compiler = Compiler("aot_eager")
    counts = compiled_run(case, flat, compiler, as_tensors, 20 if case.dtype == f32 else 4)
    assert set(counts) == {1}
    assert compiler.graphs <= 2  # torch may begin the one anew
    name = OPERATORS[f"{case.rule}_flat_" if flat else f"{case.rule}_"].name
    assert f"{native.NAMESPACE}.{name}.tensor" in compiler.calls


def test_compiled_numbers_compile_anew() -> None:
    compiler = Compiler("aot_eager")
    case = BODIES[0]
    counts = compiled_run(case, False, compiler, lambda step: {"step": step + 1, "lr": (0.1, 0.2)[step // 3]}, 6)
    assert 2 <= counts[-1] <= 4  # a graph for each lr, and one for any step
    assert counts[2] < counts[3]
    assert f"{native.NAMESPACE}.adamw_.default" in compiler.calls


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "skip_nonfinite": True}], ids=["plain", "clipping"])
def test_a_compiled_training_step(options: dict[str, Any]) -> None:
    """An optimizer's step breaks the graph; 20 learning rates compile nothing anew, and the bits are those of eager."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    models = [torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)]
    models[1].load_state_dict(models[0].state_dict())
    opts = [wd_kernels.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, **options) for model in models]
    compiler = Compiler("aot_eager")

    def one(model: Any, opt: Any, x: Tensor) -> Tensor:
        opt.zero_grad()
        loss: Tensor = model(x).square().mean()
        loss.backward()
        opt.step()
        return loss.detach()

    compiled = torch.compile(one, backend=compiler)
    graphs = []
    for step in range(20):
        for opt in opts:
            opt.param_groups[0]["lr"] = 0.1 / (step + 1)
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        losses = [run(model, opt, x) for run, model, opt in zip((compiled, one), models, opts, strict=True)]
        torch.testing.assert_close(*losses)
        graphs.append(compiler.graphs)
    assert graphs[0] == graphs[-1] >= 1
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_same({"p": p.detach()}, {"p": q.detach()})
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("case", BODIES, ids=ids)
def test_inductor(case: Case) -> None:
    for flat in (False, True):
        compiled_run(case, flat, "inductor", as_tensors, 3)
