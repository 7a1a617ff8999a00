"""AdamW, SGDW and AdagradW: thin classes over one base, one table, one rule and one launch a bucket."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .averages import AverageLike
from .backends import BackendName
from .optimizer import DecoupledOptimizer
from .rules import (
    ADAGRADW,
    ADAMW,
    TORCHS_DECAY,
    DecayMode,
    DecayTo,
    Form,
    MasterWeights,
    StateDtype,
    StochasticRounding,
)
from .rules import SGDW as SGDW_RULE
from .schedules.stepping import ScheduleLike

__all__ = ["SGDW", "AdagradW", "AdamW"]

Number: TypeAlias = float | Tensor


class AdamW(DecoupledOptimizer):
    r"""Adam with decoupled weight decay, in every form the literature has, in one launch.

    With :math:`a = \eta\alpha` (schedule multiplier times learning rate):

    .. math::
        m &\leftarrow \beta_1 m + (1-\beta_1) g \qquad v \leftarrow \beta_2 v + (1-\beta_2) g^2 \\
        \theta &\leftarrow \theta - \Big(\lambda' \theta
            + \frac{a}{1-\beta_1^t}\,\frac{m}{\sqrt{v/(1-\beta_2^t)} + \epsilon}\Big)

    ===================== =====================================================================================
    ``decay``             where :math:`\lambda` enters
    ===================== =====================================================================================
    ``"lr_scaled"``       :math:`\lambda' = \eta\alpha\lambda`: torch.optim.AdamW (the default)
    ``"independent"``     :math:`\lambda' = \eta\lambda`: the paper's AdamW, Algorithm 2
    ``"l2"``              :math:`g \leftarrow g + \lambda\theta`, :math:`\lambda' = 0`: torch.optim.Adam
    ``"proximal"``        the whole step is divided by :math:`1 + \eta\lambda`: ProxAdam
    ``"metric_proximal"`` the prox of :math:`\frac{\lambda}{2}\|\theta\|^2` in Adam's own metric
    ``"corrected"``       :math:`\lambda' = \eta\alpha\cdot\eta\lambda`: AdamC, for weights before a norm
    ===================== =====================================================================================

    Decay and update are summed before they are rounded into the parameter once. Parameters may be float64, float32,
    bfloat16, float16 or complex, of any shape and dense layout; gradients have the parameter's dtype, or are float32
    beside 16-bit parameters, or 16-bit beside float32 ones. ``exp_avg`` and ``exp_avg_sq`` are float32 (float64 for
    float64) also for 16-bit parameters, where torch keeps them in the parameter's dtype; `state_dtype` asks for others.

    Args:
        params: parameters, named parameters, or dicts of parameter groups.
        lr: learning rate :math:`\alpha \ge 0`; a number or a tensor of one element. 0 freezes the weights of a group
            in every mode, while its moments advance.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`. It must be given with "independent" and "proximal", which do not multiply
            it by the learning rate.
        amsgrad: keep the largest second moment (Reddi et al., 2018).
        maximize: ascend.
        decay: the form of weight decay, see above. "corrected" falls as :math:`\eta^2`, so :math:`\eta` must be the
            schedule's: with ``"from_lr"`` it follows torch's LR schedulers; beside one without, it is "lr_scaled".
        decay_center: what weights decay to: :math:`\theta - c` takes the place of :math:`\theta` in the decay of every
            mode. 1 for the gains of norms. Not for complex parameters.
        decay_to: the same with a tensor for each parameter (L2-SP): a list in the order of the group's parameters, a
            dict by their names, or "initial", the weights as they are before their first step. It is
            ``state[p]["decay_reference"]``, of the parameter's dtype, or float32 beside a master weight; one that lies
            so is referred to, and others are copied. It is saved, and a loaded one takes its place.
        cautious: weights decay only where that agrees with the update u: where :math:`u\,(\theta - c) < 0` the decay is
            0. With "lr_scaled", "independent" and "corrected"; an error with "l2", which decays in the gradient, and
            with proximal modes, which divide the whole step.
        weight_decay_schedule: what multiplies `weight_decay`, apart from :math:`\eta`: a function of the completed
            steps, such as those of :mod:`wd_kernels.schedules`, counted in ``group["schedule_step"]`` as `schedule` is.
            DINO's rise from 0.04 to 0.4 is ``weight_decay=0.04, weight_decay_schedule=Cosine(steps, end=10)``.
            These four, and not the numbers, are the live group's when a state is loaded.
        eta: the schedule multiplier :math:`\eta \ge 0`; 0 freezes weights as lr 0 does. ``group["eta"]``, where it is
            not 1.
        schedule: sets :math:`\eta` before every step: a function of the number of completed steps, such as those of
            :mod:`wd_kernels.schedules`. A group may have its own. Counted in ``group["schedule_step"]``, which is saved
            and loaded; every step counts that was not skipped. ``"from_lr"`` follows whoever changes ``group["lr"]``,
            such as torch's LR schedulers: :math:`\eta = lr/base\_lr`, so that the decay of every mode follows too.
        base_lr: for ``"from_lr"``, the :math:`\alpha > 0` at which :math:`\eta = 1`; by default the group's first lr,
            which is torch's "initial_lr" where an LR scheduler has left one.
        show_lr: with a schedule that is called, ``group["lr"]`` shows :math:`\eta\alpha`, for who logs it, and
            :math:`\alpha` is ``group["base_lr"]``.
        state_dtype: what states are stored in: ``torch.float32`` (float64 of float64 parameters; the default, since
            bfloat16 moments cost accuracy, and inheriting them from bfloat16 weights has cost people their runs),
            ``torch.bfloat16``, ``torch.int8`` (8 bits, and a scale for every 32 elements; uint8 where a state is never
            negative), ``"param"`` (the parameter's dtype, torch's layout), or a dict of these by the states' names. A
            group may have its own. Arithmetic is float32 all the same.
        stochastic_rounding: what in bfloat16 or 8 bits is rounded at random, with a mean that is exact: ``"states"``
            (the default: nearest rounding would lose every decay of a second moment), ``"params"``, True (both) or
            False. Nearest rounding of bfloat16 weights loses their decay and small updates.
        master_weights: what a 16-bit parameter has beside it as its master weight, in ``state[p]["master_param"]``:
            ``"float32"`` (or True), a master that is stepped, and written into the parameter, rounded, in the same
            pass; ``"split32"``, the 16 bits that bfloat16 lacks of a float32 (int16): the same master in half the
            bytes; ``"split24"``, 8 bits (int8), rounded to these, stochastically if parameters are to be; False, none.
            Decay and small updates are then not lost. A group may have its own. Whoever writes weights by hand calls
            :meth:`load_master_weights` after it.
        seed: of the random bits, a whole number; they are a function of it, the parameter's step count and the
            element, so that a run repeats to the bit on every backend, resumed, flat, or sharded by the first
            dimension.
        max_grad_norm: scales the gradients down, within the step, where the norm of all of them is larger: by
            max_grad_norm / (norm + 1e-6), as ``clip_grad_norm_`` does, but gradients are read and not rewritten, and
            the norm has the same bits on every backend, with any number of threads. ``math.inf`` only
            measures it: :attr:`grad_norm`. A group may have its own, and is then clipped by its own norm alone.
        max_grad_value: clamps the elements of the gradients to [-max_grad_value, max_grad_value], within the step, as
            ``clip_grad_value_`` does, but gradients are read and not rewritten. It is the last thing that is done to
            them: they are unscaled, and clipped by their norm, before. NaN stays. A group may have its own, which a
            loaded state does not replace.
        skip_nonfinite: a step whose gradients have an infinity or a NaN leaves parameters, states, step counts and
            schedules as they are: :attr:`skipped`.
        skip_spikes: so does one whose norm, or loss where there is one, is more than so many standard deviations above
            the mean of the last `spike_window` (2 to 1024), once half of these are known; 6 is OLMo's. The loss is what
            the closure of :meth:`step` returns, or ``opt.latest_loss = loss.detach()`` before each step, the same in
            all processes; nobody waits for it. Norms and losses of skipped steps count too, if they are finite.
        ema_decay: keeps an average of the weights, written in the same pass: :math:`ema \leftarrow \beta\,ema +
            (1-\beta)\,\theta` with the parameter as it is stored after each of its steps. A number :math:`\beta` in
            [0, 1), with which it begins as the parameter was; one of :mod:`wd_kernels.averages`, which warm up, or give
            the mean of all (SWA); or a function of the step count. It is ``state[p]["ema"]``; :meth:`swap_ema` and
            :meth:`ema_state_dict` use it. A group may have its own, which a loaded state does not replace.
        ema_dtype: what it is stored in, as a word of `state_dtype`; float32 by default, also beside 16-bit parameters.
        track_changes: steps mark which elements of the parameters they change, a bit for each: :meth:`changes`.
        backend: "auto", "cpu", "triton", "cuda" or "reference"; all give the same bits. One that is not there is an
            error.
        foreach, fused: tolerated, and kept in the groups, for torch's callers: there is one implementation. With
            ``fused=True``, `max_grad_norm`, `skip_nonfinite`, `skip_spikes` or `capturable`, torch.amp.GradScaler
            leaves unscaling and skipping to the step, as with torch's fused classes.
        capturable: on a GPU, steps can be captured in CUDA graphs after one outside of them: step counts, schedules
            (those of :mod:`wd_kernels.schedules`), and lr, eta, weight_decay, betas, eps where they are tensors on the
            parameters' device (float32 or float64), are read and counted there, so that a replay has what they are
            then. Numbers stay what they were. :meth:`end_captures` ends it. On the CPU it changes nothing.
        differentiable: must be False.

    Raises:
        TypeError, ValueError: a hyperparameter or parameter is not allowed; the message names it.

    Example:
        >>> import torch, wd_kernels
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> opt = wd_kernels.AdamW([w], lr=1e-3, weight_decay=0.1, decay="independent")
        >>> w.grad = torch.ones(3)
        >>> opt.step()
        >>> [round(x, 4) for x in w.tolist()]
        [0.899, 0.899, 0.899]

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Algorithm 2 and appendix B;
    Zhuang et al., "Understanding AdamW through Proximal Methods and Scale-Freeness", TMLR 2022, section 3; Defazio,
    "Why Gradients Rapidly Increase Near the End of Training", 2025 (corrected); Li et al., "Explicit Inductive Bias for
    Transfer Learning with Convolutional Networks", ICML 2018 (L2-SP); Chen et al., "Cautious Weight Decay", 2025; Caron
    et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021 (DINO's schedule).
    """

    rule = ADAMW

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Number = TORCHS_DECAY,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decay: DecayMode = "lr_scaled",
        decay_center: float = 0.0,
        decay_to: DecayTo = None,
        cautious: bool = False,
        weight_decay_schedule: Callable[[int], float] | None = None,
        eta: Number = 1.0,
        schedule: ScheduleLike = None,
        base_lr: Number | None = None,
        show_lr: bool = False,
        state_dtype: StateDtype = torch.float32,
        stochastic_rounding: StochasticRounding = "states",
        master_weights: MasterWeights = False,
        seed: int = 0,
        max_grad_norm: float | None = None,
        max_grad_value: float | None = None,
        skip_nonfinite: bool = False,
        skip_spikes: float | None = None,
        spike_window: int = 128,
        ema_decay: AverageLike = None,
        ema_dtype: torch.dtype | str = torch.float32,
        track_changes: bool = False,
        backend: BackendName = "auto",
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(
            params, backend, max_grad_norm, skip_nonfinite, skip_spikes, spike_window, capturable, track_changes,
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad,
            maximize=maximize, decay=decay, eta=eta, schedule=schedule, base_lr=base_lr, show_lr=show_lr,
            state_dtype=state_dtype, stochastic_rounding=stochastic_rounding,
            master_weights=master_weights, seed=seed, max_grad_value=max_grad_value, ema_decay=ema_decay,
            ema_dtype=ema_dtype, foreach=foreach, fused=fused, differentiable=differentiable,
            decay_center=decay_center, decay_to=decay_to, cautious=cautious,
            weight_decay_schedule=weight_decay_schedule,
        )  # fmt: skip


class SGDW(DecoupledOptimizer):
    r"""SGD with momentum and decoupled weight decay, in one launch.

    With :math:`a = \eta\alpha` and :math:`\lambda'` as in :class:`AdamW`:

    .. math::
        b &\leftarrow \mu b + (1-\tau) g \\
        \theta &\leftarrow \theta - (\lambda' \theta + a\,b)
            \qquad\text{nesterov: } a\,(g + \mu b)

    ``form="torch"`` (the default) is torch.optim.SGD's: the buffer starts as the first gradient, undampened, and the
    learning rate multiplies it. ``form="paper"`` is Algorithm 1 of the paper: :math:`b \leftarrow \mu b + a g`,
    :math:`\theta \leftarrow \theta - (\lambda'\theta + b)`. ``decay="l2"`` makes it torch.optim.SGD.

    ``state[p]`` holds ``step`` and, with momentum, ``momentum_buffer`` (float32 for 16-bit parameters). With momentum
    0 no buffer is made or touched.

    Args:
        params: parameters, named parameters, or dicts of parameter groups.
        lr: learning rate :math:`\alpha \ge 0`; 0 freezes the weights of a group while its buffers advance.
        momentum: :math:`\mu \ge 0`.
        dampening: :math:`\tau`, any finite number; no effect at momentum 0.
        weight_decay: :math:`\lambda \ge 0`.
        nesterov: Nesterov momentum; needs momentum > 0 and dampening 0.
        maximize: ascend.
        decay: the form of weight decay; "metric_proximal" is "proximal" with :math:`\eta\alpha\lambda`.
        form: "torch" or "paper".
        decay_center, decay_to, cautious, weight_decay_schedule,
        eta, schedule, base_lr, show_lr, state_dtype, stochastic_rounding, seed,
        max_grad_norm, max_grad_value, skip_nonfinite, skip_spikes, spike_window, ema_decay, ema_dtype, track_changes,
        backend, foreach, fused, capturable, differentiable: as in :class:`AdamW`.

    Raises:
        TypeError, ValueError: a hyperparameter or parameter is not allowed; the message names it.

    Example:
        >>> import torch, wd_kernels
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> opt = wd_kernels.SGDW([w], lr=0.1, momentum=0.9, weight_decay=0.5)
        >>> w.grad = torch.ones(3)
        >>> opt.step()
        >>> [round(x, 4) for x in w.tolist()]
        [0.85, 0.85, 0.85]

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Algorithm 1; Sutskever et al.,
    "On the importance of initialization and momentum in deep learning", ICML 2013, section 2.
    """

    rule = SGDW_RULE

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: Number = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        decay: DecayMode = "lr_scaled",
        decay_center: float = 0.0,
        decay_to: DecayTo = None,
        cautious: bool = False,
        weight_decay_schedule: Callable[[int], float] | None = None,
        form: Form = "torch",
        eta: Number = 1.0,
        schedule: ScheduleLike = None,
        base_lr: Number | None = None,
        show_lr: bool = False,
        state_dtype: StateDtype = torch.float32,
        stochastic_rounding: StochasticRounding = "states",
        master_weights: MasterWeights = False,
        seed: int = 0,
        max_grad_norm: float | None = None,
        max_grad_value: float | None = None,
        skip_nonfinite: bool = False,
        skip_spikes: float | None = None,
        spike_window: int = 128,
        ema_decay: AverageLike = None,
        ema_dtype: torch.dtype | str = torch.float32,
        track_changes: bool = False,
        backend: BackendName = "auto",
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(
            params, backend, max_grad_norm, skip_nonfinite, skip_spikes, spike_window, capturable, track_changes,
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay,
            nesterov=nesterov, maximize=maximize, decay=decay, form=form, eta=eta, schedule=schedule, base_lr=base_lr,
            show_lr=show_lr, state_dtype=state_dtype, stochastic_rounding=stochastic_rounding,
            master_weights=master_weights, seed=seed, max_grad_value=max_grad_value, ema_decay=ema_decay,
            ema_dtype=ema_dtype, foreach=foreach, fused=fused, differentiable=differentiable,
            decay_center=decay_center, decay_to=decay_to, cautious=cautious,
            weight_decay_schedule=weight_decay_schedule,
        )  # fmt: skip


class AdagradW(DecoupledOptimizer):
    r"""Adagrad with decoupled weight decay, in one launch.

    With :math:`\alpha_t = \alpha / (1 + (t - 1)\gamma)`, :math:`a = \eta\alpha_t`, and :math:`\lambda'` as in
    :class:`AdamW`, where :math:`\alpha_t` stands for :math:`\alpha` and :math:`\sqrt{s} + \epsilon` for Adam's metric:

    .. math::
        s &\leftarrow s + g^2 \\
        \theta &\leftarrow \theta - \Big(\lambda' \theta + a\,\frac{g}{\sqrt{s} + \epsilon}\Big)

    ``decay="l2"`` makes it torch.optim.Adagrad. ``state[p]`` holds ``step`` and ``sum``, which is float32 for 16-bit
    parameters.

    Args:
        params: parameters, named parameters, or dicts of parameter groups.
        lr: learning rate :math:`\alpha \ge 0`; 0 freezes the weights of a group while its sums advance.
        lr_decay: :math:`\gamma \ge 0`, by which the learning rate falls with a parameter's own steps, and with it the
            decay of every mode that follows the learning rate.
        weight_decay: :math:`\lambda \ge 0`.
        initial_accumulator_value: what sums begin with, >= 0; of a complex parameter both parts do.
        eps: :math:`\epsilon \ge 0`.
        maximize: ascend.
        decay: the form of weight decay. "corrected" is slowed once, by `lr_decay`, and falls as :math:`\eta^2`.
        decay_center, decay_to, cautious, weight_decay_schedule,
        eta, schedule, base_lr, show_lr, state_dtype, stochastic_rounding, seed,
        max_grad_norm, max_grad_value, skip_nonfinite, skip_spikes, spike_window, ema_decay, ema_dtype, track_changes,
        backend, foreach, fused, capturable, differentiable: as in :class:`AdamW`.

    Raises:
        TypeError, ValueError: a hyperparameter or parameter is not allowed; the message names it.

    Example:
        >>> import torch, wd_kernels
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> opt = wd_kernels.AdagradW([w], lr=0.1, weight_decay=0.5)
        >>> w.grad = torch.full((3,), 2.0)
        >>> opt.step()
        >>> [round(x, 4) for x in w.tolist()]
        [0.85, 0.85, 0.85]

    Source: Duchi, Hazan & Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization", JMLR
    2011, section 1.1; decay: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
    """

    rule = ADAGRADW

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: Number = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        decay: DecayMode = "lr_scaled",
        decay_center: float = 0.0,
        decay_to: DecayTo = None,
        cautious: bool = False,
        weight_decay_schedule: Callable[[int], float] | None = None,
        eta: Number = 1.0,
        schedule: ScheduleLike = None,
        base_lr: Number | None = None,
        show_lr: bool = False,
        state_dtype: StateDtype = torch.float32,
        stochastic_rounding: StochasticRounding = "states",
        master_weights: MasterWeights = False,
        seed: int = 0,
        max_grad_norm: float | None = None,
        max_grad_value: float | None = None,
        skip_nonfinite: bool = False,
        skip_spikes: float | None = None,
        spike_window: int = 128,
        ema_decay: AverageLike = None,
        ema_dtype: torch.dtype | str = torch.float32,
        track_changes: bool = False,
        backend: BackendName = "auto",
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        super().__init__(
            params, backend, max_grad_norm, skip_nonfinite, skip_spikes, spike_window, capturable, track_changes,
            lr=lr, lr_decay=lr_decay, weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value, eps=eps, maximize=maximize, decay=decay, eta=eta,
            schedule=schedule, base_lr=base_lr, show_lr=show_lr, state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            master_weights=master_weights, seed=seed, max_grad_value=max_grad_value, ema_decay=ema_decay,
            ema_dtype=ema_dtype, foreach=foreach, fused=fused, differentiable=differentiable,
            decay_center=decay_center, decay_to=decay_to, cautious=cautious,
            weight_decay_schedule=weight_decay_schedule,
        )  # fmt: skip
