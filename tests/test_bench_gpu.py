"""The GPU benchmark: figures, verdicts and reports, tuning, and the program from end to end."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import gpu_around
import gpu_cases
import gpu_measure
import gpu_report
import gpu_tune
import pytest
import report_figures
import torch

import wd_kernels
from wd_kernels.backends import triton as triton_backend

ROOT = Path(__file__).parent.parent
F32, BF16, CPU = torch.float32, torch.bfloat16, torch.device("cpu")
HERE = {"wd_kernels", "torch fused", "torch foreach"}


# Figures and verdicts -------------------------------------------------------------------------------------------------


def case_of(name: str, elements: int, times: dict[str, tuple[list[float], list[float]]], **info: Any) -> dict[str, Any]:
    """A case of a report, with the (device, wall) seconds of each contender."""
    results = [
        {"contender": who, "groups": 1, "bytes_per_parameter": 28, "gradient": "float32"}
        | {"device": device, "wall": wall, "host": wall}
        for who, (device, wall) in times.items()
    ]
    return {"case": name, "elements": elements, "note": "", "skipped": {}, "results": results} | info


@pytest.fixture
def report() -> dict[str, Any]:
    """The device slows down threefold meanwhile: ratios of the same round do not see it."""
    drift = [1.0, 2.0, 3.0]
    long = {
        "wd_kernels": ([0.007 * d for d in drift], [0.007 * d for d in drift]),
        "torch fused": ([0.0105 * d for d in drift], [0.0077 * d for d in drift]),
    }
    many = {"wd_kernels": ([0.001] * 3, [0.002, 0.002, 0.004]), "torch fused": ([0.001] * 3, [0.012, 0.016, 0.012])}
    return {
        "date": "2026-03-04 05:06 UTC",
        "commit": "0123456789ab",
        "rehearsal": False,
        "finished": True,
        "machine": {"device": "some GPU", "torch": "2.11.0"},
        "tests": {"says": "12 passed in 9 s, exit status 0"},
        "copy": {"bytes": 4 << 30, "gb_per_s": [1900.0, 2000.0, 2200.0]},
        "launches": {"tensors": 6, "buckets": 2, "step_kernels": 2, "on_device": {"step_kernel": 2, "Memcpy": 1}},
        "cases": [
            case_of("1e9 elements, float32", 10**9, long),
            case_of("10000 x 1000, kept gradients", 10**7, many, note="a remark", skipped={"apex": "no memory"}),
        ],
        "left_out": ["ViT-L/16, new gradients"],
        "missing": {"optimi AdamW": "ModuleNotFoundError: No module named 'optimi'"},
    }


def test_figures_of_hand_made_numbers(report):
    assert report_figures.iqr([1.0, 2.0, 3.0]) == pytest.approx(1.0)
    assert report_figures.iqr([5.0]) == 0
    assert report_figures.ratio([1.0, 2.0, 4.0], [3.0, 4.0, 4.0]) == pytest.approx(2.0)  # of 3, 2 and 1
    assert gpu_report.copy_rate(report) == 2000
    own, fused = gpu_report.case_figures(report["cases"][0], 2000.0)
    assert own.device == pytest.approx(0.014)
    assert own.device_iqr == pytest.approx(0.007)
    assert own.gb_per_s == pytest.approx(2000)
    assert own.percent == pytest.approx(100)
    assert own.device_vs_fused == pytest.approx(1.5)
    assert own.wall_vs_fused == pytest.approx(1.1)
    assert fused.percent == pytest.approx(100 / 1.5)
    assert fused.device_vs_fused == 1
    alone = case_of("alone", 10, {"wd_kernels": ([1.0], [1.0])})
    (figures,) = gpu_report.case_figures(alone, None)
    assert (figures.percent, figures.device_vs_fused, figures.wall_vs_fused) == (None, None, None)


def verdict_of(report: dict[str, Any], start: str, where: str = "") -> list[str]:
    return [v.verdict for v in gpu_report.verdicts(report) if v.target.startswith(start) and where in v.where]


def test_verdicts(report):
    assert verdict_of(report, ">= 92%", "1e9 elements, float32") == ["reached", "not measured"]  # Triton's, CUDA's
    assert verdict_of(report, ">= 92%", "SGDW") == ["not measured"] * 2
    assert verdict_of(report, ">= 88%") == ["not measured"] * 6
    assert verdict_of(report, ">= 6x", "kept") == ["reached"]  # 6, 8 and 3
    assert verdict_of(report, ">= 6x", "new") == ["not measured"]
    assert verdict_of(report, ">= 1.0x torch fused, device") == ["reached"]
    assert verdict_of(report, ">= 1.0x torch fused, wall", "worst of 2: 1e9 elements, float32 (1 cases not") == [
        "reached"
    ]
    cuda = copy.deepcopy(report)
    cuda["cases"][0]["results"][0]["contender"] = "wd_kernels CUDA"
    assert verdict_of(cuda, ">= 92%", "1e9 elements, float32") == ["not measured", "reached"]
    assert verdict_of(report, "one launch") == ["reached"]

    report["launches"]["step_kernels"] = 3
    assert verdict_of(report, "one launch") == ["not reached"]
    report["copy"]["gb_per_s"] = [2180.0]  # 2000 of them are 91.7%
    assert verdict_of(report, ">= 92%", "1e9 elements, float32") == ["not reached", "not measured"]
    for result in report["cases"][1]["results"]:
        if result["contender"] == "torch fused":
            result["wall"] = [0.0119, 0.0119, 0.0119]
            result["device"] = [0.00099] * 3
    assert verdict_of(report, ">= 6x", "kept") == ["not reached"]
    assert verdict_of(report, ">= 1.0x torch fused, device", "10000 x 1000") == ["not reached"]

    nothing = {"cases": [], "rehearsal": False}
    assert {v.verdict for v in gpu_report.verdicts(nothing)} == {"not measured"}
    assert {v.verdict for v in gpu_report.verdicts(report | {"rehearsal": True})} == {"not measured"}


def test_the_text_of_a_report(report):
    text = gpu_report.render(report)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for line in (
        "device some GPU",
        "tests 12 passed in 9 s, exit status 0",
        "copy 2000 GB/s read and written, IQR 150, of 4096 MiB",
        "a step runs 2 step_kernel, 1 Memcpy",
        "run finished",
        "1e9 elements, float32 wd_kernels 1 14.000 7.000 14.000 7.000 14.000 28 2000 100.0 1.50 1.10",
        "torch fused 1 21.000 10.500 15.400 7.700 15.400 28 1333 66.7 1.00 1.00",
        "10000 x 1000, kept gradients: a remark",
        "10000 x 1000, kept gradients: without apex: no memory",
        "ViT-L/16, new gradients: not measured, the time was over",
        "missing: optimi AdamW: ModuleNotFoundError: No module named 'optimi'",
        ">= 92% of copy bandwidth 1e9 elements, float32 100.0% reached",
        "one launch a bucket profiler, 6 tensors, 2 buckets 2 kernels reached",
    ):
        assert line in lines
    assert "REHEARSAL" not in text
    cut = gpu_report.render(report | {"rehearsal": True, "finished": False})
    assert cut.startswith("REHEARSAL on the CPU")
    assert "CUT OFF" in cut


# Around the measurements ----------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report"
    gpu_around.write(path, "first")
    monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        gpu_around.write(path, "second")
    assert path.read_text() == "first"


@pytest.mark.parametrize(
    ("output", "passed", "failed"),
    [
        ("x.py::a PASSED\n=== 1 failed, 3 passed, 7 deselected in 62.10s (0:01:02) ===\n", 3, 1),
        (
            "tests/x.py::a PASSED [ 1%]\ntests/x.py::b[c-d] FAILED [ 2%]\ntests/x.py::c PASSED [ 3%]\ntests/x.py::d ",
            2,
            1,
        ),
        ("3 steps taken in 2.0s\n5 passed in 0.10s\n", 5, 0),
        ("no tests ran in 0.01s\n", 0, 0),
    ],
)
def test_outcomes_are_counted_also_of_a_run_that_was_cut_off(output, passed, failed):
    counts = gpu_around.count(output)
    assert (counts["passed"], counts["failed"]) == (passed, failed)


def test_tests_and_build_keep_to_their_time_and_say_how_they_went(tmp_path):
    path = tmp_path / "tests.txt"
    slow = "import time; print('t.py::a PASSED [ 1%]', flush=True); time.sleep(60)"
    started = time.perf_counter()
    found = gpu_around.run_tests(1.5, path, (sys.executable, "-u", "-c", slow))
    assert time.perf_counter() - started < 30
    assert (found["status"], found["passed"]) == (None, 1)
    assert found["says"].startswith("1 passed in ")
    assert found["says"].endswith("CUT OFF")
    assert "t.py::a PASSED" in path.read_text()

    broken = gpu_around.build(30, (sys.executable, "-c", "print('no compiler'); raise SystemExit(3)"))
    assert broken["status"] == 3
    assert broken["says"] == "FAILED: exit status 3: no compiler"
    assert gpu_around.build(30, (sys.executable, "-c", "pass"))["says"].startswith("done in ")
    without = "wd_kernels: installing without the CUDA library: no CUDA toolkit was found"
    partly = gpu_around.build(30, (sys.executable, "-c", f"print({without!r})"))
    assert partly["status"] == 0
    assert partly["says"].endswith(" s, without the CUDA library: no CUDA toolkit was found")


# Tuning ---------------------------------------------------------------------------------------------------------------


def test_a_variant_replaces_launch_parameters_for_its_time():
    formats = tuple(wd_kernels.formats.FORMATS[1] for _ in range(4))
    before = triton_backend.block(formats), triton_backend.options(formats, 32, True)
    longest = wd_kernels.device_copy.LONGEST
    with gpu_tune.patched(gpu_tune.Variant(8, 2048, 0, longest=4096, per_processor=7)):
        how = triton_backend.options(formats, 32, nvidia=True)
        assert how["num_warps"] == 8
        assert how["enable_fp_fusion"] is False
        assert "maxnreg" not in how
        assert triton_backend.block(formats) == 2048
        assert (wd_kernels.device_copy.LONGEST, wd_kernels.device_copy.PER_PROCESSOR) == (4096, 7)
        assert wd_kernels.device_copy.chunk_size(10**9, 132) == 4096
    with gpu_tune.patched(gpu_tune.Variant(registers=72)):
        assert triton_backend.options(formats, 32, nvidia=True)["maxnreg"] == 72
    with gpu_tune.patched(gpu_tune.Variant()):
        assert triton_backend.options(formats, 32, True) == before[1]
    assert (triton_backend.block(formats), triton_backend.options(formats, 32, True)) == before
    assert longest == wd_kernels.device_copy.LONGEST
    assert len(set(map(str, gpu_tune.VARIANTS))) == len(gpu_tune.VARIANTS)


def test_the_table_of_variants_has_the_best_first():
    problem = {"elements": 10**9, "dtype": "float32", "failed": {}}
    seconds = {"as it is": [0.008, 0.007, 0.009], "block=512": [0.004] * 3, "block=2048": [0.016] * 3}
    other = problem | {"dtype": "bfloat16", "seconds": {"as it is": [0.005]}}
    assert gpu_tune.best_first([problem | {"seconds": seconds}, other]) == [
        ("variant", "1e+09 float32, ms", "x", "1e+09 bfloat16, ms", "x"),
        ("block=512", "4.000", "0.500", "-", "-"),
        ("as it is", "8.000", "1.000", "5.000", "1.000"),
        ("block=2048", "16.000", "2.000", "-", "-"),
    ]


def test_tuning_notes_what_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_tune, "VARIANTS", (gpu_tune.Variant(), replace(gpu_tune.Variant(), block=512)))
    monkeypatch.setattr(gpu_tune, "PROBLEMS", ((10**6, F32),))
    step = wd_kernels.AdamW.step

    def step_or_fail(self: Any, closure: Any = None) -> Any:
        if triton_backend.block((wd_kernels.formats.FORMATS[1],)) == 512:
            raise RuntimeError("out of registers")
        return step(self, closure)

    monkeypatch.setattr(wd_kernels.AdamW, "step", step_or_fail)
    said: list[str] = []
    gpu_tune.tune(tmp_path, CPU, True, 5.0, said.append)
    (problem,) = json.loads((tmp_path / "tune.json").read_text())["problems"]
    assert len(problem["seconds"]["as it is"]) == gpu_tune.ROUNDS
    assert problem["failed"] == {"block=512": "RuntimeError: out of registers"}
    assert any("REHEARSAL" in line for line in said)


# As it is run ---------------------------------------------------------------------------------------------------------


def program(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "bench" / "gpu.py"), *map(str, arguments)]


def surroundings(**own: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"OMP_NUM_THREADS": "1"} | own


REHEARSAL = ("--device", "cpu", "--scale", "small")


def test_a_rehearsal_from_end_to_end(tmp_path):
    cases = ("--case", "1e9 elements, float32", "--case", "lr changing", "--case", "Llama")
    arguments = ("--out", tmp_path, *REHEARSAL, "--only", "copy,launches,steps,plots", *cases)
    done = subprocess.run(
        program(*arguments), env=surroundings(), cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu.json", "gpu.txt", "peers.png", "roofline.png"]
    for name in ("peers.png", "roofline.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["rehearsal"]
    assert report["finished"]
    assert [case["case"] for case in report["cases"]] == [
        "1e9 elements, float32",
        "1e9 elements, float32, bfloat16 gradients",
        "20 x 256, lr changing",
        "Llama 3 tiny, 2 layers, bfloat16",
    ]
    assert report["left_out"] == []
    assert {r["contender"] for r in report["cases"][0]["results"]} == HERE
    assert {r["contender"] for r in report["cases"][-1]["results"]} == {"wd_kernels", "torch fused"}
    assert report["launches"]["buckets"] == 2
    assert report["machine"]["wd_kernels"] == wd_kernels.__version__
    assert {"torch", "triton", "python", "device", "driver"} <= report["machine"].keys()
    text = (tmp_path / "gpu.txt").read_text()
    assert text.startswith("REHEARSAL on the CPU")
    assert done.stdout.rstrip().endswith(text.rstrip())
    assert "reached" not in text.replace("not reached", "")


def test_a_run_that_is_cut_off_leaves_what_it_has(tmp_path):
    process = subprocess.Popen(
        program("--out", tmp_path, *REHEARSAL, "--only", "steps"),
        env=surroundings(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    process.kill()
    process.communicate()
    assert first.startswith("1e9 elements, float32: ")
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["cases"][0]["case"] == "1e9 elements, float32"
    assert len(report["left_out"]) >= 10
    assert not report["finished"]
    assert "CUT OFF" in (tmp_path / "gpu.txt").read_text()

    again = tmp_path / "again"
    assert gpu.main(["--out", str(again), "--from", str(tmp_path / "gpu.json")]) == 0
    assert sorted(p.name for p in again.iterdir()) == ["gpu.txt", "peers.png"]  # no copy was measured: no roofline
    assert (again / "gpu.txt").read_text() == gpu_report.render(report)


def test_cases_that_the_time_does_not_reach_are_named(tmp_path, monkeypatch):
    report = gpu.Report(tmp_path, True)
    gpu.measure_steps(report, CPU, "small", 0.0, ["1e9"])
    assert report.values["cases"] == []
    assert report.values["left_out"] == list(gpu_cases.TARGETS)

    def measure(case: gpu_cases.Case, *_: Any) -> Any:
        raise RuntimeError(f"{case.name} broke")

    monkeypatch.setattr(gpu_measure, "measure", measure)
    gpu.measure_steps(report, CPU, "small", 5.0, ["1e9 elements, bfloat16"])
    assert report.values["errors"] == {"1e9 elements, bfloat16": "RuntimeError: 1e9 elements, bfloat16 broke"}
    assert report.values["left_out"] == []
    assert "bfloat16: FAILED: RuntimeError" in report.save()


@pytest.mark.parametrize("part", ["tests", "copy", "launches"])
def test_a_part_that_fails_ends_nothing_else(tmp_path, part):
    def run() -> None:
        raise ValueError("broken")

    report = gpu.Report(tmp_path, False)
    report.part(part, run)
    assert "FAILED: ValueError: broken" in (tmp_path / "gpu.txt").read_text()
    assert {v.verdict for v in gpu_report.verdicts(report.values)} == {"not measured"}


def test_without_matplotlib_there_is_a_report_all_the_same(report, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "gpu.json").write_text(json.dumps(report))
    assert gpu.main(["--out", str(tmp_path), "--from", str(tmp_path / "gpu.json")]) == 0
    assert "no plots: " in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu.json", "gpu.txt"]


def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run(
        program("--out", tmp_path / "out"),
        env=surroundings(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.strip().startswith("No GPU is there")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--out", "x", "--only", "steps,dance"])
    assert "dance" in capsys.readouterr().err
