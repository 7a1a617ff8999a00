"""torch's Optimizer contract, once: groups, the way of a step, saving and loading."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from difflib import get_close_matches
from functools import cache, partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from . import averaging, backends, live, master_weights, memory_report, native, references
from . import state_dict as state_dicts
from .accumulation import Accumulators
from .caller import warn
from .changes import Change, Marks, check_model
from .clipping import Clipping, Limits
from .epilogues import CHANGES, STATISTICS
from .flat.states import FlatGradients
from .rules import AVERAGE, FLAG, GIVEN, LIMIT, REFERENCE, TO, Hyper, Rule, check_chosen, flag, pair, state_dtype_word
from .schedules import stepping
from .schedules.shapes import named
from .sharding import local
from .statistics import Statistics, checked_every
from .table import TensorTable
from .validation import Extent, check_disjoint, check_parameter, has_memory, label, meeting

__all__ = ["DecoupledOptimizer", "plain_tensors"]


#: Keys of others' in groups that look like ours.
OTHERS = ("no_weight_decay", "scheduler", "base_lrs", "initial_lrs")


#: Why something cannot be asked for while gradients are released.
RELEASED = (
    "gradients are released, so that the first parameters are stepped, and their gradients gone, before the last "
    "gradient is there. release_gradients(clip_value=, clip_block_norm=) limits the gradients of each block"
)


class DecoupledOptimizer(Optimizer):
    """A torch.optim.Optimizer that steps all its parameters through one table."""

    rule: Rule
    _warned_of_scheduler = False
    _corrected = False  # was some group made with that decay mode?
    release: Any = None  # a GradientRelease, while there is one
    _swapped: averaging.Swapped | None = None  # while parameters hold their averages
    _statistics: Statistics | None = None  # while steps are measured
    _marks: Marks | None = None  # while changes are tracked
    #: The loss of the next step, for `skip_spikes`: a number or a tensor of one element, the same in all processes.
    latest_loss: Any = None

    def __init__(
        self,
        params: ParamsT,
        backend: str,
        max_grad_norm: float | None,
        skip_nonfinite: bool,
        skip_spikes: float | None,
        spike_window: int,
        capturable: bool,
        track_changes: bool,
        **defaults: Any,
    ) -> None:
        defaults = {**stepping.DEFAULTS, **defaults}
        self._capturable = flag("capturable", capturable, "the arguments")
        if self.rule.torch.capturable:
            defaults["capturable"] = self._capturable
        _refuse_flags(defaults, "")
        backends.check(backend)
        self.backend = backend
        self._make_plain(defaults, "the arguments")
        self._given = references.taken(defaults)  # to the groups of the constructor that are given no others
        self.rule.hypers([defaults], where="the arguments")
        stepping.check(defaults, "the arguments")
        if defaults["schedule"] is not None and defaults["eta"] != 1:
            raise ValueError(f"eta={defaults['eta']!r} with a schedule, which sets it: allowed is one of them")
        self._clipping = Clipping()
        self._clipping.set(max_grad_norm, skip_nonfinite, skip_spikes, spike_window, "the arguments")
        self._accumulators = Accumulators()
        self._marks = Marks() if flag("track_changes", track_changes, "the arguments") else None
        self._references: dict[Tensor, Tensor] = {}
        super().__init__(params, defaults)
        self._given = None
        self._check_overlaps(0)
        self._new_table()

    def _new_table(self) -> None:
        if "_table" in self.__dict__:
            self._settle()
        # No reference to this optimizer: what is dropped is freed at once, not when the garbage collector comes.
        self._table = TensorTable(self.rule, cache(partial(backends.resolve, self.backend)))
        self._table.capturable = self._capturable
        self._table.references = self._references
        self._flat_gradients = FlatGradients()
        self._clipping.last = None

    # One native call already, nothing to trace; spelled as torch.optim does, since torch.compiler.disable would import
    # dynamo with this package.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step: one launch for every (device, dtype) of the parameters.

        Args:
            closure: re-evaluates the model and returns the loss, which is returned.

        Raises:
            TypeError, ValueError, RuntimeError: naming the parameter or the hyperparameter; nothing was written.
        """
        loss, lives = None, None
        self._refuse_swapped("step()")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups if type(self.param_groups) is list else list(self.param_groups)
        table = self._table
        self._refuse_within_step("step()")
        if self.release is not None:
            if self.__dict__.get("grad_scale") is not None or self.__dict__.get("found_inf") is not None:
                raise RuntimeError(f"grad_scale and found_inf, of a GradScaler: {RELEASED}")
            self._clipping.last = None
            ticks = self.release.finish()
        else:
            with table.lock, plain_tensors(table.sharded):
                self._settle()
                table.accumulated = None
                if self._accumulators.full:
                    self._take_accumulated(groups)
                ticks, lives = self._take_step(groups, loss)
        if (ticks or lives or self._corrected) and not self._warned_of_scheduler:
            self._warn_of_scheduler(groups)
        return loss

    def _take_step(
        self, groups: list[dict[str, Any]], loss: Any
    ) -> tuple[Sequence[stepping.Tick], list[live.Live] | None]:
        clipping, table, mode, lives = self._clipping, self._table, self.defaults["decay"], None
        skips = clipping.skip_nonfinite or clipping.sigma is not None or "found_inf" in self.__dict__
        device = table.counts_on(groups) if skips or table.capturable else None
        ticks: Sequence[stepping.Tick] = ()
        if device is None:
            hypers = self.rule.hypers(groups, default=mode)
        else:
            captures = table.capturable and backends.capturing(device)
            hypers, lives = live.read(self.rule, groups, device, mode, table.capturable, captures)
        limits = self._limits(hypers, loss)
        if device is None:
            hypers, ticks = stepping.follow(groups, hypers)
        self._clipping.last = None  # of a step that fails nothing is known
        measures, marks = self._statistics, self._marks
        watches = (
            *((STATISTICS,) if measures is not None and measures.due else ()),
            *((CHANGES,) if marks is not None else ()),
        )
        table.watches, table.marks = watches, marks
        if measures is not None:
            measures.fresh = False
        table.step(groups, self.state, hypers, ticks, limits, lives)
        self._settle()
        if measures is not None:
            captured = bool(table.norms.captured)
            measures.take(table.watched, table.params, table.places, groups, table.active, captured)
        self._clipping.last = table.norms.limits
        if self.latest_loss is not None:
            self.latest_loss = None
        return ticks, lives

    def _limits(self, hypers: Sequence[Hyper], loss: Any) -> Limits | None:
        """What this step makes of the norm of the gradients, and of what torch.amp.GradScaler has left here."""
        given, own = self.__dict__, [settings[0].max_grad_norm for settings in hypers]
        loss = loss if self.latest_loss is None else self.latest_loss
        limits = self._clipping.of_step(own, given.get("grad_scale"), given.get("found_inf"), loss)
        if limits is not None and limits.found_inf is not None and self._table.accumulated is not None:
            limits = limits._replace(measures=True, skip_nonfinite=True)  # who has found none has not seen all
        return limits

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Does torch.amp.GradScaler leave scale and infinities to `step()`? As torch's classes where they are fused.

        Where nobody has asked for it, the scaler unscales by itself, and so do those who clip by themselves (Lightning
        refuses to clip for an optimizer that says True).
        """
        asked = self._clipping.asked or bool(self._accumulators.full)
        return bool(self.defaults.get("fused")) or self._table.capturable or asked

    @property
    def max_grad_norm(self) -> float | None:
        """The largest norm of all gradients together; None: they are not clipped. It may be set between steps."""
        return self._clipping.max_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self._set_limits(max_grad_norm=value)

    @property
    def skip_nonfinite(self) -> bool:
        """Is a step skipped whose gradients have an infinity or a NaN? It may be set between steps."""
        return self._clipping.skip_nonfinite

    @skip_nonfinite.setter
    def skip_nonfinite(self, value: bool) -> None:
        self._set_limits(skip_nonfinite=value)

    @property
    def skip_spikes(self) -> float | None:
        """So many deviations above the mean of the last ones a norm or a loss skips the step. It may be set between."""
        return self._clipping.sigma

    @skip_spikes.setter
    def skip_spikes(self, value: float | None) -> None:
        self._set_limits(skip_spikes=value)

    @property
    def spike_window(self) -> int:
        """How many of the last norms and losses are looked at; another number forgets those that were seen."""
        return self._clipping.window

    @spike_window.setter
    def spike_window(self, value: int) -> None:
        if value != self.spike_window:
            self._set_limits(spike_window=value)
            self._table.window.seen.zero_()

    def _set_limits(self, **changes: Any) -> None:
        names = ("max_grad_norm", "skip_nonfinite", "skip_spikes", "spike_window")
        settings = {name: getattr(self, name) for name in names} | changes
        asked = Clipping(last=self._clipping.last)
        asked.set(**settings, where="the optimizer")
        if asked.asked and self.release is not None:
            raise RuntimeError(f"{', '.join(f'{name}={value!r}' for name, value in changes.items())}: {RELEASED}")
        self._refuse_captured(f"{next(iter(changes))} is set")
        self._clipping = asked

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients of the last step, unscaled and not clipped: float64 []; None: it was not asked for.

        A copy, which later steps do not change.
        """
        last = self._clipping.last
        return self._table.norms.found[0].clone() if last is not None and last.measures else None

    @property
    def group_grad_norms(self) -> Tensor | None:
        """The same of the gradients of every group: float64 [groups]."""
        last = self._clipping.last
        if last is None or not last.measures:
            return None
        return self._table.norms.of_groups(self._table.control)

    @property
    def skipped(self) -> Tensor:
        """Was the last step skipped? bool []; a copy."""
        norms = self._table.norms
        if self._clipping.last is None and norms.bank is None:
            return torch.tensor(False, device="cpu")
        return norms.found[1] != 0

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def accumulate(self) -> None:
        """Adds the gradients of all parameters to accumulators in float32, and drops them: `step()` takes these.

        accumulator = accumulator + g, or g where nothing is in it yet: float32 for 16-bit and float32 parameters, of
        the parameter's dtype for float64 and complex ones, of its layout and sharding. It is a launch for every
        (device, dtype), which also adds up the squares of the sums, so that `max_grad_norm` needs no other pass.
        `p.grad` becomes None; flat gradients (`flatten_`) become zeros, where they lie. What is left in `p.grad` when
        `step()` is called is added first: the last micro-batch may be left to it. A step, taken or skipped, empties the
        accumulators; their memory stays until `discard_accumulated()`. Checkpoints do not have them.

        Raises:
            TypeError, ValueError, RuntimeError: naming the parameter; nothing was added.

        Example:
            >>> import torch, wd_kernels
            >>> w = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
            >>> opt = wd_kernels.SGDW([w], lr=1.0)
            >>> for micro_batch in (1.0, 0.00390625, 0.00390625):  # in bfloat16 the latter would be lost
            ...     (w * micro_batch).sum().backward()
            ...     opt.accumulate()
            >>> [t.tolist() for t in opt.accumulated_grads.values()], w.grad
            ([[1.0078125, 1.0078125]], None)
            >>> opt.step()
        """
        if self.release is not None:
            raise RuntimeError(
                "accumulate() while gradients are released: they are stepped as they come. Allowed is "
                "`with release.accumulating():`, which adds them up in p.grad"
            )
        self._refuse_within_step("accumulate()")
        self._refuse_swapped("accumulate()")
        with self._table.lock, plain_tensors(True):
            self._settle()
            self._accumulators.add(self.param_groups, self.backend, self._flat_gradients)

    def _settle(self) -> None:
        """A step may have taken what was accumulated, whatever interrupted it: then nothing is in it any more."""
        table = self._table
        if table.accumulated is not None and table.accumulated.taken:
            self._accumulators.clear()
            table.accumulated = None

    def _refuse_within_step(self, what: str) -> None:
        if self._table.lock._is_owned():  # type: ignore[attr-defined]
            raise RuntimeError(
                f"{what} was called within a step of the same optimizer, by a signal's handler, a callback of the "
                "garbage collector or a schedule: it cannot be taken there"
            )

    def _take_accumulated(self, groups: Sequence[dict[str, Any]]) -> None:
        """A step has it in the place of gradients: those that are left are added first."""
        if "found_inf" in self.__dict__:
            self._check_scaled()
        self._accumulators.add(groups, self.backend, self._flat_gradients)
        self._table.accumulated = self._accumulators.in_place_of_gradients()

    def _check_scaled(self) -> None:
        """Raises where a GradScaler would make no sense of gradients that were accumulated."""
        given = self.__dict__
        if given["found_inf"] is not None and given.get("grad_scale", given) is None:
            raise RuntimeError(
                "gradients are accumulated, which a GradScaler's unscale_() has not unscaled: leave it out. The step "
                "unscales them, and max_grad_norm clips them"
            )
        if type(given["found_inf"]) is int:  # the sum of no tensors
            raise RuntimeError(
                "all gradients are accumulated, and a GradScaler wants to see some: leave the last micro-batch's to "
                "step(), which adds them"
            )

    @property
    def accumulated_grads(self) -> dict[Tensor, Tensor]:
        """What `accumulate()` has added up since the last step, by parameter: to be summed over processes, say.

        They may be written. Since nobody knows when, norms take a pass of their own once they were asked for.
        """
        self._settle()
        self._accumulators.lent = True
        return {p: self._accumulators.of[p] for p in self._accumulators.full}

    def discard_accumulated(self) -> None:
        """Forgets what `accumulate()` has added up, and frees the memory."""
        self._table.accumulated = None
        self._accumulators = Accumulators()

    def end_captures(self) -> None:
        """Tells that no graph is replayed any more in which steps were captured (`capturable=True`).

        Until then the optimizer keeps all memory that they read and write, so it must be kept itself, and what would
        leave them behind is an error: loading a state, other groups, other limits.
        """
        self._table.norms.end_captures()

    def _refuse_captured(self, what: str) -> None:
        if self._table.norms.captured:
            raise RuntimeError(
                f"{what}, and a step of this optimizer was captured in a graph, whose replays would go on with what "
                "was there: do it before the capture, or call end_captures() when no graph is replayed any more"
            )

    def _warn_of_scheduler(self, groups: list[dict[str, Any]]) -> None:
        index = stepping.moved_uncorrected(groups) if self._corrected else None
        if index is not None:
            self._warned_of_scheduler = True
            warn(
                f"an LR scheduler moves lr in param group {index}, whose decay='corrected' is 'lr_scaled' while eta "
                "stays 1: schedule='from_lr' makes it follow the LR scheduler"
            )
            return
        index = stepping.moved_beside(groups)
        if index is not None:
            self._warned_of_scheduler = True
            warn(
                f"an LR scheduler moves lr in param group {index} beside schedule={named(groups[index]['schedule'])}: "
                "the two are multiplied. Give the optimizer one of them; schedule='from_lr' follows the LR scheduler"
            )

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. Flat gradients that are kept are zeroed in one go."""
        self._settle()
        if self._accumulators.full:
            raise RuntimeError(
                "zero_grad() while gradients are accumulated that no step has taken: accumulate() has dropped those of "
                "its micro-batch already. Call step(), or discard_accumulated() to lose them"
            )
        if self.release is not None:
            self.release.zero_grad()
        if set_to_none or not self._flat_gradients.zero_([p for group in self.param_groups for p in group["params"]]):
            super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group. As torch's, and a bad parameter or hyperparameter is an error here, by name."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group is a {type(param_group).__name__}: expected a dict")
        if self.release is not None:
            raise RuntimeError("a group is added while gradients are released: remove() the release, and make another")
        if "_table" in self.__dict__:
            self._refuse_captured("a group is added")
        if not isinstance(param_group.get(TO), (str, type(None))):
            param_group = dict(param_group)  # of which the caller's keeps its tensors
        if isinstance(param_group.get("params"), Iterator):
            param_group["params"] = list(param_group["params"])
        index, given = len(self.param_groups), dict(param_group)
        try:
            _name_empty_groups([*self.param_groups, param_group])
            self._make_plain(param_group, f"param group {index}")
            given_to = references.taken(param_group)
            given_to = self._given if TO not in param_group else given_to
            asked = dict(param_group)
            try:
                super().add_param_group(param_group)
            except ValueError:
                self._check_repeats(param_group, index, {id(p) for own in self.param_groups for p in own["params"]})
                raise
            group = self.param_groups[-1]
            _refuse_flags(group, f" in param group {index}")
            if bool(group.get("capturable", self._capturable)) != self._capturable:
                raise ValueError(
                    f"capturable={group['capturable']!r} in param group {index}, of an optimizer with "
                    f"capturable={self._capturable}: allowed is what all groups have"
                )
            group["decay"] = self.rule.mode_of(asked, self.defaults["decay"])
            self._corrected |= group["decay"] == "corrected"
            self.rule.hypers([group], first=index)
            check_chosen(group["weight_decay"], group["decay"], group["lr"], f"param group {index}")
            stepping.adopt(group, asked, self.param_groups[:index], f"param group {index}")
            state_dicts.settle(self.rule, group, self.defaults["decay"])
            self._check_repeats(group, index, set())
            for k, p in enumerate(group["params"]):
                if p.requires_grad and not is_lazy(p):  # what is not trained may be anything
                    check_parameter(p, label(group, index, k))
            found = {} if given_to is None else references.matched(self.rule, group, index, given_to)
            if group.get(TO) == GIVEN and given_to is None:
                self._require_references(group, index)
            if "_table" in self.__dict__:  # the constructor checks all groups at once
                self._check_overlaps(index)
            self._warn_of_typos(asked, index)
            self._references.update(found)
        except BaseException:
            undo = [partial(param_group.clear), partial(param_group.update, given)]  # the caller's, to be tried again
            native.insist([partial(self.param_groups.__delitem__, slice(index, None)), *undo])
            raise

    def _require_references(self, group: Mapping[str, Any], index: int) -> None:
        for k, p in enumerate(group["params"]):
            if p not in self._references and REFERENCE.name not in self.state.get(p, ()):
                raise ValueError(
                    f"decay_to='given' in param group {index}, and {label(group, index, k)} has no tensor that it "
                    "decays to: give decay_to= of the group, one tensor for each of its parameters, or None"
                )

    def _make_plain(self, settings: dict[str, Any], where: str) -> None:
        """Numbers and words, as checkpoints hold them, of what is an array, a dtype, or a list of a configuration."""
        if "state_dtype" in settings:
            names = [state.name for state in self.rule.states]
            settings["state_dtype"] = state_dtype_word(settings["state_dtype"], names, where)
        if isinstance(kept := settings.get(AVERAGE), Real) and not isinstance(kept, bool):
            settings[AVERAGE] = float(kept)
        if isinstance(dtype := settings.get("ema_dtype"), torch.dtype):
            settings["ema_dtype"] = str(dtype).removeprefix("torch.")
        if isinstance(word := settings.get("master_weights"), bool):
            settings["master_weights"] = "float32" if word else "none"
        for own in self.rule.hyperparameters:
            if own.parts and own.name in settings:
                settings[own.name] = pair(own.name, settings[own.name], where)

    def _warn_of_typos(self, given: Mapping[str, Any], index: int) -> None:
        known = [*self.defaults, FLAG, LIMIT, "params", "param_names", "initial_lr", "schedule_step", *OTHERS]
        for key in given:
            if key not in known and (near := get_close_matches(str(key), known, 1, 0.85)) and near[0] not in given:
                warn(f"param group {index} has a key {key!r} that nothing here reads: is {near[0]!r} meant?")

    def _check_repeats(self, group: dict[str, Any], index: int, known: set[int]) -> None:
        for k, p in enumerate(group["params"]):
            if id(p) in known:
                what = label(group, index, k)
                raise ValueError(f"{what} of shape {tuple(p.shape)} is given twice: each parameter has one place")
            known.add(id(p))

    def _check_overlaps(self, first: int) -> None:
        """Raises if a parameter of the groups from `first` on shares memory with another one.

        Of those before them, only such are looked at as lay near when they were added; the rest is for the next step.
        """
        new = {}
        for g, group in enumerate(self.param_groups[first:], first):
            for k, p in enumerate(group["params"]):
                if has_memory(here := local(p)):
                    new[g, k] = Extent(here.detach(), label(group, g, k))
        known: dict[tuple[int, int], tuple[int, int]] = self.__dict__.setdefault("_spans", {})
        near = meeting(new.values(), known) if known else []
        near = [(g, k) for g, k in near if g < first and k < len(self.param_groups[g]["params"])]
        others = {(g, k): local(self.param_groups[g]["params"][k]) for g, k in near}
        old = [Extent(p.detach(), label(self.param_groups[g], g, k)) for (g, k), p in others.items() if has_memory(p)]
        check_disjoint([*old, *new.values()])
        known.update((at, extent.span()) for at, extent in new.items())

    def state_dict(self) -> dict[str, Any]:
        """As torch's, whose Adam, AdamW and SGD load it. Step counts are copies, not views of the table's vector."""
        self._refuse_swapped("state_dict()")
        hooks = self._optimizer_state_dict_post_hooks
        self._optimizer_state_dict_post_hooks = OrderedDict()  # they see what is exported
        try:
            mode = self.defaults["decay"]
            packed = state_dicts.export(self.rule, super().state_dict(), self.param_groups, mode)
        finally:
            self._optimizer_state_dict_post_hooks = hooks
        for hook in hooks.values():
            changed = hook(self, packed)
            packed = packed if changed is None else changed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any], *, convert_states: bool = False) -> None:
        """Loads a state of this class, or of torch's. Tensors are copied; states keep their stored precision.

        Args:
            convert_states: round states to nearest even that were saved in more bits than the `state_dtype` of this
                optimizer has, and store master weights as its `master_weights` says, which writes the parameters too
                (a saved remainder is one of them as they are now: load the model's first). Without it, both are errors.

        A saved `weight_decay` is loaded where it means the same: where decay mode, form and whether it is normalised
        are the live ones, or where it is 0. Else the live decay stays, and a warning says so; momentum buffers of the
        other form are carried over by the lr of the next step. Of what torch's class lacks, an absent key means what
        that does (`eta` 1, say); any other key that a saved group lacks keeps the live value. A momentum buffer without
        a step count counts as started. Narrower states are widened to this optimizer's `state_dtype`, which is exact.
        How states are stored and rounded is the live group's, and so are limits of gradients; a `seed` that was saved,
        which 0 is not, is loaded.

        Raises:
            ValueError, TypeError: naming what does not fit, or what was given instead of an optimizer's state; the
                optimizer is as it was.
        """
        self._refuse_captured("a state is loaded")
        self._refuse_swapped("load_state_dict()")
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            if changed is not None:
                state_dict = changed
        groups, state, flat, masters = state_dicts.load(
            self.rule, self.param_groups, state_dict, self.defaults["decay"], convert_states
        )
        references.retained(groups, self.state, state)
        self.__setstate__({"state": state, "param_groups": groups})
        self._table.flat_states = flat
        master_weights.put(self.state, flat, masters)
        self._written(p for p, *_ in masters)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def memory_report(self) -> memory_report.MemoryReport:
        """The bytes of parameters, gradients, states and masters in this process, beside torch's; `print` it.

        Of all parameters, whether they have been stepped yet or not; and of what `accumulate()` keeps.

        Example:
            >>> import torch, wd_kernels
            >>> w = torch.ones(1000, dtype=torch.bfloat16, requires_grad=True)
            >>> opt = wd_kernels.AdamW([w], state_dtype="param", master_weights="split24")
            >>> print(opt.memory_report())
            role          stored as  bytes  a parameter  torch.optim.AdamW
            parameters    bfloat16   2,000         2.00               2.00
            gradients     bfloat16   2,000         2.00               2.00
            exp_avg       bfloat16   2,000         2.00               2.00
            exp_avg_sq    bfloat16   2,000         2.00               2.00
            master_param  int8       1,000         1.00               0.00
            step counts   float32        4         0.00               0.00
            total                    9,004         9.00               8.00
        """
        own = self._accumulators.of
        return memory_report.report(self.rule, self.param_groups, self.defaults["decay"], own)

    def get_master_weights(self) -> dict[str | int, Tensor]:
        """Copies of all weights as they are stepped, by name: in float32, whatever 16-bit parameters have beside them.

        Returns:
            Of each parameter its master weight, or itself in float32 where it has none (float64 and complex ones in
            their dtype); by its position among all where the optimizer was given no names. Of a DTensor, a DTensor.

        Example:
            >>> import torch, wd_kernels
            >>> w = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
            >>> opt = wd_kernels.SGDW([("w", w)], lr=1e-3, master_weights="split32")
            >>> w.grad = torch.ones_like(w)
            >>> opt.step()
            >>> w.tolist(), [round(x, 4) for x in opt.get_master_weights()["w"].tolist()]
            ([1.0, 1.0], [0.999, 0.999])
        """
        self._refuse_swapped("get_master_weights()")
        return master_weights.get(self.param_groups, self.state)

    def load_master_weights(self, weights: Mapping[str | int, Tensor] | None = None) -> None:
        """Writes all weights: master weights, and the parameters as their rounding to nearest even.

        Frozen parameters are written too, and given no master. To change a group's `master_weights` in the midst of a
        run: `weights = opt.get_master_weights()`, change it, `opt.load_master_weights(weights)`.

        Args:
            weights: by name, as `get_master_weights` gives them, in what is exact in float32 (float64 for float64
                parameters). None: the parameters as they are now, which is for who wrote these by hand.

        Raises:
            KeyError, TypeError, ValueError: naming the parameter; nothing was written.
        """
        self._refuse_swapped("load_master_weights()")
        with self._table.lock:
            masters = master_weights.chosen(self.param_groups, weights)
            planned = master_weights.planned(self.rule, self.param_groups, masters)
            master_weights.put(self.state, self._table.flat_states, planned)
            self._written(p for p, *_ in planned)

    def swap_ema(self, model: nn.Module | None = None) -> AbstractContextManager[None]:
        """Puts the averages (`ema_decay`) in the place of the parameters, rounded to nearest even; to evaluate them.

        `with opt.swap_ema():` puts the parameters back at its end; a call alone does until :meth:`swap_ema_back`. What
        they held is kept meanwhile, a copy of each that is averaged; those that no step has taken yet are their own
        averages. Master weights and states stay, and so do buffers. Meanwhile no step is taken, and nothing is saved or
        loaded.

        Args:
            model: whose parameters they are, where these are DTensors: what `fully_shard` has gathered of them before
                is dropped, and again when they are put back.

        Raises:
            RuntimeError: no group has an `ema_decay`, or the averages are there already.
            TypeError: the parameters are DTensors, and no model is given.

        Example:
            >>> import torch, wd_kernels
            >>> w = torch.nn.Parameter(torch.ones(2))
            >>> opt = wd_kernels.SGDW([w], lr=0.5, ema_decay=0.5)
            >>> w.grad = torch.ones(2)
            >>> opt.step()
            >>> with opt.swap_ema():
            ...     w.tolist()
            [0.75, 0.75]
            >>> w.tolist()
            [0.5, 0.5]
        """
        self._refuse_within_step("swap_ema()")
        self._refuse_swapped("swap_ema()")
        with self._table.lock, plain_tensors(True):
            self._swapped = averaging.Swapped(self.param_groups, self.state, model)
        return _BackAtItsEnd(self)

    def swap_ema_back(self) -> None:
        """Puts the parameters back that `swap_ema` has put averages in the place of.

        Raises:
            RuntimeError: there are none.
        """
        if self._swapped is None:
            raise RuntimeError("swap_ema_back() while the parameters hold themselves: swap_ema() comes before it")
        with self._table.lock, plain_tensors(True):
            native.insist([self._swapped.back, partial(self.__dict__.pop, "_swapped", None)])

    def _refuse_swapped(self, what: str) -> None:
        if self._swapped is not None:
            raise RuntimeError(
                f"{what} while the parameters hold their averages: call swap_ema_back() before it, or leave the "
                "`with opt.swap_ema():`"
            )

    def ema_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """`model.state_dict()` with averages (`ema_decay`) in the place of the parameters that have one, by name.

        Averages are float32 for 16-bit parameters, whatever they are stored in (float64 and complex ones as these);
        `load_state_dict` rounds them. Of a DTensor, a DTensor. Parameters that have none yet, or are another
        optimizer's, are themselves. As in `model.state_dict()` these are the tensors themselves where they are stored
        so: later steps change them, and who keeps them clones them.

        Args:
            model: whose parameters this optimizer steps; it may be wrapped.

        Raises:
            ValueError: none of its parameters is averaged.

        Example:
            >>> import torch, wd_kernels
            >>> model = torch.nn.Linear(1, 1)
            >>> opt = wd_kernels.AdamW(model.parameters(), ema_decay=0.999)
            >>> list(opt.ema_state_dict(model))
            ['weight', 'bias']
        """
        self._refuse_within_step("ema_state_dict()")
        with self._table.lock, plain_tensors(True):
            return averaging.by_name(model, self.param_groups, self.state)

    def load_ema_state_dict(self, model: nn.Module, averages: Mapping[str, Tensor]) -> None:
        """Writes the averages: what `ema_state_dict` gave, or the `state_dict()` of torch's AveragedModel, or timm's.

        Args:
            model: whose names these are.
            averages: by name, whatever wrappers have put before it; what is no average of this optimizer, such as
                buffers, is not read.

        Raises:
            KeyError, TypeError, ValueError: a name that the model does not have, or one that is missing, another shape,
                a dtype that is not exact in the arithmetic type; an `ema_decay` by which the next step would keep
                nothing of it, or a mean of another number of weights; nothing was written.
        """
        self._refuse_within_step("load_ema_state_dict()")
        self._refuse_swapped("load_ema_state_dict()")
        with self._table.lock, plain_tensors(True):
            found = averaging.chosen(model, self.param_groups, self.state, averages)
            averaging.put(self.rule, self.param_groups, self.state, self._table.flat_states, found)

    def statistics(self, every: int | None = 1, model: nn.Module | None = None) -> Statistics:
        """Measures the next step, and every so many after it: norms of gradients, parameters and what changes of them.

        The pass that steps a tensor adds them up; other steps pay nothing. Sums have the same bits on every backend.

        Args:
            every: how many steps apart; None ends it.
            model: whose names parameters have there; by default those that the optimizer was given, or their places.

        Returns:
            What is measured, the same object for all steps until this is called again: `print(stats)`,
            ``stats.scalars()`` for a logger, ``stats.tensors.grad_norm`` and others as tensors, ``stats.plot(path)``.

        Raises:
            TypeError, ValueError: `every` is no number of steps.
            RuntimeError: gradients are released, whose steps are apart.

        Example:
            >>> import torch, wd_kernels
            >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
            >>> opt = wd_kernels.SGDW([("w", w)], lr=0.5)
            >>> stats = opt.statistics(every=100)
            >>> w.grad = torch.tensor([6.0, 8.0])
            >>> opt.step()
            >>> stats.tensors.grad_norm.tolist(), stats.tensors.update_norm.tolist()
            ([10.0], [5.0])
        """
        self._refuse_within_step("statistics()")
        if self.release is not None and every is not None:
            raise RuntimeError("statistics() while gradients are released: each block has a step of its own")
        kept = Statistics(self.param_groups, 1 if every is None else checked_every(every), check_model(model))
        if self._statistics is not None:
            self._statistics.fresh = False  # it measures no more
        self._statistics = None if every is None else kept
        return kept

    @property
    def track_changes(self) -> bool:
        """Do steps mark which elements of the parameters they change (`changes`)? It may be set between steps."""
        return self._marks is not None

    @track_changes.setter
    def track_changes(self, value: bool) -> None:
        if flag("track_changes", value, "the optimizer") == self.track_changes:
            return
        if value and self.release is not None:
            raise RuntimeError("track_changes=True while gradients are released: each block has a step of its own")
        self._refuse_captured("track_changes is set")
        self._marks = Marks() if value else None

    def changes(self, model: nn.Module | None = None, *, clear: bool = True) -> dict[str | int, Change]:
        """What steps have changed since the last call, or since `track_changes` was set: which elements, and to what.

        An element is there if some step has changed its bits in memory: of a 16-bit parameter with a master weight,
        those of the parameter itself. Where others have written a parameter, by `load_master_weights` or by putting it
        elsewhere (``p.data =``, after its first step), all of it is there; what is written into it by hand, or by
        ``model.load_state_dict``, is not seen. Who applies changes begins with a copy of all weights from when
        `track_changes` was set. This waits for the device.

        Args:
            model: whose names parameters have there; by default those that the optimizer was given, or their positions.
            clear: forget them: who could not send them asks again without it.

        Returns:
            Of each parameter that has changed its :class:`wd_kernels.Change`; ``wd_kernels.apply_changes`` writes them
            into a copy. Of a DTensor, what of it lies in this process.

        Raises:
            RuntimeError: changes are not tracked.
            KeyError: a parameter is none of the model's.
            ValueError: two parameters have one name.

        Example:
            >>> import torch, wd_kernels
            >>> w = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
            >>> opt = wd_kernels.SGDW([("w", w)], lr=0.5, track_changes=True)
            >>> w.grad = torch.tensor([0.0, 1.0, 2.0**-10, 0.0], dtype=torch.bfloat16)
            >>> opt.step()
            >>> [(c.index.tolist(), c.values.tolist()) for c in opt.changes().values()]
            [([1], [0.5])]
            >>> opt.changes()
            {}
        """
        self._refuse_within_step("changes()")
        self._refuse_swapped("changes()")
        if self._marks is None:
            raise RuntimeError("changes() of an optimizer that does not track them: expected track_changes=True before")
        with self._table.lock, plain_tensors(True):
            return self._marks.take(self.param_groups, model, clear)

    def _written(self, params: Iterable[Tensor]) -> None:
        """Somebody else than a step has written these."""
        if self._marks is not None:
            self._marks.all_changed(params)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_swapped("a copy is made")
        packed: dict[str, Any] = super().__getstate__()
        packed["state"] = state_dicts.with_own_counts(packed["state"])
        # multiprocessing hands these to the process that it starts, which is after this has returned.
        self._handed_over = [own["step"] for own in packed["state"].values() if isinstance(own, dict) and "step" in own]
        packed["backend"] = self.backend
        packed["param_groups"] = [state_dicts.with_own_schedule(group) for group in packed["param_groups"]]
        packed["_capturable"] = self._capturable
        packed["_references"] = self._references
        packed["track_changes"] = self.track_changes
        own = self._clipping
        packed["clipping"] = {name: getattr(own, name) for name in ("max_norm", "skip_nonfinite", "sigma", "window")}
        return packed

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("backend", "auto")
        self.__dict__.setdefault("_capturable", False)
        if self.__dict__.pop("track_changes", False):
            self._marks = Marks()
        clipping = self.__dict__.pop("clipping", {})
        self.__dict__.setdefault("_clipping", Clipping(**clipping))
        self.__dict__.setdefault("_accumulators", Accumulators())
        self.__dict__.setdefault("_given", None)
        self.__dict__.setdefault("_references", {})
        self._corrected = any(group.get("decay") == "corrected" for group in self.param_groups)
        self.defaults = {**stepping.DEFAULTS, **self.defaults}
        self.defaults.pop("schedule_step", None)  # version 0.1 had it there
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key not in ("decay", *stepping.SETTINGS, *self.rule.absent):  # absent, they mean what torch does
                    group.setdefault(key, value)
            state_dicts.settle(self.rule, group, self.defaults["decay"])
        self._new_table()


class _BackAtItsEnd(AbstractContextManager[None]):
    """Of `swap_ema`: at the end of a `with`, parameters are put back, unless they were already."""

    def __init__(self, opt: DecoupledOptimizer) -> None:
        self.opt, self.swapped = opt, opt._swapped

    def __exit__(self, *raised: object) -> None:
        if self.opt._swapped is self.swapped:
            self.opt.swap_ema_back()


def _name_empty_groups(groups: list[dict[str, Any]]) -> None:
    """Torch has all groups with names or none: one without parameters is as the others are."""

    def entries(group: Mapping[str, Any]) -> Sequence[Any] | None:
        own = group.get("params")
        return own if isinstance(own, (list, tuple)) else None

    named = any("param_names" in g or any(isinstance(own, tuple) for own in (entries(g) or ())[:1]) for g in groups)
    for group in groups:
        if named and entries(group) is not None and not entries(group):
            group.setdefault("param_names", [])


def plain_tensors(sharded: bool) -> AbstractContextManager[object]:
    """No torch function mode, such as a default device, and no class of DTensors is asked about every attribute."""
    asked = sharded or torch._C._len_torch_function_stack()
    return torch._C.DisableTorchFunction() if asked else nullcontext()


def _refuse_flags(settings: Mapping[str, Any], where: str) -> None:
    if settings.get("differentiable"):
        raise ValueError(f"differentiable=True{where} is not supported: the step writes in place, outside autograd")
