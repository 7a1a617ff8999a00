"""The study: its batched networks against ordinary training, its fits against known slopes, and what is kept of it."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from report import replaced
from semantics import mode_of
from study import program, report, train
from study.findings import HELD_OUT, Errors, Findings, Fit, Mean, best_decays, fit
from study.plan import (
    GROWTHS,
    METHODS,
    RIVALS,
    SCHEDULES,
    Plan,
    anytime,
    budgets,
    finals,
    grids,
    growths,
    variant_grids,
    variants,
)
from study.report import render, section
from study.train import NOISE, VALIDATION, Networks, Run, split
from torch.nn import functional as F

import wd_kernels
from wd_kernels.schedules import Constant, Cosine

TINY = Plan(
    size=3, epochs=1, seeds=2, budgets=(1, 2, 3), decays=4, finals=2, restarts=(1, 2, 3),
    samples=(32, 64, 128), widths=(4, 8, 16), grown_epochs=(2, 1), grown_decays=5,
)  # fmt: skip


# Training -------------------------------------------------------------------------------------------------------------


def alone(run: Run, config: dict[str, Any], seed: int) -> tuple[int, int]:
    """The numbers of errors of one network, trained by itself, with torch's layers and torch's optimizer."""
    (x, y), *held_out = split(seed, NOISE[run.network])
    x, y, n = x[: run.samples], y[: run.samples], run.samples // 32
    normalised = run.network == "normalised"
    weights, factors = [], []
    widths = (64, *run.hidden, 10)
    for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
        drawn = torch.randn(fan_in, fan_out, generator=torch.Generator().manual_seed(1000 * seed + layer))
        readout = layer == len(run.hidden)
        shrunk = math.sqrt(run.base / fan_in) if run.base and readout else 1.0  # as 1/width, at the base as ever
        weights.append(torch.nn.Parameter(drawn * math.sqrt(2 / fan_in) * shrunk))
        factors.append(run.base / fan_in if run.base and layer > 0 else 1.0)
    biases = [torch.nn.Parameter(torch.zeros(n)) for n in widths[1:]]

    def logits(x: torch.Tensor, statistics: torch.Tensor | None = None) -> torch.Tensor:
        over = x if statistics is None else statistics
        for w, b in zip(weights, biases, strict=True):
            x, over = x @ w + b, over @ w + b
            if normalised:
                mean, deviation = over.mean(0), over.var(0, correction=0).sqrt()
                x, over = (x - mean) / deviation, (over - mean) / deviation
            if w is not weights[-1]:
                x, over = x.relu(), over.relu()
        return 3 * x if normalised else x

    params = weights if normalised else [*weights, *biases]
    factors += [1.0] * (len(params) - len(weights))
    groups = [{"params": [p]} for p in params]
    opt = torch.optim.SGD(groups, lr=config["lr"], momentum=0.9, weight_decay=config["weight_decay"])
    order = torch.Generator().manual_seed(seed)
    for t in range(run.epochs):
        for k, batch in enumerate(torch.randperm(run.samples, generator=order).split(32)[:n]):
            for group, factor in zip(opt.param_groups, factors, strict=True):
                group["lr"] = config["lr"] * factor * config["schedule"](n * t + k)
            opt.zero_grad()
            F.cross_entropy(logits(x[batch]), y[batch]).backward()
            opt.step()
    with torch.no_grad():
        found = [int((logits(a, x).argmax(1) != b).sum()) for a, b in held_out]
    return found[0], found[1]


GROWN: list[dict[str, Any]] = [{}, {"samples": 128}, {"hidden": (24, 40)}, {"hidden": (24, 40), "base": 8}]


@pytest.mark.parametrize("grown", GROWN, ids=["", "fewer data", "wider", "wider, muP"])
@pytest.mark.parametrize("network", NOISE)
def test_networks_of_a_batch_are_trained_as_if_alone(network: str, grown: dict[str, Any]) -> None:
    """Every configuration and seed, against one that torch trains by itself: the same errors on held-out digits."""
    configs = tuple(METHODS["SGD-L2"].config(lr, decay, Cosine(36)) for lr, decay in ((0.1, 0.01), (0.02, 0.2)))
    run = Run("some", network, "SGDW", configs, epochs=2, seeds=2, first_seed=5, **grown)
    found = train.train(run)
    for k, config in enumerate(configs):
        for s, seed in enumerate(run.draws):
            own = [round(float(found[name][k, s]) * n) for name, n in (("validation", VALIDATION), ("test", 600))]
            assert own == pytest.approx(alone(run, config, seed), abs=2)  # digits on the border may fall either way
    assert float((found["test"][0] - found["test"][1]).abs().max()) > 0


def test_a_configuration_is_a_param_group_and_a_step_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    own = train.optimizer
    monkeypatch.setattr(train, "optimizer", lambda *args: made.append(own(*args)) or made[-1])
    run = anytime(TINY, "noisy", dict.fromkeys([(name, s) for name in RIVALS for s in SCHEDULES], (1e-3, 0.1)))[1]
    found = train.train(run)
    (opt,) = made
    assert len(opt.param_groups) == len(run.configs) == 4
    assert [mode_of(opt, group) for group in opt.param_groups] == ["independent"] * 2 + ["l2"] * 2
    assert len(opt._table.buckets) == 1
    assert [group["schedule_step"] for group in opt.param_groups] == [54] * 4
    assert found["test"].shape == (3, 4, 6)


def test_diverged_networks_count_as_wrong() -> None:
    configs = tuple(METHODS["AdamW lr_scaled"].config(0.01, decay, Constant()) for decay in (0.1, 1e6))
    found = train.train(Run("some", "noisy", "AdamW", configs, epochs=1, seeds=1))
    assert float(found["test"][0]) < 0.5
    assert float(found["test"][1]) == 1


def test_labels_of_training_alone_are_noisy() -> None:
    clean, noisy = split(3, 0.0), split(3, 0.2)
    for (x, y), (a, b) in zip(clean[1:], noisy[1:], strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)
    assert torch.equal(clean[0][0], noisy[0][0])
    wrong = (clean[0][1] != noisy[0][1]).float().mean()
    assert 0.1 < wrong < 0.26
    assert sum(len(y) for _, y in clean) == 1797
    assert not torch.equal(clean[0][1], split(4, 0.0)[0][1])


def test_stacks_and_slices_share_memory() -> None:
    networks = Networks(Run("some", "noisy", "AdamW", ({},) * 2, epochs=1, seeds=2))
    params = networks.slices(2, 2)
    for p, stack in zip(params, networks.stacks, strict=True):
        assert p.grad is not None
        assert stack.grad is not None
        assert p.data_ptr() == stack[2:].data_ptr()
        assert p.grad.data_ptr() == stack.grad[2:].data_ptr()


# Plan -----------------------------------------------------------------------------------------------------------------


def test_the_plan_is_what_was_promised() -> None:
    """A 12 x 12 grid, 7 methods, 3 seeds, on each network; and every run's name is its own."""
    runs = grids(Plan())
    for network in NOISE:
        assert {(name, network, "cosine") for name in METHODS} < set(runs)
        for name in METHODS:
            run = runs[name, network, "cosine"]
            assert (len(run.configs), run.seeds) == (144, 3)
            assert len({c["lr"] for c in run.configs}) == 12
            assert len({c["weight_decay"] for c in run.configs}) == 12
    assert len(METHODS) == 7
    every = [*runs.values(), *budgets(Plan()).values(), *growths(Plan()).values()]
    assert len({run.name for run in every}) == len(every)
    assert Plan().period_ends() == [10, 30, 70, 150, 310]
    places = {(name, s): (0.1, 0.2) for name in RIVALS for s in SCHEDULES}
    retrained = finals(Plan(), "noisy", places)
    seen = {seed for run in every for seed in run.draws}
    assert not seen & set(retrained.draws)
    assert [c["decay"] for c in retrained.configs] == ["l2"] * 3 + ["independent"] * 3
    names, run = anytime(Plan(), "normalised", places)
    restarting = run.configs[names.index("AdamWR")]
    assert restarting["weight_decay"] == pytest.approx(0.2 * math.sqrt(60 * 18))
    assert isinstance(restarting["schedule"], wd_kernels.NormalizedDecay)


