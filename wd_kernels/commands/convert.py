"""`convert`: a checkpoint's optimizer state, from one library's layout to another's.

The file may be an optimizer's state, or hold one among other entries, which stay as they are: Transformers'
``optimizer.pt``, accelerate's ``optimizer.bin``, Lightning's ``.ckpt``, ``{"model": ..., "optimizer": ...}``. A folder
of torch's distributed checkpoints is read whole. Files are read with ``weights_only=True`` (but torch unpickles what
describes a distributed checkpoint), and written beside their place and renamed, so that none is ever half written.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ..decay_conversion import convert_weight_decay
from ..printing import aligned, failed
from ..rules import DECAY_MODES, FLAG
from ..state_conversion import Library, convert_state, identified, saved_decay
from ..turns import first_line

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run"]

HELP = "a checkpoint of another library's optimizer as one of this package, and the other way"
OURS = "wd_kernels"
EXAMPLES = """examples:
  python -m wd_kernels convert checkpoint-500 ours.pt
  python -m wd_kernels convert theirs.pt ours.pt --from apex --key optimizer
  python -m wd_kernels convert theirs.pt ours.pt --from optimi --model model.safetensors
  python -m wd_kernels convert ours.pt theirs.pt --from wd_kernels --to torch --decay lr_scaled"""
LIBRARIES = get_args(Library)
#: What holds an optimizer's state in a folder: Transformers', accelerate's.
FILES = ("optimizer.pt", "optimizer.bin")
#: How a rank's part of DeepSpeed's is called.
ZERO = "_optim_states.pt"
#: Under which key checkpoints hold a model.
MODELS = ("model", "state_dict", "module", "model_state_dict")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", type=Path, help="a file, or a folder that has optimizer.pt or is a DCP")
    parser.add_argument("target", metavar="OUT", type=Path, help="the file to write")
    parser.add_argument(
        "--from", dest="source_library", choices=[OURS, *LIBRARIES, "auto"], default="auto",
        help="whose layout IN has; auto: by its keys, where they tell (default)",
    )  # fmt: skip
    parser.add_argument(
        "--to", dest="target_library", choices=[OURS, *LIBRARIES], default=OURS, help=f"default: {OURS}"
    )
    parser.add_argument("--key", help="where IN has the state, such as optimizer or optimizer_states.0, if in several")
    parser.add_argument(
        "--model", type=Path, metavar="FILE",
        help="the weights (.safetensors, or of torch.save), where what 16-bit ones lack lies beside them",
    )  # fmt: skip
    parser.add_argument(
        "--like", type=Path, metavar="FILE", help="a state of the target's optimizer, whose groups' keys OUT is to have"
    )
    parser.add_argument("--decay", choices=DECAY_MODES, help="carry the weight decay over to this mode, at each lr")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")


def run(arguments: argparse.Namespace) -> int:
    try:
        print(_converted(arguments))
    except (OSError, ValueError, TypeError, ImportError) as raised:
        which = "; --model FILE gives them" if "params=[...]" in str(raised) and arguments.model is None else ""
        return failed("convert", ValueError(f"{raised}{which}"))
    return 0


def _converted(arguments: argparse.Namespace) -> str:
    """Does all of it; returns what is to be said of it."""
    source, target, out = arguments.source_library, arguments.target_library, arguments.target
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"{out} cannot be written: it is a folder, or is in one that is not there")
    if out.exists() and not arguments.force:
        raise ValueError(f"{out} is there: --force overwrites it")
    read_from, checkpoint = _read(arguments.source)
    path = _path_of(checkpoint, arguments.key, read_from)
    saved = _at(checkpoint, path)
    if source == "auto":
        source = OURS if _is_state(saved) and _is_ours(saved) else identified(saved)
    if source == target and (source != OURS or arguments.decay is None):
        raise ValueError(f"{read_from} has the layout of {source} already")
    params = None if arguments.model is None else _params_of(saved, arguments.model)
    like = None
    if arguments.like is not None:
        _, other = _read(arguments.like)
        like = _at(other, _path_of(other, None, arguments.like))["param_groups"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = saved if source == OURS else convert_state(saved, source=source, params=params)
        carried = [] if arguments.decay is None else _carry(found, arguments.decay)
        decays = [_decay(group) for group in found["param_groups"]]
        if target != OURS:
            found = convert_state(found, target=target, params=params, groups=like)
    _write(_with(checkpoint, path, found), out)
    rows = [("", "entry", "tensors", "dtype", "bytes"), *_rows(source, saved), *_rows(target, found)]
    groups = [("group", "parameters", "lr", "weight decay", "decay mode")]
    groups += [
        (str(i), str(len(group["params"])), _number(group.get("lr")), _number(group.get("weight_decay", 0)), decay)
        for i, (group, decay) in enumerate(zip(found["param_groups"], decays, strict=True))
    ]
    lines = [f"{read_from} -> {out}: {source} -> {target}", *([f"at {'.'.join(map(str, path))}"] if path else [])]
    remarks = dict.fromkeys([*carried, *(str(one.message) for one in said)])
    return "\n".join([*lines, "", aligned(rows), "", aligned(groups), *([""] if remarks else []), *remarks])


# Files ----------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[Path, Any]:
    """(the file that was read, what it holds), on the CPU. Raises OSError, ValueError or ImportError, naming it."""
    if path.is_dir():
        there = [path / name for name in FILES if (path / name).is_file()]
        if (path / ".metadata").is_file():
            from torch.distributed.checkpoint.api import CheckpointException
            from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

            with tempfile.TemporaryDirectory() as folder:
                try:
                    dcp_to_torch_save(path, os.path.join(folder, "whole.pt"))
                except (Exception, CheckpointException) as raised:  # whatever damaged files make of it
                    raise ValueError(f"{path} is no DCP that torch reads: {first_line(raised)}") from None
                return path, _read(Path(folder) / "whole.pt")[1]
        if not there:
            for part in path.rglob(f"*{ZERO}"):
                _read(part)
            raise ValueError(f"{path} is a folder: read are those with {' or '.join(FILES)}, and torch's DCP")
        path = there[0]
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    if path.name.endswith(ZERO):
        raise ValueError(
            f"{path} is a rank's part of DeepSpeed's ZeRO, with all parameters in flat tensors, which is not read; "
            "read is the state_dict() of DeepSpeedCPUAdam and FusedAdam"
        )
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ImportError(f"{path} wants the package safetensors: pip install safetensors") from None
        try:
            return path, load_file(path)
        except OSError:
            raise
        except Exception as raised:  # its own, of a damaged file
            raise ValueError(f"{path} is no .safetensors file: {first_line(raised)}") from None
    try:
        return path, torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as raised:  # whatever a damaged file makes of the unpickler
        raise ValueError(
            f"{path} is no file of torch.save, or holds more than tensors, numbers, strings and containers, which is "
            f"not loaded, since it may run code: {first_line(raised)}"
        ) from None


def _write(checkpoint: Any, out: Path) -> None:
    """Beside its place, and renamed."""
    handle, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name[:40]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(checkpoint, file)
        mode = out.stat().st_mode if out.exists() else 0o666 & ~_umask()
        os.chmod(name, mode)
        os.replace(name, out)
    except BaseException as raised:
        os.unlink(name)
        if isinstance(raised, RuntimeError):  # torch.save's, of a disk that is full
            raise OSError(f"{out} cannot be written: {first_line(raised)}") from raised
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Where in a checkpoint ------------------------------------------------------------------------------------------------

Key = str | int


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and "param_groups" in value and "state" in value


def _paths(value: Any, above: tuple[Key, ...] = ()) -> Iterator[tuple[Key, ...]]:
    """Of all optimizers' states, three levels deep."""
    if _is_state(value) or (isinstance(value, Mapping) and "base_optimizer_state" in value):
        yield above
    elif len(above) < 3:
        inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        for key, one in inner:
            yield from _paths(one, (*above, key))


