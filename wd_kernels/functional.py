r"""The step for who brings their own state: lists of tensors, or flat buffers. All are one launch per device and dtype.

    adamw_       sgdw_       adagradw_        lists of parameters, gradients and states
    adamw_flat_  sgdw_flat_  adagradw_flat_   one flat buffer each, such as a shard of a ZeRO-style partition
    accumulate_                               gradients of several backward passes, and the norm of their sum

They do what the classes do, to the bit, in every decay mode ("corrected" too) and through every backend, and remember
nothing: the caller keeps the states and counts the steps. Centers, references, caution and schedules of the weight
decay are the classes' alone. Each is an operator of torch.ops too (`torch_ops.py`), with the scalars as numbers or as
tensors of one element, and `torch.compile` traces these functions as that. A number of another value makes it compile
again; a tensor of another value does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import accumulation, native
from .backends import BackendName
from .rules import TORCHS_DECAY, DecayMode, Form, StochasticRounding, check_chosen, pair
from .torch_ops import OPERATORS, Role
from .torch_ops import step as step_now
from .validation import is_plain

__all__ = ["accumulate_", "adagradw_", "adagradw_flat_", "adamw_", "adamw_flat_", "sgdw_", "sgdw_flat_"]

Number: TypeAlias = float | Tensor
Tensors: TypeAlias = Sequence[Tensor]


def adamw_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors = (),
    *,
    step: int | Tensor,
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = TORCHS_DECAY,
    decay: DecayMode = "lr_scaled",
    eta: Number = 1.0,
    maximize: bool = False,
    grad_factor: Number = 1.0,
    max_grad_value: Number | None = None,
    master_params: Tensors = (),
    exp_avg_scales: Tensors = (),
    exp_avg_sq_scales: Tensors = (),
    max_exp_avg_sq_scales: Tensors = (),
    backend: BackendName = "auto",
    stochastic_rounding: StochasticRounding = "states",
    seed: int = 0,
) -> None:
    """One AdamW step on lists of tensors, in place: the equations and decay modes of :class:`wd_kernels.AdamW`.

    Args:
        params: float64, float32, bfloat16, float16 or complex tensors in any dense layout, on any devices. May be
            mixed: every device and dtype is a launch.
        grads: one for each, of its shape; its dtype, or float32 beside 16-bit parameters, or 16-bit beside float32.
            They are read. One that lies otherwise than its parameter is copied.
        exp_avgs, exp_avg_sqs: the moments, zeros before the first step: of the parameter's shape and layout, float32
            or bfloat16 for float32 and 16-bit parameters (float16 for float16 ones too), or in 8 bits, exp_avgs int8
            and the others uint8; else of its dtype.
        max_exp_avg_sqs: the largest second moments, likewise, for AMSGrad; none for AdamW without it.
        step: the number of this step, from 1; or, in a CPU tensor, a number for every parameter.
        lr, betas, eps, weight_decay, decay, eta, maximize: as for :class:`wd_kernels.AdamW`. Numbers, or CPU tensors of
            one element, which are read as float64: reading a device's would wait for it.
        grad_factor: gradients are multiplied by this first, in float64 with their sign: 1/scale, a clipping factor.
        max_grad_value: then their elements are clamped to [-max_grad_value, max_grad_value]; None or infinite: they are
            not.
        master_params: one for each, if any, of its shape and layout, beside 16-bit parameters. A float32 tensor is the
            master: it is stepped, and the parameter, wherever it lies, is written as its copy, which nothing reads.
            Beside bfloat16, an int16 or int8 tensor is what the parameter lacks of a float32, or of its upper 24 bits;
            zeros, where the parameter is all there is.
        exp_avg_scales, exp_avg_sq_scales, max_exp_avg_sq_scales: one for each of the states that are in 8 bits, uint8,
            contiguous, with an element for every 32 of its state (rounded up), zeros before the first step.
        backend, stochastic_rounding, seed: as for :class:`wd_kernels.AdamW`. Random bits are those of elements that are
            numbered through the lists, each tensor from a multiple of 32 on.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument and the index; nothing was written.

    Example:
        >>> import torch
        >>> from wd_kernels.functional import adamw_
        >>> w, m, v = torch.ones(3), torch.zeros(3), torch.zeros(3)
        >>> adamw_([w], [torch.ones(3)], [m], [v], step=1, lr=1e-3, weight_decay=0.1, decay="independent")
        >>> [round(x, 4) for x in w.tolist()]
        [0.899, 0.899, 0.899]

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Algorithm 2.
    """
    roles = _lists(
        "adamw_",
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        master_params,
        exp_avg_scales,
        exp_avg_sq_scales,
        max_exp_avg_sq_scales,
    )
    check_chosen(weight_decay, decay, lr, "adamw_")
    numbers = (step, lr, *pair("betas", betas, "adamw_"), eps, weight_decay, eta, grad_factor, max_grad_value)
    _run("adamw_", roles, numbers, (decay, maximize, backend, *_rounding(stochastic_rounding, seed)))


def adamw_flat_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    *,
    step: int | Tensor,
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = TORCHS_DECAY,
    decay: DecayMode = "lr_scaled",
    eta: Number = 1.0,
    maximize: bool = False,
    grad_factor: Number = 1.0,
    max_grad_value: Number | None = None,
    master_param: Tensor | None = None,
    exp_avg_scale: Tensor | None = None,
    exp_avg_sq_scale: Tensor | None = None,
    max_exp_avg_sq_scale: Tensor | None = None,
    backend: BackendName = "auto",
    stochastic_rounding: StochasticRounding = "states",
    seed: int = 0,
) -> None:
    """One AdamW step on flat buffers, in place: one-dimensional, contiguous tensors of equal length.

    Arguments and errors as for :func:`adamw_`, with one buffer in place of each list.
    """
    roles = [
        [param],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        _maybe(max_exp_avg_sq),
        _maybe(master_param),
        _maybe(exp_avg_scale),
        _maybe(exp_avg_sq_scale),
        _maybe(max_exp_avg_sq_scale),
    ]
    check_chosen(weight_decay, decay, lr, "adamw_flat_")
    numbers = (step, lr, *pair("betas", betas, "adamw_flat_"), eps, weight_decay, eta, grad_factor, max_grad_value)
    _run("adamw_flat_", roles, numbers, (decay, maximize, backend, *_rounding(stochastic_rounding, seed)))


def sgdw_(
    params: Tensors,
    grads: Tensors,
    momentum_buffers: Tensors = (),
    *,
    step: int | Tensor,
    lr: Number = 1e-3,
    momentum: Number = 0.0,
    dampening: Number = 0.0,
    weight_decay: Number = 0.0,
    nesterov: bool = False,
    decay: DecayMode = "lr_scaled",
    form: Form = "torch",
    eta: Number = 1.0,
    maximize: bool = False,
    grad_factor: Number = 1.0,
    max_grad_value: Number | None = None,
    master_params: Tensors = (),
    momentum_buffer_scales: Tensors = (),
    backend: BackendName = "auto",
    stochastic_rounding: StochasticRounding = "states",
    seed: int = 0,
) -> None:
    """One SGDW step on lists of tensors, in place: the equations and decay modes of :class:`wd_kernels.SGDW`.

    Args:
        params, grads: as for :func:`adamw_`.
        momentum_buffers: zeros before the first step, of the parameter's shape and layout and of dtypes as for
            :func:`adamw_`; none where momentum is 0.
        step: the number of this step, from 1; or, in a CPU tensor, a number for every parameter. In step 1 the buffer
            takes the gradient undampened, as torch's does.
        lr, momentum, dampening, weight_decay, nesterov, decay, form, eta, maximize: as for :class:`wd_kernels.SGDW`.
        grad_factor, max_grad_value, master_params, backend, stochastic_rounding, seed: as for :func:`adamw_`.
        momentum_buffer_scales: of buffers in int8, as exp_avg_scales there.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument and the index; nothing was written.

    Example:
        >>> import torch
        >>> from wd_kernels.functional import sgdw_
        >>> w, b = torch.ones(3), torch.zeros(3)
        >>> sgdw_([w], [torch.ones(3)], [b], step=1, lr=0.1, momentum=0.9, weight_decay=0.5)
        >>> [round(x, 4) for x in w.tolist()]
        [0.85, 0.85, 0.85]

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Algorithm 1.
    """
    roles = _lists("sgdw_", params, grads, momentum_buffers, master_params, momentum_buffer_scales)
    numbers = (step, lr, momentum, dampening, weight_decay, eta, grad_factor, max_grad_value)
    _run("sgdw_", roles, numbers, (decay, form, nesterov, maximize, backend, *_rounding(stochastic_rounding, seed)))


def sgdw_flat_(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    step: int | Tensor,
    lr: Number = 1e-3,
    momentum: Number = 0.0,
    dampening: Number = 0.0,
    weight_decay: Number = 0.0,
    nesterov: bool = False,
    decay: DecayMode = "lr_scaled",
    form: Form = "torch",
    eta: Number = 1.0,
    maximize: bool = False,
    grad_factor: Number = 1.0,
    max_grad_value: Number | None = None,
    master_param: Tensor | None = None,
    momentum_buffer_scale: Tensor | None = None,
    backend: BackendName = "auto",
    stochastic_rounding: StochasticRounding = "states",
    seed: int = 0,
) -> None:
    """One SGDW step on flat buffers, in place: one-dimensional, contiguous tensors of equal length.

    Arguments and errors as for :func:`sgdw_`, with one buffer in place of each list.
    """
    roles = [[param], [grad], _maybe(momentum_buffer), _maybe(master_param), _maybe(momentum_buffer_scale)]
    numbers = (step, lr, momentum, dampening, weight_decay, eta, grad_factor, max_grad_value)
    _run(
        "sgdw_flat_", roles, numbers, (decay, form, nesterov, maximize, backend, *_rounding(stochastic_rounding, seed))
    )


def adagradw_(
    params: Tensors,
    grads: Tensors,
    state_sums: Tensors,
    *,
    step: int | Tensor,
    lr: Number = 1e-2,
    lr_decay: Number = 0.0,
    weight_decay: Number = 0.0,
    eps: Number = 1e-10,
    decay: DecayMode = "lr_scaled",
    eta: Number = 1.0,
    maximize: bool = False,
    grad_factor: Number = 1.0,
    max_grad_value: Number | None = None,
    master_params: Tensors = (),
    state_sum_scales: Tensors = (),
    backend: BackendName = "auto",
    stochastic_rounding: StochasticRounding = "states",
    seed: int = 0,
) -> None:
    """One AdagradW step on lists of tensors, in place: the equations and decay modes of :class:`wd_kernels.AdagradW`.

    Args:
        params, grads: as for :func:`adamw_`.
        state_sums: the initial accumulator value before the first step, of the parameter's shape and layout and of
            dtypes as for :func:`adamw_`.
        step: the number of this step, from 1; or, in a CPU tensor, a number for every parameter.
        lr, lr_decay, weight_decay, eps, decay, eta, maximize: as for :class:`wd_kernels.AdagradW`.
        grad_factor, max_grad_value, master_params, backend, stochastic_rounding, seed: as for :func:`adamw_`.
        state_sum_scales: of sums in uint8, as exp_avg_scales there.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument and the index; nothing was written.

    Example:
        >>> import torch
        >>> from wd_kernels.functional import adagradw_
        >>> w, s = torch.ones(3), torch.zeros(3)
        >>> adagradw_([w], [torch.full((3,), 2.0)], [s], step=1, lr=0.1, weight_decay=0.5)
        >>> [round(x, 4) for x in w.tolist()]
        [0.85, 0.85, 0.85]

    Source: Duchi, Hazan & Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", JMLR
    2011, section 1.1.
    """
    roles = _lists("adagradw_", params, grads, state_sums, master_params, state_sum_scales)
    numbers = (step, lr, lr_decay, eps, weight_decay, eta, grad_factor, max_grad_value)
    _run("adagradw_", roles, numbers, (decay, maximize, backend, *_rounding(stochastic_rounding, seed)))


def adagradw_flat_(
    param: Tensor,
    grad: Tensor,
    sum: Tensor,
    *,
    step: int | Tensor,
    lr: Number = 1e-2,
    lr_decay: Number = 0.0,
    weight_decay: Number = 0.0,
    eps: Number = 1e-10,
    decay: DecayMode = "lr_scaled",
    eta: Number = 1.0,
    maximize: bool = False,
    grad_factor: Number = 1.0,
    max_grad_value: Number | None = None,
    master_param: Tensor | None = None,
    sum_scale: Tensor | None = None,
    backend: BackendName = "auto",
    stochastic_rounding: StochasticRounding = "states",
    seed: int = 0,
) -> None:
    """One AdagradW step on flat buffers, in place: one-dimensional, contiguous tensors of equal length.

    Arguments and errors as for :func:`adagradw_`, with one buffer in place of each list.
    """
    numbers = (step, lr, lr_decay, eps, weight_decay, eta, grad_factor, max_grad_value)
    _run(
        "adagradw_flat_",
        [[param], [grad], [sum], _maybe(master_param), _maybe(sum_scale)],
        numbers,
        (decay, maximize, backend, *_rounding(stochastic_rounding, seed)),
    )


def _maybe(t: Tensor | None) -> Role:
    return [] if t is None else [t]


@torch._disable_dynamo  # type: ignore[attr-defined]
def accumulate_(
    accumulators: Tensors, grads: Tensors, *, new: bool | Sequence[bool] = False, backend: BackendName = "auto"
) -> Tensor:
    """Adds gradients to accumulators, in place, in one launch a dtype: accumulator = accumulator + grad, rounded once.

    Args:
        accumulators: float32, float64 or complex, in any dense layout, on one device; flat buffers are lists of one.
        grads: one for each, of its shape: of its dtype, or 16-bit beside float32. They are read.
        new: what lies in the accumulators is nothing yet, and they become the gradients: of all, or of each.
        backend: as for :class:`wd_kernels.AdamW`.

    Returns:
        The norm of all accumulators as they are then, float64 [], on their device, without waiting for it: the root of
        the exact sum of the squares of blocks, as `max_grad_norm` has it; of DTensors that of the whole, for which all
        processes call it. `grad_factor=` of the steps takes what clips.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument and the index; nothing was written.

    Example:
        >>> import torch
        >>> from wd_kernels.functional import accumulate_
        >>> total = torch.empty(2)
        >>> norm = accumulate_([total], [torch.tensor([3.0, 1.0], dtype=torch.bfloat16)], new=True)
        >>> accumulate_([total], [torch.tensor([0.0, 3.0], dtype=torch.bfloat16)]), total
        (tensor(5., dtype=torch.float64), tensor([3., 4.]))
    """
    into, own = (_list(*of, "accumulate_") for of in (("accumulators", accumulators), ("grads", grads)))
    n = len(into)
    if not isinstance(new, (bool, list, tuple)) or not (isinstance(new, bool) or all(isinstance(x, bool) for x in new)):
        raise TypeError(f"new={new!r} in accumulate_: allowed are True, False, and a list of these")
    each = new if isinstance(new, bool) else list(new)
    for name, length in (("grads", len(own)), ("new", n if isinstance(each, bool) else len(each))):
        if length != n:
            raise ValueError(f"{name} in accumulate_ has {length} entries: accumulators has {n}, and each needs one")
    return accumulation.accumulate(into, own, each, backend)


def _rounding(stochastic: Any, seed: int) -> tuple[Any, int]:
    """As operators have it: each of one type."""
    return ("both" if stochastic else "none") if isinstance(stochastic, bool) else stochastic, seed


def _lists(name: str, *roles: Any) -> list[Role]:
    return [_list(role, own, name) for role, own in zip(OPERATORS[name].roles, roles, strict=True)]


def _list(role: str, own: Any, name: str) -> Role:
    if type(own) not in (list, tuple) and (not isinstance(own, Iterable) or isinstance(own, (str, Tensor))):
        raise TypeError(f"{role} in {name} is a {type(own).__name__}: expected a list of tensors")
    return list(own)


def _run(name: str, roles: list[Role], numbers: Sequence[Any], options: Sequence[Any]) -> None:
    """Steps real tensors at once; where something looks on (a compiler, a mode, fake tensors), as an operator.

    A call through torch's dispatcher into Python costs some 60 us, and more with every tensor.
    """
    if numbers[-1] is None:  # the limit
        numbers = (*numbers[:-1], math.inf)
    if not torch.compiler.is_compiling() and not _watched(roles):
        step_now(OPERATORS[name], roles, numbers, options)
        return
    if not roles[0]:
        return
    packet = getattr(native.OPS, name)
    tensors: list[Any] = [own[0] if own else None for own in roles] if OPERATORS[name].flat else list(roles)
    with torch.no_grad():
        if any(isinstance(number, Tensor) for number in numbers):
            numbers = [torch.as_tensor(number, dtype=torch.float64, device="cpu") for number in numbers]
            packet.tensor(*tensors, *numbers, *options)
        else:
            packet.default(*tensors, *numbers, *options)


def _watched(roles: list[Role]) -> bool:
    """Is there a mode, a transform of torch.func, or a fake tensor, that must see an operator?"""
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    first = roles[0][0] if roles[0] else None
    return isinstance(first, Tensor) and not is_plain(first) and not is_traceable_wrapper_subclass(first)