def test_what_grows_grows_and_else_all_stays() -> None:
    """Data at a fixed number of epochs; widths at as many steps; every run's schedule ends with it."""
    runs = growths(Plan())
    assert {name for _, name, _ in runs} == set(GROWTHS)
    for (network, name, size), run in runs.items():
        steps = run.epochs * (run.samples // 32)
        assert {config["schedule"].steps for config in run.configs} == {steps}
        assert {config["lr"] for config in run.configs} == {1e-3 if network == "normalised" else 1e-2}
        assert (run.seeds, len({config["weight_decay"] for config in run.configs})) == (9, 18)
        expected = (
            (120, size, (64,), None) if name == "data" else (40, 600, (size, size), 16 if "muP" in name else None)
        )
        assert (run.epochs, run.samples, run.hidden, run.base) == expected


def test_under_mup_a_layer_s_lr_falls_as_its_width() -> None:
    """All but those of the first layer and of biases; four groups of two learning rates each are one launch."""
    run = growths(TINY)["noisy", "width, muP", 16]
    opt: Any = train.optimizer(run, Networks(run))
    seen = [(group["lr"], [tuple(p.shape[1:]) for p in group["params"]]) for group in opt.param_groups]
    slow, fast = [(16, 16), (16, 10)], [(64, 16), (1, 16), (1, 16), (1, 10)]
    assert seen == [(1e-2 * 4 / 16, slow), (1e-2, fast)] * 5


def test_what_each_law_says() -> None:
    """By hand, for eight times the data, and eight times the width with or without muP."""
    said = {name: [own.predicted(law, 0.01, 8.0) for law in own.laws.values()] for name, own in GROWTHS.items()}
    assert said["data"] == pytest.approx([0.01 / 8, 0.01 / math.sqrt(8), 0.01, 0.01])
    assert said["width"] == said["width, muP"] == pytest.approx([0.01] * 4)
    assert said["width, muP, lr_scaled"] == [0.01]


# Ridges ---------------------------------------------------------------------------------------------------------------

LRS, DECAYS = np.geomspace(1e-3, 1e-1, 9).tolist(), np.geomspace(1e-5, 10, 25).tolist()


def valley(slope: float, seed: int = 0) -> Any:
    """Errors [lrs, decays, seeds] with their least value on a line of the given slope through (1e-2, 1e-2)."""
    x, y = (np.log(np.asarray(values) / 1e-2) for values in (LRS, DECAYS))
    depth = 0.03 + 0.004 * np.square(y[None, :] - slope * x[:, None])
    return np.minimum(depth[:, :, None] + np.random.default_rng(seed).normal(0, 0.002, (*depth.shape, 3)), 0.9)


@pytest.mark.parametrize("slope", [-1.0, -0.4, 0.0, 1.0])
def test_a_known_ridge_is_found(slope: float) -> None:
    intervals = [fit(LRS, valley(slope, seed), DECAYS, HELD_OUT) for seed in range(20)]
    assert all(abs(found.slope - slope) < 0.15 for found in intervals)
    assert sum(found.low <= slope <= found.high for found in intervals) >= 15
    assert all(found.low < found.slope < found.high for found in intervals)
    assert np.exp(intervals[0].offset) * 1e-2 ** intervals[0].slope == pytest.approx(1e-2, rel=0.3)


def test_rows_that_do_not_count() -> None:
    """A flat one, one whose best is at the edge, one whose best is bad; with fewer than three left, no slope."""
    errors = valley(0.0)
    errors[0] = 0.03
    errors[1] = np.linspace(0.03, 0.2, 25)[:, None]
    errors[2] += 0.05
    found = fit(LRS, errors, DECAYS, HELD_OUT)
    assert found.used == (False, False, False, *[True] * 6)
    errors[3:7] = 0.03
    nothing = fit(LRS, errors, DECAYS, HELD_OUT)
    assert math.isnan(nothing.slope)
    assert str(nothing) == "none"


def test_where_a_law_leads() -> None:
    """Valleys planted at λ = 0.1/size: who keeps the time scale stays in them, with an error as low as planted."""
    plan = Plan(samples=(64, 128, 256, 512), grown_decays=37)
    row = np.log(plan.grown_row(GROWTHS["data"]))
    planted = {}
    for size in plan.samples:
        share = 0.02 + 0.01 * np.square(row - math.log(6.4 / size))
        errors = np.repeat(np.minimum(share, 0.9)[:, None], 9, 1)
        planted["noisy", "data", size] = Errors(errors, errors)
    found = Findings(plan, {}, {}, {}, growths=planted)
    assert found.growth("noisy", "data").slope == pytest.approx(-1, abs=0.05)
    kept = found.followed("noisy", "data", "timescale")
    assert [decay for decay, _ in kept] == pytest.approx([0.1, 0.05, 0.025, 0.0125], rel=0.1)
    assert [error for _, error in kept] == pytest.approx([0.02] * 4, abs=0.001)
    assert np.allclose(found.followed("noisy", "data", None), kept, rtol=0.1, atol=0)
    stays = found.followed("noisy", "data", "kept")[-1]
    assert stays == pytest.approx((kept[0][0], 0.02 + 0.01 * math.log(kept[0][0] / 0.0125) ** 2), rel=0.02)


def test_the_best_is_an_average_by_standard_errors() -> None:
    """Worked by hand: least error 1/2 of 100 samples, so the unit is 0.05; weights 1, 1/e, and nearly nothing."""
    errors = np.asarray([[[0.5], [0.55], [0.9]]])
    best, _ = best_decays(errors, [1.0, math.e, math.e**2], 100)
    weights = [1, math.exp(-1), math.exp(-8)]
    assert best[0] == pytest.approx((weights[1] + 2 * weights[2]) / sum(weights))


def test_verdicts() -> None:
    assert Fit(-1.2, -1.5, -0.9, 0, ()).seen(-1) == "yes"
    assert Fit(-1.2, -1.3, -1.1, 0, ()).seen(-1) == "nearly"
    assert Fit(-1.6, -1.7, -1.5, 0, ()).seen(-1) == "no"
    assert Fit(-1.2, -1.3, -1.1, 0, ()).seen(-1, 0.1) == "no"
    assert Fit(math.nan, math.nan, math.nan, math.nan, ()).seen(-1) == "no ridge"
    assert str(Mean.of(np.asarray([0.01, 0.03]))) == "2.00 ± 1.00"


# The program ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Findings, Path]:
    work = tmp_path_factory.mktemp("study")
    return program.collect(TINY, work), work


def test_what_is_finished_is_not_trained_again(tiny: tuple[Findings, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the result another: a study that lost two of its runs trains these, and says the same."""
    found, work = tiny
    lost = [work / name for name in sorted(path.name for path in work.glob("*.pt"))[:9:8]]
    for path in lost:
        path.unlink()
    (work / "left-from-an-interruption.part").write_bytes(b"half a file")
    trained: list[str] = []
    own = train.train
    monkeypatch.setattr(train, "train", lambda run: trained.append(run.name) or own(run))
    again = program.collect(TINY, work)
    assert {name.replace(" ", "_") for name in trained} == {path.name.rpartition("-")[0] for path in lost}
    assert len(trained) == 2
    ours, theirs = again.packed(), found.packed()
    assert {k: v for k, v in ours.items() if k != "about"} == {k: v for k, v in theirs.items() if k != "about"}


def test_another_plan_or_another_way_to_train_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [
        Run("one", "noisy", "SGDW", (METHODS["SGD-L2"].config(0.1, decay, Constant()),), 1, 1) for decay in (0.1, 0.2)
    ]
    trainer = program.Trainer(tmp_path)
    for run in (*runs, *runs):
        trainer(run)
    assert len(list(tmp_path.glob("one-*.pt"))) == 2
    changed = tmp_path / "changed.py"
    changed.write_text(Path(train.__file__).read_text() + "WIDTH = 8\n")
    monkeypatch.setattr(train, "__file__", str(changed))
    trainer(runs[0])
    assert trainer.networks == 5
    assert len(list(tmp_path.glob("one-*.pt"))) == 3


def test_what_is_packed_comes_back(tiny: tuple[Findings, Path]) -> None:
    found, _ = tiny
    kept = json.loads(json.dumps(found.packed()))
    back = Findings.unpacked(kept)
    assert back.plan == found.plan
    assert json.loads(json.dumps(back.packed())) == kept
    for name in METHODS:
        assert np.allclose(back.table(name, "noisy"), found.table(name, "noisy"), atol=1e-7)
    assert back.chosen("Adam-L2", "noisy", "cosine") == found.chosen("Adam-L2", "noisy", "cosine")
    assert render(back) == render(found)


def test_variants_are_compared_at_their_best_with_new_seeds(tiny: tuple[Findings, Path]) -> None:
    found, _ = tiny
    places = found.varied("noisy")
    run = variants(TINY, "noisy", places)
    assert list(places) == ["AdamW lr_scaled", "cautious", "corrected"]
    own = [(c["lr"], c["weight_decay"]) for c in run.configs]
    assert own == list(places.values())
    assert [(c["decay"], c.get("cautious")) for c in run.configs] == [
        ("lr_scaled", None), ("lr_scaled", True), ("corrected", None)
    ]  # fmt: skip
    others = {seed for own in (*grids(TINY).values(), *variant_grids(TINY).values()) for seed in own.draws}
    assert not others & set(run.draws)
    errors = found.variants
    assert found.gained("noisy", "cautious").value == pytest.approx(
        float(errors["noisy", "AdamW lr_scaled"].mean() - errors["noisy", "cautious"].mean())
    )


def test_the_choice_is_made_on_validation_alone(tiny: tuple[Findings, Path]) -> None:
    found, _ = tiny
    lrs, decays = METHODS["Adam-L2"].grid(3)
    validation = np.full((9, 2), 0.5)
    validation[5] = 0.1
    grid = Errors(validation, np.linspace(0, 1, 18).reshape(9, 2))
    one = Findings(found.plan, {}, {("Adam-L2", "noisy", "cosine"): grid}, {})
    assert one.chosen("Adam-L2", "noisy", "cosine") == (lrs[1], decays[2])


def test_the_program(
    tiny: tuple[Findings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trains, prints, draws; keeps; writes the page's section, between its markers alone."""
    results, page, (_, work) = tmp_path / "results", tmp_path / "study.md", tiny
    results.mkdir()
    page.write_text("before\n<!-- study:begin -->\nstale words\n<!-- study:end -->\nafter\n")
    for name, value in (("REHEARSAL", TINY), ("Plan", lambda: TINY), ("RESULTS", results), ("PAGE", page)):
        monkeypatch.setattr(program, name, value)
    assert program.main(["--work", str(work), "--rehearse"]) == 0
    out = capsys.readouterr().out
    assert "metric-proximal" in out
    pictures = {f"study_{name}.png" for name in report.PICTURES}
    assert {path.name for path in work.glob("*.png")} == pictures
    assert not list(results.iterdir())
    assert program.main(["--work", str(work), "--save", "--docs"]) == 0
    assert {path.name for path in results.iterdir()} == {*pictures, "study.json", "study.txt"}
    assert all((results / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    text = page.read_text()
    assert text.startswith("before\n<!-- study:begin -->\n`make study` trains")
    assert text.endswith("<!-- study:end -->\nafter\n")
    assert "stale words" not in text
    kept = json.loads((results / "study.json").read_text())
    lacking = {key: value for key, value in kept.items() if key not in ("variant_grids", "variants")}
    (results / "study.json").write_text(json.dumps(lacking))
    assert program.main(["--work", str(work), "--add"]) == 0
    added = json.loads((results / "study.json").read_text())
    assert added["about"].pop("added")["networks"] == 4 * 9 * 2 + 2 * 3 * 2
    assert added == kept
    with pytest.raises(SystemExit):
        program.main(["--rehearse", "--save"])
    assert "--rehearse shows nothing that is worth keeping" in capsys.readouterr().err


def test_the_page_says_what_was_found() -> None:
    """`python bench/study --docs` makes it so."""
    kept = Findings.unpacked(json.loads((program.RESULTS / "study.json").read_text()))
    text = program.PAGE.read_text()
    assert replaced(text, "study", section(kept)) == text
    assert (program.RESULTS / "study.txt").read_text() == render(kept)
    assert kept.plan == Plan()
    assert kept.about["seconds"] < 40 * 60  # on one thread


def test_the_guide_says_what_was_found() -> None:
    """Every number with decimals in docs/weight-decay.md's words on the study is in what was kept of it."""
    guide, numbers = (program.PAGE.parent / "weight-decay.md").read_text(), re.compile(r"[+-]?\d+\.\d+")
    said = guide[guide.index("**What [the study]") : guide.index("So the laws are first guesses")]
    found = set(numbers.findall((program.RESULTS / "study.txt").read_text()))
    assert len(numbers.findall(said)) > 20
    assert [number for number in numbers.findall(said) if number not in found] == []