def _path_of(checkpoint: Any, key: str | None, where: Path) -> tuple[Key, ...]:
    """Where the state is. Raises ValueError where there is none, or several and no key."""
    found = list(_paths(checkpoint))
    words = {".".join(map(str, path)): path for path in found}
    if key is not None and key in words:
        return words[key]
    if key is None and len(found) == 1:
        return found[0]
    has = f"{where} has {len(found)} states of optimizers, at {', '.join(words)}"
    if not found:
        keys = f"; its keys are {', '.join(map(str, list(checkpoint)[:6]))}" if isinstance(checkpoint, Mapping) else ""
        raise ValueError(f"{where} has no state of an optimizer{keys}")
    raise ValueError(f"{has}: --key says which" if key is None else f"{has}: --key={key} is none of them")


def _at(checkpoint: Any, path: Sequence[Key]) -> Any:
    for key in path:
        checkpoint = checkpoint[key]
    return checkpoint


def _with(checkpoint: Any, path: Sequence[Key], value: Any) -> Any:
    """The checkpoint with another value there; nothing of what was read is changed."""
    if not path:
        return value
    first, *rest = path
    copy: Any = list(checkpoint) if isinstance(checkpoint, list) else dict(checkpoint)
    copy[first] = _with(checkpoint[first], rest, value)
    return copy


