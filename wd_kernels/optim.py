"""AdamW and SGDW: thin torch.optim.Optimizer classes over one table, one rule and one launch a bucket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from . import backends, checkpoint
from .checks import Extent, check_disjoint, check_parameter, label
from .rules import ADAMW, Rule
from .rules import SGDW as SGDW_RULE
from .slots import Spec
from .table import TensorTable

__all__ = ["SGDW", "AdamW"]

Number: TypeAlias = float | Tensor


class _Decoupled(Optimizer):
    """What AdamW and SGDW share: groups, the table, the way of a step, saving and loading."""

    rule: Rule

    def __init__(self, params: ParamsT, defaults: dict[str, Any], backend: str) -> None:
        if defaults.get("differentiable"):
            raise ValueError("differentiable=True is not supported: the step writes in place, outside autograd")
        if defaults.get("capturable"):
            raise ValueError("capturable=True is not supported yet: allowed is False")
        if backend not in backends.NAMES:
            raise ValueError(f"backend={backend!r}: allowed are {', '.join(map(repr, backends.NAMES))}")
        self.backend = backend
        self._warned_of_export = False
        self.rule.hypers([defaults])
        super().__init__(params, defaults)
        self._new_table()

    def _new_table(self) -> None:
        resolved: dict[Spec, backends.Backend] = {}

        def resolve(spec: Spec) -> backends.Backend:
            if spec not in resolved:
                resolved[spec] = backends.resolve(self.backend, spec)
            return resolved[spec]

        self._table = TensorTable(self.rule, resolve)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step: one launch for every (device, dtype) of the parameters.

        Args:
            closure: re-evaluates the model and returns the loss, which is returned.

        Raises:
            TypeError, ValueError, RuntimeError: naming the parameter or the hyperparameter; nothing was written.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups if type(self.param_groups) is list else list(self.param_groups)
        hypers = self.rule.hypers(groups)
        keys = self._table.refresh(groups, self.state, hypers)
        if keys:
            self._table.launch(self.rule.rows(hypers, keys))
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group. As torch's, and a bad parameter or hyperparameter is an error here, by name."""
        checkpoint.adopt_group(param_group, self.defaults)
        before = len(self.param_groups)
        known = {id(p) for group in self.param_groups for p in group["params"]}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.rule.hypers([group])
            for k, p in enumerate(group["params"]):
                what = label(group, before, k)
                if id(p) in known:
                    raise ValueError(f"{what} of shape {tuple(p.shape)} is given twice: each parameter has one place")
                known.add(id(p))
                check_parameter(p, what)
            check_disjoint(
                Extent(p.detach(), label(own, g, k))
                for g, own in enumerate(self.param_groups)
                for k, p in enumerate(own["params"])
            )
        except BaseException:
            del self.param_groups[before:]
            raise

    def state_dict(self) -> dict[str, Any]:
        """As torch's, whose Adam, AdamW and SGD load it. Step counts are copies, not views of the table's vector."""
        return checkpoint.export(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class, or of torch's. Tensors are copied; states keep their stored precision.

        A key that a saved group lacks keeps the live group's value. `decoupled_weight_decay=False` means
        `decay="l2"`. A momentum buffer without a step count counts as started. Narrower states are widened, which is
        exact; a state that would have to be narrowed is an error.

        Raises:
            ValueError, TypeError: naming what does not fit; the optimizer is as it was.
        """
        checkpoint.load(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        packed: dict[str, Any] = super().__getstate__()
        packed["state"] = checkpoint.with_own_counts(packed["state"])
        packed["backend"] = self.backend
        return packed

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("backend", "auto")
        self.__dict__.setdefault("_warned_of_export", False)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self._new_table()


class AdamW(_Decoupled):
    r"""Adam with decoupled weight decay, in every form the literature has, in one launch.

    With :math:`a = \eta\alpha` (schedule multiplier times learning rate):

    .. math::
        m &\leftarrow \beta_1 m + (1-\beta_1) g \qquad v \leftarrow \beta_2 v + (1-\beta_2) g^2 \\
        \theta &\leftarrow \theta - \Big(\lambda' \theta
            + \frac{a}{1-\beta_1^t}\,\frac{m}{\sqrt{v/(1-\beta_2^t)} + \epsilon}\Big)

    ====================  =====================================================================================
    ``decay``             where :math:`\lambda` enters
    ====================  =====================================================================================
    ``"lr_scaled"``       :math:`\lambda' = \eta\alpha\lambda`: torch.optim.AdamW (the default)
    ``"independent"``     :math:`\lambda' = \eta\lambda`: the paper's AdamW, Algorithm 2
    ``"l2"``              :math:`g \leftarrow g + \lambda\theta`, :math:`\lambda' = 0`: torch.optim.Adam
    ``"proximal"``        the whole step is divided by :math:`1 + \eta\lambda`: ProxAdam
    ``"metric_proximal"`` the prox of :math:`\frac{\lambda}{2}\|\theta\|^2` in Adam's own metric
    ====================  =====================================================================================

    Decay and update are summed before they are rounded into the parameter once. Parameters may be float64, float32,
    bfloat16, float16 or complex, of any shape and dense layout; gradients have the parameter's dtype, or are float32
    beside 16-bit parameters, or 16-bit beside float32 ones. ``exp_avg`` and ``exp_avg_sq`` are float32 (float64 for
    float64) also for 16-bit parameters, where torch keeps them in the parameter's dtype.

    Args:
        params: parameters, named parameters, or dicts of parameter groups.
        lr: learning rate :math:`\alpha \ge 0`; a number or a tensor of one element. 0 freezes the weights of a group
            in every mode, while its moments advance.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1).
        eps: :math:`\epsilon \ge 0`.
        weight_decay: :math:`\lambda \ge 0`.
        amsgrad: keep the largest second moment (Reddi et al., 2018).
        maximize: ascend.
        decay: the form of weight decay, see above.
        eta: the schedule multiplier :math:`\eta \ge 0`, kept in each group as ``group["eta"]``.
        backend: "auto", "cpu" or "reference"; all give the same bits. One that is not there is an error.
        foreach, fused: tolerated, and kept in the groups, for torch's callers: there is one implementation.
        capturable, differentiable: must be False.

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
    Zhuang et al., "Understanding AdamW through Proximal Methods and Scale-Freeness", TMLR 2022, section 3.
    """

    rule = ADAMW

    def __init__(
        self,
        params: ParamsT,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Number = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decay: str = "lr_scaled",
        eta: Number = 1.0,
        backend: str = "auto",
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decay": decay,
            "eta": eta,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, backend)


class SGDW(_Decoupled):
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
        eta, backend, foreach, fused, differentiable: as in :class:`AdamW`.

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
        decay: str = "lr_scaled",
        form: str = "torch",
        eta: Number = 1.0,
        backend: str = "auto",
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "decay": decay,
            "form": form,
            "eta": eta,
            "foreach": foreach,
            "fused": fused,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, backend)
