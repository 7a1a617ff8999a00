"""What goes with what: every pair of the table in docs/training-loop.md does what it says, to the reference's bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from bits import assert_same_bits
from engines import Engine
from graphs import graphs_of
from on_cpu import OnCPU
from torch import Tensor, nn

import wd_kernels
from wd_kernels import averages
from wd_kernels.backends import BACKENDS
from wd_kernels.schedules import Cosine, Warmup
from wd_kernels.sharding import local

PAGE = Path(__file__).parent.parent / "docs" / "training-loop.md"
STEPS, FOUND, NAN, SPIKE = 7, 2, 3, 5
SIZES = (64, 1536)


def table() -> dict[tuple[str, str], str]:
    """Of the page: (row, column) to "yes" or "error"."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    first = next(k for k, line in enumerate(lines) if line.startswith("| | clipping"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first:]]
    found = {}
    for row in cells[2:]:
        if len(row) != len(cells[0]):
            break
        for name, cell in zip(cells[0][1:], row[1:], strict=True):
            if cell:
                found[row[0], name] = cell
    return found


FEATURES = (
    "clipping", "by value", "scaling", "skipping", "spikes", "capture", "release", "sharding", "formats", "flat",
    "accumulation", "schedules", "averages", "watching", "vocabulary",
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "clipping": {"max_grad_norm": 0.5},
    "by value": {"max_grad_value": 0.015},
    "skipping": {"skip_nonfinite": True},
    "spikes": {"skip_spikes": 2.0, "spike_window": 4},
    "capture": {"capturable": True},
    "formats": {"master_weights": "split24", "state_dtype": "int8", "seed": 5},
    "schedules": {"schedule": Warmup(4)},
    "averages": {"ema_decay": averages.WarmedEMA(0.75), "ema_dtype": "float32"},
    "vocabulary": {"decay_to": "initial", "cautious": True, "weight_decay_schedule": Cosine(6, end=3.0)},
}
#: With these a watched step is Triton's, and marks what has changed, too.
TRITONS = frozenset({"formats", "averages", "capture", "vocabulary"})
#: What an error says, by the feature that meets another.
ERRORS = {
    "release": "gradient release|gradients are released",
    "accumulation": "within a capture of a graph|gradients are released",
    "flat": "DTensor|is flat: its gradient",
}


def test_the_table_has_every_pair() -> None:
    pairs = {(b, a) for k, a in enumerate(FEATURES) for b in FEATURES[k + 1 :]}
    assert set(table()) == pairs
    assert set(table().values()) == {"yes", "error"}


