"""Random optimizers, random lives: native code, the reference, and plain copies agree to the bit after every step."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import semantics
import torch
from bits import assert_same_optimizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from semantics import all_params, checked_step
from torch import Tensor, nn

from wd_kernels import native

SHAPES = ((), (1,), (0,), (3, 0), (1, 1, 1), (5,), (17,), (4, 4), (3, 7), (2, 1, 5), (2, 3, 2, 2), (1, 4, 3, 3), (67,))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)
DENSE = ("plain", "transposed", "permuted", "channels_last", "unaligned")
GRADIENTS = (*DENSE, "sliced", "expanded", "negative", "conjugate", "other dtype")

number = st.sampled_from((0.0, 1e-3, 0.05, 0.3))
common = {
    "lr": st.sampled_from((0.0, 1e-3, 0.05, 0.1)),
    "eta": st.sampled_from((0.25, 1.0)),
    "weight_decay": number,
    "maximize": st.booleans(),
    "decay": st.sampled_from(semantics.MODES),
}
OPTIONS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "adamw": st.fixed_dictionaries(
        {},
        optional={
            **common,
            "betas": st.tuples(st.sampled_from((0.0, 0.4, 0.9)), st.sampled_from((0.3, 0.5, 0.999))),
            "eps": st.sampled_from((1e-8, 1e-2)),
            "amsgrad": st.booleans(),
        },
    ),
    "sgdw": st.fixed_dictionaries({}, optional={**common, "dampening": number})
    .flatmap(
        lambda own: st.sampled_from(
            (own, {**own, "momentum": 0.0}, {**own, "nesterov": True, "dampening": 0.0})
            + (({**own, "form": "paper"},) if not own.get("dampening") else ())
        )
    ),
    "adagradw": st.fixed_dictionaries(
        {},
        optional={
            **common,
            "lr_decay": number,
            "initial_accumulator_value": number,
            "eps": st.sampled_from((1e-10, 1e-2)),
        },
    ),
}  # fmt: skip


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another place of memory, or with lazy bits."""
    if layout == "transposed":
        return values.mT.contiguous().mT if values.dim() >= 2 else values
    if layout == "permuted":
        dims = list(range(values.dim()))[::-1]
        return values.permute(dims).contiguous().permute(dims)
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last) if values.dim() == 4 else values
    if layout == "unaligned":
        return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(values.shape)
    if layout == "sliced":
        return torch.stack([values, values], -1)[..., 0]
    if layout == "expanded":
        return values[:1].expand(values.shape) if values.dim() else values
    if layout == "negative":
        return torch._neg_view(-values)
    if layout == "conjugate":
        return values.conj_physical().conj()
    return values


other_dtype = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32, torch.float16: torch.float32}
seeds = st.integers(0, 2**31)


def random_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** (seed % 4 - 2)
    made = torch.randn(shape, generator=generator, dtype=torch.complex128 if dtype.is_complex else torch.float64)
    return (made * scale).to(dtype)


parameter = st.tuples(
    st.sampled_from(SHAPES), st.sampled_from(DTYPES[:2] * 2 + DTYPES), st.sampled_from((*DENSE, "sliced")), seeds
)


def make_parameter(spec: tuple[tuple[int, ...], torch.dtype, str, int]) -> nn.Parameter:
    shape, dtype, layout, seed = spec
    return nn.Parameter(laid_out(random_values(shape, dtype, seed), layout))


def more(count: int | None, n: int = 1) -> int | None:
    return None if count is None else count + n


def known(counts: Sequence[int | None]) -> list[int]:
    return [n for n in counts if n is not None]


