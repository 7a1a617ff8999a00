"""`python -m wd_kernels`: the commands, the self-check's sections, and that it finds backends which compute wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import wd_kernels
from wd_kernels import __main__ as program
from wd_kernels import self_check
from wd_kernels.backends import BACKENDS, Launch, Prepared
from wd_kernels.commands import check as command
from wd_kernels.printing import aligned
from wd_kernels.rules import RULES

Damage = Callable[[object, object, Tensor], None]


class Broken:
    """The reference, with its rows spoiled before the step or its results after it."""

    name = "cpu"
    needs_tensors = True

    def __init__(self, before: Callable[[Tensor], Tensor] | None = None, after: Damage | None = None) -> None:
        self.before, self.after = before, after
        self.inner = BACKENDS["reference"]

    def why_not(self) -> str | None:
        return None

    def refuses(self, spec) -> str | None:
        return None

    def prepare(self, table, buckets) -> Prepared:
        plans, ready, *_ = self.inner.prepare(table, buckets)
        assert not plans
        assert ready is not None

        def spoiled(table, rows: Tensor) -> list[Launch]:
            def after() -> None:
                for bucket in buckets if self.after else ():
                    self.after(table, bucket, rows)

            return [*ready(table, self.before(rows) if self.before else rows), after]

        return Prepared([], spoiled)


def flip_lowest_bit(role: int) -> Damage:
    """Flips the lowest bit of the first element of one role: 0 is the parameter, -1 the last state."""

    def damage(table, bucket, rows: Tensor) -> None:
        theta, _, states = table.tensors(bucket.members[0])[:3]
        memory = (theta, *states.values())[role]
        memory.detach().view(-1)[:1].view(self_check._INTEGERS[memory.element_size()]).bitwise_xor_(1)

    return damage


#: Where AdamW's and SGDW's rows have it.
(DECAY,) = {RULES[rule].scalars.index("decay") for rule in ("adamw", "sgdw")}


def scale_column(column: int, factor: float) -> Callable[[Tensor], Tensor]:
    def spoil(rows: Tensor) -> Tensor:
        rows = rows.clone()
        rows[:, column] *= factor
        return rows

    return spoil


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[self_check.Case]:
    """A short self-check: both rules, all dtypes, one configuration each."""
    cases = [
        self_check.Case(rule, variant, "lr_scaled", dtype)
        for rule, variant in (("AdamW", "amsgrad"), ("SGDW", "nesterov"))
        for dtype in self_check.DTYPES
    ]
    monkeypatch.setattr(command, "all_cases", lambda: cases)
    return cases


def test_as_a_program_it_prints_every_section_and_exits_0():
    done = subprocess.run([sys.executable, "-m", "wd_kernels"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    for title in ("Versions\n", "Backends\n", "Chosen\n", "Self-check\n"):
        assert title in done.stdout
    assert f"torch       {torch.__version__}" in done.stdout
    assert "all backends compute right" in done.stdout


def test_check_by_its_name_is_the_same(few, capsys: pytest.CaptureFixture[str]):
    said = []
    for argv in ([], ["check"]):
        assert program.main(argv) == 0
        said.append(re.sub(r"[\d.]+ s\)", "s)", capsys.readouterr().out))
    assert said[0] == said[1]
    assert "all backends compute right" in said[0]


def exits(argv: list[str]) -> object:
    with pytest.raises(SystemExit) as raised:
        program.main(argv)
    return raised.value.code


def test_help_names_every_command_and_imports_none(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(program.importlib, "import_module", lambda *names: pytest.fail(f"imports {names}"))
    assert exits(["--help"]) == 0
    said = capsys.readouterr().out
    for name in ("check", "bench", "plan", "convert"):
        assert re.search(rf"^  {name} +\w", said, re.MULTILINE), name
    assert exits(["--version"]) == 0
    assert capsys.readouterr().out == f"wd_kernels {wd_kernels.__version__}\n"


def test_a_command_imports_no_other():
    """Beside the package itself, which a program of the package always imports."""
    code = "import sys, wd_kernels.__main__ as m; m.main(['plan', '--model', 'gpt2']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    modules = done.stdout.splitlines()[-1]
    assert "'wd_kernels.commands.plan'" in modules
    for name in ("wd_kernels.commands.check", "wd_kernels.commands.bench", "wd_kernels.self_check", "matplotlib'"):
        assert f"'{name}" not in modules


@pytest.mark.parametrize("argv", [["banch"], ["--modle"], ["check", "plan"], ["check", "--model", "gpt2"]])
def test_what_is_no_command_is_an_error(argv: list[str], capsys: pytest.CaptureFixture[str]):
    assert exits(argv) == 2
    assert argv[-1] in (said := capsys.readouterr().err) or argv[-2] in said


def test_the_self_check_has_every_rule_variant_decay_and_dtype():
    cases = self_check.all_cases()
    assert len(set(cases)) == len(cases)
    ordinary = [c for c in cases if c.shapes is self_check.SHAPES]
    assert len(ordinary) == (3 + 5 + 3) * 6 * 4
    sizes = [torch.Size(shape).numel() for shape in self_check.SHAPES]
    assert {0, 1, 33, 1025} <= set(sizes)
    assert any(torch.Size(shape).numel() > 32768 for c in cases for shape in c.shapes)


def test_rows_are_equal_to_the_reference(few, capsys: pytest.CaptureFixture[str]):
    assert program.main([]) == 0
    out = capsys.readouterr().out
    available = [name for name, backend in BACKENDS.items() if backend.why_not() is None]
    rows = [line.split() for line in out.splitlines() if line.split()[1:2] in (["AdamW"], ["SGDW"])]
    assert sorted({row[0] for row in rows}) == sorted(available)
    assert len(rows) == len(available) * len(few)
    assert all(" ".join(row[6:]) in ("within the limit", "equal to the reference") for row in rows)


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (Broken(after=flip_lowest_bit(0)), "1 of 1164 elements of the parameter differ from the reference"),
        (Broken(after=flip_lowest_bit(-1)), "differ from the reference"),
        (Broken(before=scale_column(DECAY, 1.01)), "units off float64"),  # decay
    ],
    ids=["parameter bit", "state bit", "scalar"],
)
def test_a_wrong_backend_is_found_and_named(few, broken, named, monkeypatch, capsys):
    monkeypatch.setitem(BACKENDS, "cpu", broken)
    assert program.main([]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  WRONG")]
    assert all(line.startswith("  WRONG  cpu: ") for line in wrong)
    assert len(wrong) == len(few)
    assert any(named in line for line in wrong)
    for case, line in zip(few, wrong, strict=True):
        assert f"{case}: step 1: " in line


def test_a_wrong_reference_is_found_by_float64(few, monkeypatch, capsys):
    monkeypatch.setitem(BACKENDS, "reference", Broken(before=scale_column(DECAY, 1.01)))
    assert program.main([]) == 1
    out = capsys.readouterr().out
    assert "WRONG  reference: AdamW, amsgrad, decay='lr_scaled', torch.float32" in out
    assert "units off float64" in out


def test_a_backend_that_raises_is_found(few, monkeypatch, capsys):
    def fail(table, bucket, rows) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setitem(BACKENDS, "cpu", Broken(after=fail))
    assert program.main([]) == 1
    assert "step 1: RuntimeError: no such luck" in capsys.readouterr().out


def test_an_absent_backend_says_why_and_is_no_mismatch(few, monkeypatch, capsys):
    absent = Broken()
    monkeypatch.setattr(absent, "why_not", lambda: "no compiler was there", raising=False)
    monkeypatch.setitem(BACKENDS, "cpu", absent)
    assert program.main([]) == 0
    assert "not available: no compiler was there" in capsys.readouterr().out


def test_without_the_reference_nothing_is_claimed(few, monkeypatch, capsys):
    monkeypatch.setattr(BACKENDS["reference"], "why_not", lambda: "it needs numpy", raising=False)
    assert program.main([]) == 1
    out = capsys.readouterr().out
    assert "Nothing can be checked without the reference: it needs numpy" in out
    assert "compute right" not in out


def test_columns_are_aligned():
    lines = aligned([("name", "n"), ("a", 5), ("bcdef", 10)], indent="").splitlines()
    assert lines == ["name    n", "a       5", "bcdef  10"]


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_has_read_enough_is_no_error(buffered: bool) -> None:
    """As with `| head -1`; 1 would be a backend that computes wrong."""
    read, write = os.pipe()
    os.close(read)
    command = [
        sys.executable,
        *([] if buffered else ["-u"]),
        "-m",
        "wd_kernels",
        "plan",
        "--model",
        "gpt2",
        "--gpu",
        "h200",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