def _is_ours(state: Any) -> bool:
    """Has a group a key that this package alone writes? A group of ours that does what torch's class does has none."""
    return any(
        {"decay", "eta", "schedule", "master_weights", "state_dtype"} & set(own) for own in state["param_groups"]
    )


def _params_of(state: Mapping[str, Any], file: Path) -> list[Tensor]:
    """The weights of the parameters, in the order of the groups: by their names, or where there is one order alone."""
    _, model = _read(file)
    while not isinstance(model, Mapping) or not all(isinstance(value, Tensor) for value in model.values()):
        held = model if isinstance(model, Mapping) else {}
        inner = next((held[key] for key in MODELS if isinstance(held.get(key), Mapping)), None)
        if inner is None:
            raise ValueError(f"{file} has no model: expected its state_dict(), alone or under {', '.join(MODELS)}")
        model = inner
    groups = state["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    names = [name for group in groups for name in group.get("param_names", ())]
    names = keys if all(isinstance(key, str) for key in keys) else names
    if len(names) == len(keys):
        missing = [name for name in names if name not in model]
        if missing:
            raise ValueError(f"{file} has no {missing[0]!r}, and the state is one of it; it has {list(model)[:3]}, ...")
        return [model[name] for name in names]
    floats = [value for value in model.values() if value.is_floating_point()]
    if file.suffix == ".safetensors" or len(groups) > 1 or len(floats) != len(keys):
        raise ValueError(
            f"the state has {len(keys)} parameters in {len(groups)} groups and no 'param_names', and {file} has "
            f"{len(floats)} tensors: which is which is not known. In Python, convert_state takes params=[...]"
        )
    return floats


# What is said ---------------------------------------------------------------------------------------------------------


def _carry(state: Mapping[str, Any], mode: Any) -> list[str]:
    """Carries the weight decay of each group over, and says how."""
    said = []
    for i, group in enumerate(state["param_groups"]):
        found = saved_decay(group)
        if found is None:
            raise ValueError(f"param group {i} says no rule, by which its decay could be carried over")
        rule, was, decay = found
        if decay and str(group.get("schedule")).startswith("NormalizedDecay("):
            raise ValueError(
                f"param group {i} has schedule={group['schedule']}: its weight decay is not that of a step"
            )
        momentum = float(group.get("momentum", 0.0))
        lr = group.get("base_lr", group.get("lr"))
        new = convert_weight_decay(decay, was, mode, lr=lr, rule=rule.name, momentum=momentum) if decay else None
        group["decay"] = mode
        group.pop(FLAG, None)
        if new is not None:
            group["weight_decay"] = new.weight_decay
            exact = "exact" if new.exact else f"to {new.deviation:.1%}"
            said.append(
                f"group {i}: weight decay {decay:g} ({was}) is {new.weight_decay:g} ({mode}) at lr={lr:g}, {exact}"
            )
    return said


def _decay(group: Mapping[str, Any]) -> str:
    """The mode of a group as ours has it, where it says it."""
    found = saved_decay(group)
    if found is None or not found[2]:
        return "-" if found else "not saved"
    said = "decay" in group or FLAG in group or len(found[0].torch.decays) == 1
    return found[1] if said else "not saved: that of the optimizer that loads it"


def _number(value: Any) -> str:
    return "-" if value is None else f"{float(value):g}"


def _tensors(own: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in own.items():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
            yield from ((f"{name}.{part}", getattr(value, part)) for part in value.__tensor_flatten__()[0])
        elif isinstance(value, Tensor):
            yield name, value


def _rows(library: str, state: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Of each entry of the states, and of all."""
    entries = dict[tuple[str, str], list[int]]()
    for own in state["state"].values():
        for name, t in _tensors(own):
            entries.setdefault((name, str(t.dtype).removeprefix("torch.")), []).append(t.nbytes)
    rows = [(library, name, str(len(sizes)), dtype, f"{sum(sizes)}") for (name, dtype), sizes in entries.items()]
    total = sum(map(sum, entries.values()))
    return [*rows, (library, "all", str(sum(map(len, entries.values()))), "-", f"{total}")]