class Life:
    """Two optimizers that are given the same: one native, one the reference; and the counts they must show."""

    def __init__(self, rule: str, data: st.DataObject) -> None:
        self.data, self.rule = data, rule
        groups = data.draw(st.lists(st.tuples(st.lists(parameter, max_size=4), OPTIONS[rule]), min_size=1, max_size=3))
        if not any(specs for specs, _ in groups):
            groups[0][0].append(data.draw(parameter))
        defaults = data.draw(OPTIONS[rule])
        self.opts = [
            semantics.build(
                rule,
                [
                    {"params": list(map(make_parameter, specs)), **self.own(options, defaults)}
                    for specs, options in groups
                ],
                backend=backend,
                **defaults,
            )
            for backend in ("auto", "reference")
        ]
        self.counts: list[int | None] = [0] * len(all_params(self.opts[0]))

    def own(self, options: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
        """A group's options that fit the defaults."""
        if self.rule == "sgdw":
            return {"momentum": 0.8, "dampening": 0.0, "nesterov": False, "form": "torch", **options}
        return options

    def each(self, i: int) -> list[Tensor]:
        """Parameter `i` of both."""
        return [all_params(opt)[i] for opt in self.opts]

    def step(self) -> None:
        for i in range(len(self.counts)):
            layout = self.data.draw(st.sampled_from((None, None, "kept", *GRADIENTS)), label=f"gradient {i}")
            if layout == "kept":
                self.counts[i] = more(self.counts[i], self.each(i)[0].grad is not None)
                continue
            if layout is None:
                for p in self.each(i):
                    p.grad = None
                continue
            seed = self.data.draw(seeds)
            for p in self.each(i):
                dtype = other_dtype.get(p.dtype, p.dtype) if layout == "other dtype" else p.dtype
                grad = laid_out(random_values(tuple(p.shape), dtype, seed), layout)
                p.grad = grad if dtype == p.dtype else torch.zeros_like(p)
                if dtype != p.dtype:
                    p.grad.data = grad
            self.counts[i] = more(self.counts[i])
        checked_step(self.opts[0])
        self.opts[1].step()
        assert_same_optimizers(*self.opts)
        for opt in self.opts:
            shown = [float(opt.state[p].get("step", 1)) if opt.state.get(p) else 0 for p in all_params(opt)]
            assert [n for n, m in zip(shown, self.counts, strict=True) if m is not None] == known(self.counts)

    def pick(self) -> int:
        return self.data.draw(st.integers(0, len(self.counts) - 1), label="which")

    # What may happen between two steps.

    def nothing(self) -> None:
        pass

    def swap_data(self) -> None:
        i, layout, seed = self.pick(), self.data.draw(st.sampled_from((*DENSE, "sliced"))), self.data.draw(seeds)
        for p in self.each(i):
            p.data = laid_out(random_values(tuple(p.shape), p.dtype, seed), layout)

    def replace_states(self) -> None:
        i, layout = self.pick(), self.data.draw(st.sampled_from((*GRADIENTS[:6], "negative")))
        for opt, p in zip(self.opts, self.each(i), strict=True):
            if opt.state.get(p):
                opt.state[p] = {k: v if k == "step" else laid_out(v.clone(), layout) for k, v in opt.state[p].items()}

    def swap_state_data(self) -> None:
        i = self.pick()
        for opt, p in zip(self.opts, self.each(i), strict=True):
            for key, value in (opt.state.get(p) or {}).items():
                if key != "step":
                    value.data = value.detach().clone()

    def forget_state(self) -> None:
        i, way = self.pick(), self.data.draw(st.sampled_from(("pop", "clear", "all")))
        for opt, p in zip(self.opts, self.each(i), strict=True):
            if way == "all":
                opt.state.clear()
            elif p in opt.state:
                opt.state.pop(p) if way == "pop" else opt.state[p].clear()
        self.counts = [0 if way == "all" or k == i else n for k, n in enumerate(self.counts)]

    def set_step(self) -> None:
        i, kind = self.pick(), self.data.draw(st.sampled_from(("in place", "int", "tensor")))
        if self.opts[0].state.get(self.each(i)[0]):
            for opt, p in zip(self.opts, self.each(i), strict=True):
                if kind == "in place" and isinstance(opt.state[p].get("step"), Tensor):
                    opt.state[p]["step"].fill_(40)
                else:
                    opt.state[p]["step"] = 40 if kind == "int" else torch.tensor([40])
            self.counts[i] = 40

    def reload(self) -> None:
        for opt in self.opts:
            opt.load_state_dict(opt.state_dict())
        self._begin_counts()

    def _begin_counts(self) -> None:
        """What SGDW saves has no counts, as torch's has none: they are unknown from then on."""
        if not self.opts[0].rule.torch.counts_steps:
            self.counts = [None] * len(self.counts)

    def exchange_files(self) -> None:
        first, second = (pickle.loads(pickle.dumps(opt.state_dict())) for opt in self.opts)
        self.opts[0].load_state_dict(second)
        self.opts[1].load_state_dict(first)
        self._begin_counts()

    def deepcopy(self) -> None:
        self.opts = [copy.deepcopy(opt) for opt in self.opts]

    def pickle(self) -> None:
        self.opts = [pickle.loads(pickle.dumps(opt)) for opt in self.opts]

    def reverse(self) -> None:
        at = 0
        for k, group in enumerate(self.opts[0].param_groups):
            n = len(group["params"])
            for opt in self.opts:
                own = opt.param_groups[k]
                own["params"] = own["params"][::-1]
            self.counts[at : at + n] = self.counts[at : at + n][::-1]
            at += n

    def replace_parameter(self) -> None:
        i, seed = self.pick(), self.data.draw(seeds)
        for opt, p in zip(self.opts, self.each(i), strict=True):
            new = nn.Parameter(random_values(tuple(p.shape), p.dtype, seed))
            for group in opt.param_groups:
                group["params"] = [new if q is p else q for q in group["params"]]
            if p in opt.state:
                opt.state[new] = opt.state.pop(p)

    def add_group(self) -> None:
        specs, options = self.data.draw(st.lists(parameter, max_size=3)), self.data.draw(OPTIONS[self.rule])
        for opt in self.opts:
            opt.add_param_group({"params": list(map(make_parameter, specs)), **self.own(options, {})})
        self.counts += [0] * len(specs)

    def change_options(self) -> None:
        k = self.data.draw(st.integers(0, len(self.opts[0].param_groups) - 1))
        options = self.own(self.data.draw(OPTIONS[self.rule]), {})
        for opt in self.opts:
            opt.param_groups[k].update(options)

    def replace_groups(self) -> None:
        for opt in self.opts:
            opt.param_groups = [dict(group, params=tuple(group["params"])) for group in opt.param_groups]

    def fail(self) -> None:
        """A step that fails at some parameter changes nothing."""
        i, seed = self.pick(), self.data.draw(seeds)
        for k in range(len(self.counts)):
            for p in self.each(k):
                p.grad = random_values(tuple(p.shape), p.dtype, seed)
        for opt, p in zip(self.opts, self.each(i), strict=True):
            assert p.grad is not None
            p.grad.data = random_values((2, 2, 9), p.dtype, seed)
            with semantics.untouched(opt), pytest.raises(ValueError, match="the gradient of parameter"):
                opt.step()
            p.grad = None


MUTATIONS = tuple(
    name
    for name, value in vars(Life).items()
    if callable(value) and name not in ("__init__", "own", "each", "step", "pick", "_begin_counts")
)


def live(rule: str, data: st.DataObject, mutations: tuple[str, ...], kind: type[Life] = Life) -> None:
    with pytest.MonkeyPatch.context() as patch:
        without = data.draw(st.sampled_from(("nothing", "exchange API", "extension")), label="without")
        if without == "extension":
            semantics.without_native_code(patch)
        elif without == "exchange API":  # every parameter is inspected in every step
            patch.setattr(native, "CHECKS", False)
        life = kind(rule, data)
        for _ in range(data.draw(st.integers(2, 5), label="steps")):
            life.step()
            if mutations:
                getattr(life, data.draw(st.sampled_from(mutations), label="then"))()
        life.step()


def examples(n: int) -> Any:
    """The search is the same every time where CI is set."""
    return settings(
        max_examples=n,
        deadline=None,
        derandomize=bool(os.environ.get("CI")),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


every = pytest.mark.parametrize("rule", ["adamw", "sgdw", "adagradw"])


def test_mutations_are_known() -> None:
    assert len(MUTATIONS) == 16
    assert {"swap_data", "reload", "deepcopy", "add_group", "fail"} <= set(MUTATIONS)


@every
@examples(100)
@given(data=st.data())
def test_steps_equal_the_reference(rule: str, data: st.DataObject) -> None:
    """Any parameters, layouts, groups, options, gradients, and gaps in them."""
    live(rule, data, ())


@every
@examples(150)
@given(data=st.data())
def test_steps_equal_the_reference_whatever_happens_between(rule: str, data: st.DataObject) -> None:
    live(rule, data, MUTATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["adamw", "sgdw"])
@examples(1000)
@given(data=st.data())
def test_long_lives(rule: str, data: st.DataObject) -> None:
    live(rule, data, MUTATIONS)
