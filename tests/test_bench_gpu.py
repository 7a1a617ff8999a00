"""The GPU benchmark: what is around its measurements, tuning, and the program from end to end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu
import gpu_parts
import internals
import pytest
import torch
import workloads

import wd_kernels
from wd_kernels.backends import triton as triton_backend

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SMALLEST = "1x100000-float32-kept"


# Around the measurements ----------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report"
    gpu_parts.write(path, "first")
    monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        gpu_parts.write(path, "second")
    assert path.read_text() == "first"


def test_tests_and_build_keep_to_their_time_and_say_how_they_went(tmp_path):
    path = tmp_path / "tests.txt"
    slow = "import time; print('t.py::a PASSED [ 1%]', flush=True); time.sleep(60)"
    started = time.perf_counter()
    found = gpu.run_tests(1.5, path, (sys.executable, "-u", "-c", slow))
    assert time.perf_counter() - started < 30
    assert found["PASSED"] == 1
    assert found["says"].startswith("1 passed, CUT OFF after ")
    assert "t.py::a PASSED" in path.read_text()
    lines = "t.py::a PASSED\nt.py::b[c-d] FAILED [ 2%]\nt.py::c PASSED [ 3%]\nt.py::d "
    whole = gpu.run_tests(30, path, (sys.executable, "-c", f"print({lines!r}); raise SystemExit(1)"))
    assert (whole["PASSED"], whole["FAILED"]) == (2, 1)
    assert whole["says"].startswith("2 passed, 1 failed, exit status 1 after ")
    assert gpu.run_tests(30, path, (sys.executable, "-c", "pass"))["says"].startswith("no tests, exit status 0")

    broken = gpu.build(30, (sys.executable, "-c", "print('no compiler'); raise SystemExit(3)"))
    assert re.fullmatch(r"FAILED: exit status 3 after \d+ s: no compiler", broken["says"])
    assert gpu.build(30, (sys.executable, "-c", "pass"))["says"].startswith("exit status 0 after ")
    without = "wd_kernels: installing without the CUDA library: no CUDA toolkit was found"
    partly = gpu.build(30, (sys.executable, "-c", f"print({without!r})"))
    assert not partly["says"].startswith("FAILED")
    assert partly["says"].endswith(" s, without the CUDA library: no CUDA toolkit was found")


# Tuning ---------------------------------------------------------------------------------------------------------------


def test_launch_parameters_are_others_for_a_time():
    formats = tuple(wd_kernels.formats.FORMATS[1] for _ in range(4))
    before = triton_backend.block(formats), triton_backend.options(formats, 32, 90)
    longest = wd_kernels.backends.device_copy.LONGEST
    with internals.launch_parameters(wd_kernels.AdamW([torch.nn.Parameter(torch.ones(2))])) as use:
        use(8, 2048, 0, longest=4096, per_processor=7)
        how = triton_backend.options(formats, 32, 90)
        assert how["num_warps"] == 8
        assert how["enable_fp_fusion"] is False
        assert "maxnreg" not in how
        assert triton_backend.block(formats) == 2048
        assert (wd_kernels.backends.device_copy.LONGEST, wd_kernels.backends.device_copy.PER_PROCESSOR) == (4096, 7)
        assert wd_kernels.backends.device_copy.chunk_size(10**9, 132) == 4096
        use(registers=72)
        assert triton_backend.options(formats, 32, 90)["maxnreg"] == 72
        assert triton_backend.block(formats) == before[0]
        use()
        assert triton_backend.options(formats, 32, 90) == before[1]
        use(warps=1)
    assert (triton_backend.block(formats), triton_backend.options(formats, 32, 90)) == before
    assert longest == wd_kernels.backends.device_copy.LONGEST
    assert gpu_parts.VARIANTS["wd_kernels"] == {}
    assert len(gpu_parts.VARIANTS) == 25


def test_tuning_compares_variants_and_notes_what_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(
        gpu_parts, "VARIANTS", {"wd_kernels": {}, "block=512": {"block": 512}, "block=2048": {"block": 2048}}
    )
    monkeypatch.setattr(gpu_parts, "TUNED", ["1x1000000-float32-kept"])
    step, seen = wd_kernels.AdamW.step, []

    def step_or_fail(self: Any, closure: Any = None) -> Any:
        seen.append(triton_backend.block((wd_kernels.formats.FORMATS[1],)))
        if seen[-1] == 512:
            raise RuntimeError("out of registers")
        return step(self, closure)

    monkeypatch.setattr(wd_kernels.AdamW, "step", step_or_fail)
    text = gpu_parts.tune(gpu_parts.Report(tmp_path, CPU, "tune"), CPU, 5.0)
    report = json.loads((tmp_path / "tune.json").read_text())
    assert [e["extra_info"]["contender"] for e in report["benchmarks"]] == ["wd_kernels", "block=2048"]
    assert report["left_out"] == {"1x10-float32-kept": {"block=512": "RuntimeError: out of registers"}}
    assert set(seen) == {512, 1024, 2048}
    assert (tmp_path / "tune.txt").read_text() == text
    assert "REHEARSAL" in text
    assert report["finished"]


# As it is run ---------------------------------------------------------------------------------------------------------


def program(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "bench" / "gpu.py"), *map(str, arguments)]


def surroundings(**own: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"OMP_NUM_THREADS": "1"} | own


REHEARSAL = ("--rehearse",)


def test_a_rehearsal_from_end_to_end(tmp_path):
    cases = ("--case", "1x100000-float32", "--case", "changing")
    arguments = (
        "--out",
        tmp_path,
        *REHEARSAL,
        "--only",
        "copy,clipping,accumulation,averages,watching,steps,plots",
        *cases,
    )
    done = subprocess.run(
        program(*arguments), env=surroundings(), cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = ["accumulation.txt", "averages.txt", "clipping.txt", "gpu.json", "gpu.txt", "peers.png", "watching.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == written
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["rehearsal"]
    assert report["finished"]
    assert report["left_out"] == {}
    here = {"wd_kernels", "torch fused", "torch foreach", "torch for-loop"}
    found: dict[str, set[str]] = {}
    for e in report["benchmarks"]:
        if e["extra_info"]["contender"] in (*here, "wd_kernels flat"):  # other libraries may be there too
            found.setdefault(e["group"], set()).add(e["extra_info"]["contender"])
        counts = {len(own) for own in (e["stats"]["data"], e["extra_info"]["device"], e["extra_info"]["host"])}
        assert len(counts) == 1
    assert found == {
        "1x100000-float32-kept": here,
        "1x100000-float32+bfloat16-kept": here,
        "1x100000-float32-kept-sgdw": here,
        "20x256-float32-kept-20groups-changing": here | {"wd_kernels flat"},
    }
    assert len(report["copy"]["gb_per_s"]) == 9
    assert report["clipping"]["says"].startswith("exit status 0")
    assert "clip and step, torch / ours" in (tmp_path / "clipping.txt").read_text()
    assert report["accumulation"]["says"].startswith("exit status 0")
    assert "add, norm / ours" in (tmp_path / "accumulation.txt").read_text()
    assert report["averages"]["says"].startswith("exit status 0")
    assert "torch / ours" in (tmp_path / "averages.txt").read_text()
    assert report["watching"]["says"].startswith("exit status 0")
    assert "over a step" in (tmp_path / "watching.txt").read_text()
    machine = report["machine_info"]
    assert machine["wd_kernels"]["wd_kernels"] == wd_kernels.__version__
    assert {"torch", "triton", "python"} <= machine["wd_kernels"].keys()
    assert {"device", "driver"} <= machine.keys()
    assert set(report["commit_info"]) == {"id", "dirty"}
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
    assert first.startswith("1x100000-float32-kept: ")
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["benchmarks"][0]["group"] == "1x100000-float32-kept"
    assert len(report["left_out"]) >= 4
    assert not report["finished"]
    assert "CUT OFF" in (tmp_path / "gpu.txt").read_text()
    assert (
        "left out: 20x256-float32-kept-20groups-changing: all: the time was over" in (tmp_path / "gpu.txt").read_text()
    )


def test_cases_that_the_time_does_not_reach_are_named(tmp_path, monkeypatch):
    report = gpu_parts.Report(tmp_path, CPU)
    gpu_parts.measure_steps(report, CPU, 0.0, ["1x100000-float32-kept"])
    assert report.values["benchmarks"] == []
    assert list(report.values["left_out"]) == [SMALLEST, f"{SMALLEST}-sgdw"]

    def measure(case: workloads.Case, *_: Any) -> Any:
        raise RuntimeError(f"{case} broke")

    monkeypatch.setattr(gpu_parts, "measure", measure)
    gpu_parts.measure_steps(report, CPU, 5.0, [SMALLEST])
    assert report.values["left_out"][SMALLEST] == {"all": f"FAILED: RuntimeError: {SMALLEST} broke"}
    assert f"left out: {SMALLEST}: all: FAILED: RuntimeError" in report.save()


@pytest.mark.parametrize("part", ["tests", "copy"])
def test_a_part_that_fails_ends_nothing_else(tmp_path, part):
    def run() -> None:
        raise ValueError("broken")

    gpu_parts.Report(tmp_path, CPU).part(part, run)
    assert "FAILED: ValueError: broken" in (tmp_path / "gpu.txt").read_text()


def test_without_matplotlib_there_is_a_report_all_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.delitem(sys.modules, "plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert gpu.main(["--out", str(tmp_path), *REHEARSAL, "--only", "steps,plots", "--case", "nothing"]) == 0
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
