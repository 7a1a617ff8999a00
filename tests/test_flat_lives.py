"""Any life of flat parameters equals that of an ordinary optimizer on the reference."""

from __future__ import annotations

import itertools

import pytest
import semantics
import test_properties
import torch
from bits import assert_same_optimizers, assert_untouched
from flat_pairs import assert_runs, attached
from hypothesis import given
from hypothesis import strategies as st
from semantics import all_params, checked_step, plain
from torch import Tensor

from wd_kernels import flatten_, unflatten_
from wd_kernels.flat import place_of
from wd_kernels.layout import padded

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf"),
]
both = pytest.mark.parametrize("rule", ["adamw", "sgdw"])


class FlatLife(test_properties.Life):
    """The first optimizer is flat, as far as that is possible; the second, of the reference, never is."""

    def __init__(self, rule: str, data: st.DataObject) -> None:
        super().__init__(rule, data)
        for p in all_params(self.opts[0]):
            p.data = p.data.clone(memory_format=torch.preserve_format)
        self.views: list[tuple[Tensor, Tensor | None]] = []
        self.flatten()

    def step(self) -> None:
        for i in range(len(self.counts)):
            how = self.data.draw(
                st.sampled_from(("in place", "in place", "in place", "kept", "none", "view", "data", "new")),
                label=f"gradient {i}",
            )
            seed = self.data.draw(test_properties.seeds)
            for p in self.each(i):
                values = test_properties.random_values(tuple(p.shape), p.dtype, seed)
                if how == "none":
                    p.grad = None
                elif how == "kept":
                    pass
                elif how == "new" or p.grad is None or p.grad.dtype != p.dtype:
                    p.grad = values
                elif how == "data":
                    p.grad.data = values
                elif how == "in place" and semantics.is_dense(p.grad):
                    p.grad.copy_(values)
                else:
                    taken = [q.grad for q in all_params(self.opts[0])]  # another's: both would see what one is given
                    view = [v for q, v in self.views if q is p and v is not None and v.shape == p.shape]
                    view = [v for v in view if not any(v is grad for grad in taken)]
                    p.grad = view[-1].copy_(values) if view and view[-1].dtype == p.dtype else values
            self.counts[i] = test_properties.more(self.counts[i], self.each(i)[0].grad is not None)
        checked_step(self.opts[0])
        self.opts[1].step()
        assert_same_optimizers(*self.opts)
        for opt in self.opts:
            shown = [float(opt.state[p].get("step", 1)) if opt.state.get(p) else 0 for p in all_params(opt)]
            assert [n for n, m in zip(shown, self.counts, strict=True) if m is not None] == test_properties.known(
                self.counts
            )

    def flatten(self) -> None:
        """Where it cannot be done, it is an error, and nothing moves."""
        params = all_params(self.opts[0])
        before = [(plain(p), p.grad, None if p.grad is None else plain(p.grad)) for p in params]
        try:
            flatten_([{"params": group["params"]} for group in self.opts[0].param_groups])
        except (TypeError, ValueError):
            assert all(p.grad is grad for p, (_, grad, _) in zip(params, before, strict=True))
        else:
            assert all(map(attached, [p for p in params if p.numel()]))
            self.views += [(p, p.grad) for p in params]
        for p, q, (data, _, grad) in zip(params, all_params(self.opts[1]), before, strict=True):
            assert_untouched(p, data)
            if p.grad is not None:
                assert_untouched(p.grad, torch.zeros_like(p) if grad is None else grad)
                if grad is None:
                    q.grad = torch.zeros_like(q)

    def unflatten(self) -> None:
        unflatten_(all_params(self.opts[0]))

    def flatten_anew(self) -> None:
        for p in all_params(self.opts[0]):
            p.data = p.data.clone(memory_format=torch.preserve_format)
            if p.data_ptr() % 64 or not semantics.is_dense(p):
                p.data = p.data.contiguous()
        self.unflatten()
        self.flatten()

    def flatten_anew_and_merge(self) -> None:
        """All attached, all states loaded: exactly what shares buffer, group and count, in that order, is one run."""
        self.flatten_anew()
        opt = self.opts[0]
        if not all(attached(p) for p in all_params(opt) if p.numel()):
            return
        self.reload()
        for o in self.opts:
            o.zero_grad(set_to_none=False)
        self.counts = [
            test_properties.more(n, p.grad is not None) for n, p in zip(self.counts, all_params(opt), strict=True)
        ]
        checked_step(opt)
        self.opts[1].step()
        assert_same_optimizers(*self.opts)
        found = [(p, g) for g, group in enumerate(opt.param_groups) for p in group["params"] if p.numel()]
        followers = 0
        for (p, g), (q, h) in itertools.permutations(found, 2):
            a, b = place_of(p), place_of(q)
            assert a is not None
            assert b is not None
            alike = g == h and float(opt.state[p]["step"]) == float(opt.state[q]["step"])
            # Their states lie likewise, and were all there when they were loaded, or none was.
            followers += alike and a.memory is b.memory and a.offset + padded(a.numel) == b.offset
        if all(own for own in opt.state.values()) and len({tuple(own) for own in opt.state.values()}) == 1:
            assert_runs(opt, len(found) - followers)

    def zero_grad(self) -> None:
        to_none = self.data.draw(st.booleans(), label="set_to_none")
        for opt in self.opts:
            opt.zero_grad(set_to_none=to_none)
        grads = [(p.grad, q.grad) for p, q in zip(*map(all_params, self.opts), strict=True)]
        for a, b in grads:
            assert (a is None) == (b is None)
            assert a is None or b is None or not (bool(a.any()) or bool(b.any()))

    def exchange_two(self) -> None:
        """Parameters, gradients or states of two that are alike trade their memory."""
        i, j = self.pick(), self.pick()
        what = self.data.draw(st.sampled_from(("data", "grad", "grad data", "states")))
        pairs = list(zip(self.each(i), self.each(j), strict=True))
        if any((a.shape, a.dtype, a.stride()) != (b.shape, b.dtype, b.stride()) for a, b in pairs):
            return
        for opt, (a, b) in zip(self.opts, pairs, strict=True):
            if what == "data":
                a.data, b.data = b.data, a.data
            elif what == "grad":
                a.grad, b.grad = b.grad, a.grad
            elif what == "grad data" and a.grad is not None and b.grad is not None:
                a.grad.data, b.grad.data = b.grad.data, a.grad.data
            elif what == "states":
                one, other = opt.state.get(a) or {}, opt.state.get(b) or {}
                for name in one.keys() & other.keys() - {"step"}:
                    one[name].data, other[name].data = other[name].data, one[name].data


FLAT_MUTATIONS = (
    *test_properties.MUTATIONS,
    *(name for name, value in vars(FlatLife).items() if callable(value) and name not in ("__init__", "step")),
)


@both
@test_properties.examples(250)
@given(data=st.data())
def test_lives(rule: str, data: st.DataObject) -> None:
    test_properties.live(rule, data, FLAT_MUTATIONS, FlatLife)


@pytest.mark.slow
@both
@test_properties.examples(400)
@given(data=st.data())
def test_long_lives(rule: str, data: st.DataObject) -> None:
    test_properties.live(rule, data, FLAT_MUTATIONS, FlatLife)


def test_flat_mutations_are_known() -> None:
    assert len(FLAT_MUTATIONS) == len(test_properties.MUTATIONS) + 6