def life(features: frozenset[str], backend: str, graphs: Any, mesh: Any = None) -> list[dict[str, Tensor]]:
    """All there is after each step, in this process. With `graphs` the steps from the second on are replays."""
    dtype = torch.bfloat16 if "formats" in features else torch.float32
    params: list[Any] = [nn.Parameter(torch.linspace(-1, 1, n).to(dtype)) for n in SIZES]
    grads = [torch.zeros(n, dtype=dtype) for n in SIZES]
    if mesh is not None:
        from torch.distributed.tensor import Shard, distribute_tensor

        params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in params]
        grads = [distribute_tensor(g, mesh, [Shard(0)]) for g in grads]
    if "flat" in features:
        wd_kernels.flatten_(params)
    options = {key: value for name in features for key, value in OPTIONS.get(name, {}).items()}
    opt = wd_kernels.AdamW(params, lr=0.05, weight_decay=0.2, backend=backend, **options)
    stats = opt.statistics() if "watching" in features else None
    opt.track_changes = stats is not None and bool(features & TRITONS)
    if "release" in features:
        wd_kernels.release_gradients(nn.ParameterList(params), opt)
    scale, found_inf = torch.tensor(8.0), torch.tensor(0.0)
    if "scaling" in features:
        opt.grad_scale, opt.found_inf = scale, found_inf
    found, graph = [], None
    for step in range(STEPS):
        size = (
            math.nan
            if step == NAN and "skipping" in features
            else 1000.0
            if step == SPIKE
            else 1.0 + 0.2 * math.sin(step)
        )
        found_inf.fill_(float(step == FOUND))
        for k, (grad, n) in enumerate(zip(grads, SIZES, strict=True)):
            own = torch.linspace(-1, 1, n).roll(step + k) * size * (8.0 if "scaling" in features else 1.0)
            here = local(grad)
            here.copy_(own.to(dtype) if mesh is None else own.chunk(mesh.size())[mesh.get_local_rank()].to(dtype))
        if "release" in features:
            products = [p * grad for p, grad in zip(params, grads, strict=True)]
            torch.stack(
                [local(product.sum()) if mesh is None else product.sum().to_local() for product in products]
            ).sum().backward()
        else:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad if "accumulation" not in features else grad * 0.75
        if "accumulation" in features:
            opt.accumulate()
            for p, grad in zip(params, grads, strict=True):  # the step adds these
                p.grad = grad * 0.25
        if graphs is not None and step == 1:
            with graphs.capture() as graph:
                opt.step()
        opt.step() if graph is None else graph.replay()
        own_found = {"skipped": opt.skipped.clone()}
        if opt.grad_norm is not None:
            own_found["norm"] = opt.grad_norm
        for k, p in enumerate(params):
            own_found[f"{k}"] = local(p).detach().clone()
            own_found |= {f"{k} {name}": local(t).clone() for name, t in opt.state.get(p, {}).items()}
        if stats is not None:
            own_found |= {name: value.clone() for name, value in stats.tensors._asdict().items()}
            for k, change in opt.changes().items() if opt.track_changes else ():
                own_found |= {f"{k} index": change.index, f"{k} values": change.values}
        found.append(own_found)
    return found


def check(features: frozenset[str], mesh: Any = None) -> None:
    """The life of a device's backend has the reference's bits, captured or not; and it is one that does something."""
    # CUDA C++ has none of these formats for such gradients, none that writes averages, no two epilogues, and none of
    # these that pulls.
    few = [{"formats", "accumulation"}, {"formats", "averages"}, {"formats", "vocabulary"}, {"averages", "vocabulary"}]
    no_kernel = any(pair <= features for pair in [*few, *({"watching", other} for other in TRITONS)])
    engine = Engine("triton", "interpreted") if no_kernel else Engine("cuda", "on_cpu")
    backend = engine.backend
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "cuda", OnCPU())
        graphs = graphs_of(engine, patch) if "capture" in features else None
        found = life(features, backend, graphs, mesh)
    expected = life(features, "reference", None, mesh)
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        for name in b:
            assert_same_bits(a[name], b[name], f"step {step}: {name}")
    skipped = {"scaling": FOUND, "skipping": NAN, "spikes": SPIKE}
    steps = {step for name, step in skipped.items() if name in features}
    assert {step for step, own in enumerate(found) if own["skipped"]} == steps
    assert not torch.equal(found[0]["1"], found[-1]["1"])


def expected_of(pair: tuple[str, str], check: Callable[[], None]) -> None:
    """What the table says of a pair."""
    if table()[pair] == "yes":
        check()
    else:
        with pytest.raises(
            (ValueError, RuntimeError, TypeError), match=ERRORS[pair[0] if pair[0] in ERRORS else pair[1]]
        ):
            check()


@pytest.mark.parametrize("pair", [pair for pair in table() if "sharding" not in pair], ids="-".join)
def test_a_pair(pair: tuple[str, str]) -> None:
    expected_of(pair, lambda: check(frozenset(pair)))


def on_ranks(pair: tuple[str, str]) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    expected_of(pair, lambda: check(frozenset(pair), mesh))


@pytest.mark.parametrize("pair", [pair for pair in table() if "sharding" in pair], ids="-".join)
def test_a_pair_with_sharding(pair: tuple[str, str]) -> None:
    ranks.run(2, on_ranks, pair)


def of_three() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(RuntimeError, match="the norm of sharded gradients, which other processes have their part in"):
        check(frozenset({"sharding", "capture", "clipping"}), mesh)


def test_sharding_capture_and_a_norm() -> None:
    ranks.run(2, of_three)
