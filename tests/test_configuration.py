"""What people give in configurations: pairs, modes, backends, keys with typos. (What Hydra builds: tests/ecosystem.)"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from semantics import build, parameters, set_gradients
from torch import nn

from wd_kernels import SGDW, AdamW, functional, native

ROOT = Path(__file__).parents[1]


# Pairs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "betas",
    [
        [0.8, 0.95],
        (np.float64(0.8), np.float64(0.95)),
        np.array([0.8, 0.95]),
        torch.tensor([0.8, 0.95], dtype=torch.float64),
    ],
    ids=["list", "numpy", "array", "tensor"],
)
def test_betas_of_any_kind(betas: Any) -> None:
    """As torch takes them; checkpoints hold numbers. In the constructor, in a group, and in the functional API."""
    sets = [parameters() for _ in range(3)]
    opts = [
        AdamW(sets[0], betas=betas),
        AdamW([{"params": sets[1], "betas": betas}]),
        AdamW(sets[2], betas=(0.8, 0.95)),
    ]
    for t in range(3):
        for params, opt in zip(sets, opts, strict=True):
            set_gradients(params, t)
            opt.step()
    for p, q, r in zip(*sets, strict=True):
        assert_same_bits(p, r)
        assert_same_bits(q, r)
    for opt in opts:
        kept = opt.state_dict()["param_groups"][0]["betas"]
        assert type(kept) in (tuple, list)
        assert [type(beta) for beta in kept] == [float, float]
    a, b = torch.ones(4), torch.ones(4)
    for w, own in ((a, betas), (b, (0.8, 0.95))):
        functional.adamw_([w], [torch.ones(4)], [torch.zeros(4)], [torch.zeros(4)], step=2, betas=own)
    assert torch.equal(a, b)


@pytest.mark.parametrize("betas", [0.9, "ab", np.float64(0.9), [0.9], np.ones(3), [0.9, "x"]], ids=repr)
def test_what_is_no_pair(betas: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"betas.* in the arguments: expected"):
        AdamW(parameters(), betas=betas)


# The weight decay that nobody chose -----------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["independent", "proximal"])
def test_a_weight_decay_that_lr_does_not_scale_is_chosen(decay: Any) -> None:
    """torch's 0.01 would be 1% a step. The message says what as much is, and a 0.01 that is chosen is taken."""
    with pytest.raises(ValueError, match=rf"weight_decay is not given in param group 0 with decay='{decay}'.*1e-05"):
        AdamW(parameters(), lr=1e-3, decay=decay)
    first, *others = parameters()
    with pytest.raises(ValueError, match="weight_decay is not given in param group 1"):
        AdamW([{"params": [first], "weight_decay": 0.1}, {"params": others}], decay=decay)
    with pytest.raises(ValueError, match="weight_decay is not given in param group 1 with decay='proximal'"):
        AdamW([{"params": [first]}, {"params": others, "decay": "proximal"}])
    opt = AdamW(parameters(), weight_decay=0.01, decay=decay)
    opt.add_param_group({"params": parameters([(2,)])})
    w, grads, *state = ([torch.full((3,), value)] for value in (1.0, 1.0, 0.0, 0.0))
    with pytest.raises(ValueError, match=r"weight_decay is not given in adamw_ with decay="):
        functional.adamw_(w, grads, *state, step=1, decay=decay)
    functional.adamw_(w, grads, *state, step=1, decay=decay, weight_decay=0.01)
    for rule in ("sgdw", "adagradw"):  # whose default is 0
        build(rule, parameters(), decay=decay)
    assert AdamW(parameters()).defaults["weight_decay"] == 0.01


# Keys and modes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "meant"),
    [("weight_deacy", "weight_decay"), ("weight_decy", "weight_decay"), ("beta", "betas"), ("scheduel", "schedule"),
     ("decay_", "decay"), ("base_Lr", "base_lr")],
)  # fmt: skip
def test_a_key_with_a_typo(key: str, meant: str) -> None:
    with pytest.warns(
        UserWarning, match=f"param group 0 has a key '{key}' that nothing here reads: is '{meant}' meant"
    ) as seen:
        AdamW([{"params": parameters(), key: 0.5}])
    assert seen[0].filename == __file__


def test_a_group_that_was_refused_can_be_given_again() -> None:
    """Its parameters too, where they were a generator."""
    opt = AdamW(parameters([(3,)]))
    group: dict[str, Any] = {"params": nn.Linear(2, 2).parameters(), "weight_decay": -1.0}
    with pytest.raises(ValueError, match=r"weight_decay=-1\.0 in param group 1"):
        opt.add_param_group(group)
    group["weight_decay"] = 0.1
    opt.add_param_group(group)
    assert [p.shape for p in opt.param_groups[1]["params"]] == [(2, 2), (2,)]


def test_an_optimizer_from_anothers_defaults() -> None:
    for opt in (AdamW(parameters(), decay="l2", schedule="from_lr"), SGDW(parameters(), momentum=0.9, form="paper")):
        again = type(opt)(parameters(), **opt.defaults)
        assert again.defaults == opt.defaults


def test_keys_that_others_keep_in_groups() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keys = (
            "lr_scale",
            "name",
            "initial_lr",
            "layer_id",
            "param_names_",
            "swa",
            "fsdp",
            "lr_mult",
            "is_frozen",
            "no_weight_decay",
            "scheduler",
            "base_lrs",
        )
        AdamW([{"params": parameters(), "foreach": True, **{key: 1.0 for key in keys if key != "param_names_"}}])


def test_a_backend_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the constructor, with those that are."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(native, "load_cuda", native.load_cuda.__wrapped__)
    pattern = "backend='cuda' cannot be used: .*built without CUDA.*Here are .*'reference'; 'auto' takes the fastest"
    with pytest.raises(RuntimeError, match=pattern):
        AdamW(parameters(), backend="cuda")


@pytest.mark.slow
def test_misspelt_modes_fail_in_mypy(tmp_path: Path) -> None:
    """`decay`, `form`, `backend` and "from_lr" are Literals. (mypy takes 20 s.)"""
    file = tmp_path / "uses.py"
    good = """
from torch import nn
import wd_kernels
mode: wd_kernels.DecayMode = "proximal"
form: wd_kernels.Form = "paper"
backend: wd_kernels.BackendName = "cpu"
w = [nn.Parameter()]
wd_kernels.AdamW(w, decay=mode, backend=backend, schedule="from_lr")
wd_kernels.SGDW(w, decay="independent", form=form, schedule=lambda t: 1 / (1 + t))
wd_kernels.convert_weight_decay(0.1, "l2", mode, lr=0.1)
"""
    bad = [
        'wd_kernels.AdamW(w, decay="independant")', 'wd_kernels.SGDW(w, form="papr")',
        'wd_kernels.AdagradW(w, backend="gpu")', 'wd_kernels.AdamW(w, schedule="cosine")',
        'wd_kernels.convert_weight_decay(0.1, "l2", "decoupled", lr=0.1)',
        'wd_kernels.functional.adamw_([], [], [], [], step=1, decay="none")',
    ]  # fmt: skip
    file.write_text(good + "\n".join(bad) + "\n")
    flags = ["--ignore-missing-imports", "--follow-imports=silent", "--no-incremental"]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *flags, str(file)],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "MYPYPATH": str(ROOT)},
    )  # fmt: skip
    lines = [line for line in run.stdout.splitlines() if "error:" in line]
    first = good.count("\n") + 1
    assert [int(line.split(":")[1]) for line in lines] == list(range(first, first + len(bad))), run.stdout
