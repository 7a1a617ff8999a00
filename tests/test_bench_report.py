"""The report of a benchmark, CPU's and GPU's, of hand-made JSON: figures, verdicts, tables, plots, README and page."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import figures
import pytest
import report as program
import tables
from workloads import LEAD, TARGETS

TIMED, FLAT_TIMED = "wd_kernels, launches timed", "wd_kernels flat, launches timed"


def entry(case: str, contender: str, seconds: list[float], groups: int = 1, **info: Any) -> dict[str, Any]:
    shared = {"tensors": 1000, "elements": 1000, "dtype": "float32", "gradients": "kept", "lr": "constant"}
    own = {"rule": "adamw", "threads": 2, "sweep": "", "launches": [], "steps_per_round": 3}
    named = {"contender": contender, "groups": groups, "bytes_per_parameter": 28}
    return {"group": case, "extra_info": shared | own | named | info, "stats": {"data": seconds, "ops": 1.0}}


def point(sweep: str, at: int, contender: str, milliseconds: float, launches: float = 0.0) -> dict[str, Any]:
    """A point of a sweep, in three equal rounds."""
    info: dict[str, Any] = {"sweep": sweep, "launches": [launches * 1e-3] * 3 if launches else []}
    groups = at if sweep == "groups" and contender != "ceiling" else 1
    if sweep == "tensors":
        info |= {"tensors": at, "elements": 10**6 // at}
    if sweep == "elements":
        info |= {"tensors": 1, "elements": at}
    return entry(f"{sweep} {at}", contender, [milliseconds * 1e-3] * 3, groups, **info)


@pytest.fixture
def report() -> dict[str, Any]:
    """Rounds in which the machine slows down threefold: ratios of the same round do not see it.

    A host that takes 10 us and 0.5 us a tensor; a step that takes 1 ms and 2 us a group.
    """
    drift = [1.0, 2.0, 3.0]
    times = {"wd_kernels": 1e-3, "wd_kernels flat": 0.8e-3, "torch fused": 4e-3, "torch foreach": 10e-3}
    more = {"slow one": [8e-3, 20e-3], "bare loop": [0.5e-3 * d for d in drift], "ceiling": [0.4e-3 * d for d in drift]}
    half = {"dtype": "bfloat16", "gradients": "new"}
    benchmarks = [
        *(entry("some", name, [t * d for d in drift]) for name, t in times.items()),
        *(entry("some", name, seconds) for name, seconds in more.items()),
        entry("half", "wd_kernels", [2e-3, 2e-3, 2e-3], **half, bytes_per_parameter=22),
        entry("half", "torch fused", [1.5e-3, 1.8e-3, 9e-3], **half, bytes_per_parameter=14),
        entry("many", "wd_kernels", [1e-3] * 3, tensors=465, elements=256),
        entry("many", "wd_kernels", [1e-3 + 464e-6 * us for us in (1, 2, 4)], 465, tensors=465, elements=256),
    ]
    for n in (1, 10, 100):
        host = 0.010 + 0.0005 * n
        benchmarks += [
            point("tensors", n, "wd_kernels", 0.1 + host),
            point("tensors", n, TIMED, 0.2 + host, 0.2),
            point("tensors", n, "torch fused", 2.0),
            point("tensors", n, "ceiling", 0.05),
            point("groups", n, "wd_kernels", 1.0 + 0.002 * n),
            point("elements", 1000 * n, "wd_kernels", 0.1 * n),
            point("elements", 1000 * n, "torch fused", 0.1 * n),
            point("elements", 1000 * n, "ceiling", 0.08 * n),
        ]
    return {
        "datetime": "2026-03-04T05:06:07.8+00:00",
        "machine_info": {
            "cpu": {"brand_raw": "A (fast) CPU", "count": 2, "flags": ["avx"]},
            "wd_kernels": {"torch": "2.13.0", "instruction set": "avx2", "threads": "2"},
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": False, "author_time": "now"},
        "missing": {"optimi AdamW": "ModuleNotFoundError: No module named 'optimi'"},
        "left_out": {"1x1000000000-float32-kept-by-elements": dict.fromkeys(("a", "b"), "needs 14.9 GiB, free are 8")},
        "benchmarks": benchmarks,
    }


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


# Figures --------------------------------------------------------------------------------------------------------------


def test_figures_of_hand_made_numbers(report):
    some = figures.results(report)["some"]
    own, ceiling = some["wd_kernels", 1], some["ceiling", 1]
    assert own.median == pytest.approx(2e-3)
    assert figures.iqr(own.seconds) == pytest.approx(1e-3)
    assert own.rate == pytest.approx(1e6 * 28 / 2e-3 / 1e9)
    assert own.ratio(some["torch fused", 1]) == pytest.approx(4)
    assert own.ratio(some["slow one", 1]) == pytest.approx((8 + 10) / 2)  # it has two rounds of three
    assert own.share(ceiling) == pytest.approx(40)
    assert ceiling.share(ceiling) == pytest.approx(100)
    assert own.share(None) is None
    assert (figures.iqr([1.0, 2.0, 3.0]), figures.iqr([5.0])) == (1, 0)
    half = replace(own, info=own.info | {"bytes_per_parameter": 14})
    assert half.share(ceiling) == pytest.approx(20)  # half of the bytes in the same time


def test_verdicts_name_the_rows_where_we_are_behind(report):
    found, pairs = figures.behind(figures.results(report))
    ((ratio, own, peer),) = found
    assert (own.case, own.contender, peer.contender) == ("half", "wd_kernels", "torch fused")
    assert ratio == pytest.approx(0.9)  # of 0.75, 0.9 and 4.5
    assert pairs == 3 + 1 + 3 + 3  # some, half, tensors, elements; ours and the ceiling are no peers
    for e in report["benchmarks"]:
        if e["group"] == "half" and e["extra_info"]["contender"] == "torch fused":
            e["stats"]["data"] = [2.1e-3] * 3
    assert figures.behind(figures.results(report)) == ([], 10)
    assert figures.behind(figures.results(report), "wd_kernels flat") == ([], 3)


def test_slopes(report):
    cases = figures.results(report)
    tensors = figures.points(cases, "tensors")
    assert list(tensors) == [1, 10, 100]
    assert tensors[10][TIMED].host == pytest.approx(15e-6)
    assert list(figures.points(cases, "groups")[100]) == ["wd_kernels"]


# Tables ---------------------------------------------------------------------------------------------------------------


def test_tables_of_a_report(report):
    text = tables.render(report)
    found = lines(text)
    for line in (
        "date 2026-03-04 05:06 UTC",
        "commit 0123456789ab",
        "processor A (fast) CPU, 2 cores",
        "torch 2.13.0",
        "1000 x 1000 AdamW float32 kept 2 wd_kernels 1 2.00 1.00 - - - 14.0 40 28 1.00",
        "torch fused 1 8.00 4.00 - - - 3.5 10 28 4.00",
        "bare loop 1 1.00 0.500 - - - 28.0 80 28 0.50",
        "1000 x 1000 AdamW bfloat16 new 2 wd_kernels 1 2.00 0.00 - - - 11.0 - 22 1.00",
        "wd_kernels 465 1.93 0.696 2.00 - - 1.7 - 28 1.00",
        "Ours is ahead in 9 of 10 comparisons of a peer and a case, and behind in these:",
        "- `half`: torch fused, 0.90× (bytes a parameter: ours 22, theirs 14)",
        "wd_kernels, launches timed 1 0.215 0.00 - 0.200 0.0150 130.2 23 28 1.87",
        "missing: optimi AdamW: ModuleNotFoundError: No module named 'optimi'",
        "left out: 1x1000000000-float32-kept-by-elements: a, b: needs 14.9 GiB, free are 8",
    ):
        assert line in found, line
    costs = (
        "Ours: a step costs the host 10 µs and 0.50 µs a tensor (10⁶ elements in all). A parameter group adds 2.00 µs"
    )
    assert costs in text.replace("\n", " ")
    rows = text[text.index("\ntensors ") :].split("\n\n")[0].strip().splitlines()
    names = ("wd_kernels", "wd_kernels flat", "torch fused", "torch foreach", "slow one", "bare loop", "ceiling")
    assert len({row.index(name) for row, name in zip(rows[1:], names, strict=False)}) == 1


def test_a_report_without_ceiling_has_no_shares(report):
    report["benchmarks"] = [e for e in report["benchmarks"] if e["extra_info"]["contender"] != "ceiling"]
    rows = tables.steps(figures.results(report))
    assert {row[rows[0].index("% ceiling")] for row in rows[1:]} == {"-"}
    assert "% ceiling" not in tables.filled_columns(rows)[0]


# Of a GPU -------------------------------------------------------------------------------------------------------------

BILLION = "1x1000000000-float32-kept"


def on_gpu(case: str, contender: str, device: list[float], wall: list[float], **info: Any) -> dict[str, Any]:
    return entry(case, contender, wall, device=device, host=wall, **info)


@pytest.fixture
def gpu() -> dict[str, Any]:
    """The device slows down threefold meanwhile: ratios of the same round do not see it."""
    drift = [1.0, 2.0, 3.0]
    long = {"tensors": 1, "elements": 10**9}
    many, threes = {"tensors": 10_000}, [0.001] * 3
    return {
        "datetime": "2026-03-04T05:06:07+00:00",
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "machine_info": {"device": "some GPU", "driver": "580", "wd_kernels": {"torch": "2.11.0", "threads": "16"}},
        "rehearsal": False,
        "finished": True,
        "tests": {"says": "12 passed in 9 s, exit status 0"},
        "copy": {"bytes": 4 << 30, "gb_per_s": [1900.0, 2000.0, 2200.0]},
        "benchmarks": [
            on_gpu(BILLION, "wd_kernels", [0.007 * d for d in drift], [0.007 * d for d in drift], **long),
            on_gpu(BILLION, "torch fused", [0.0105 * d for d in drift], [0.0077 * d for d in drift], **long),
            on_gpu("10000x1000-float32-kept", "wd_kernels", threes, [0.002, 0.002, 0.004], **many),
            on_gpu("10000x1000-float32-kept", "torch fused", threes, [0.012, 0.016, 0.012], **many),
            on_gpu("gpt2-float32-kept", "wd_kernels", threes, threes, model="gpt2", tensors=3, elements=0.5),
        ],
        "left_out": {
            "10000x1000-float32-kept": {"apex": "no memory"},
            "vit_l16-float32-new": {"all": "the time was over"},
        },
        "missing": {"optimi AdamW": "ModuleNotFoundError: No module named 'optimi'"},
    }


def test_figures_of_a_gpu(gpu):
    """Rates are those of the device time; the copy's rate is the ceiling."""
    assert figures.copy_rate(gpu) == 2000
    cases = figures.results(gpu)
    own, fused, ceiling = (cases[BILLION][name, 1] for name in ("wd_kernels", "torch fused", "ceiling"))
    assert own.rate == pytest.approx(2000)
    assert own.share(ceiling) == pytest.approx(100)
    assert fused.share(ceiling) == pytest.approx(100 / 1.5)
    assert own.device_ratio(fused) == pytest.approx(1.5)
    assert own.ratio(fused) == pytest.approx(1.1)
    assert cases["gpt2-float32-kept"]["wd_kernels", 1].bytes == pytest.approx(1.5 * 28)
    del gpu["copy"]
    assert not any(name == "ceiling" for them in figures.results(gpu).values() for name, _ in them)


def verdict_of(report: dict[str, Any], start: str, where: str = "") -> list[str]:
    found = tables.verdicts(report)[1:]
    return [verdict for target, place, _, verdict in found if target.startswith(start) and where in place]


def test_verdicts_of_a_gpu(gpu):
    assert verdict_of(gpu, ">= 92%", BILLION)[:1] == ["reached"]
    assert verdict_of(gpu, ">= 92%", f"{BILLION}, CUDA") == ["not measured"]
    assert verdict_of(gpu, ">= 92%", "sgdw") == ["not measured"] * 2
    assert verdict_of(gpu, ">= 88%") == ["not measured"] * 6
    assert verdict_of(gpu, ">= 6x", "kept") == ["reached"]  # 6, 8 and 3
    assert verdict_of(gpu, ">= 6x", "new") == ["not measured"]
    assert verdict_of(gpu, ">= 1.0x torch fused, device") == ["reached"]
    assert verdict_of(gpu, ">= 1.0x torch fused, wall", f"worst of 2: {BILLION} (1 cases not measured)") == ["reached"]
    cuda = copy.deepcopy(gpu)
    cuda["benchmarks"][0]["extra_info"]["contender"] = "wd_kernels CUDA"
    assert verdict_of(cuda, ">= 92%", BILLION) == ["not measured"] * 2 + ["reached", "not measured"]

    gpu["copy"]["gb_per_s"] = [2180.0]  # 2000 of them are 91.7%
    assert verdict_of(gpu, ">= 92%", BILLION)[:1] == ["not reached"]
    many = gpu["benchmarks"][3]
    many["stats"]["data"], many["extra_info"]["device"] = [0.0119] * 3, [0.00099] * 3
    assert verdict_of(gpu, ">= 6x", "kept") == ["not reached"]
    assert verdict_of(gpu, ">= 1.0x torch fused, device", "10000x1000") == ["not reached"]

    for nothing in (gpu | {"benchmarks": []}, gpu | {"rehearsal": True}):
        assert {verdict for *_, verdict in tables.verdicts(nothing)[1:]} == {"not measured"}
    assert set(TARGETS.values()) == {88, 92}


def test_the_text_of_a_gpu(gpu):
    text = tables.render(gpu)
    found = lines(text)
    for line in (
        "device some GPU",
        "commit 0123456789ab and uncommitted changes",
        "tests 12 passed in 9 s, exit status 0",
        "copy 2000 GB/s read and written, IQR 150",
        "run finished",
        "1 x 1000000000 AdamW float32 kept 2 wd_kernels 1 14.0 7.00 14.0 7.00 14.0 2000.0 100 28 1.00 1.00",
        "torch fused 1 15.4 7.70 21.0 10.5 15.4 1333.3 67 28 1.10 1.50",
        "gpt2 AdamW float32 kept 2 wd_kernels 1 1.00 0.00 1.00 0.00 1.00 0.0 0 28 1.00 1.00",
        "left out: 10000x1000-float32-kept: apex: no memory",
        "left out: vit_l16-float32-new: all: the time was over",
        "missing: optimi AdamW: ModuleNotFoundError: No module named 'optimi'",
        f">= 92% of copy bandwidth {BILLION} 100.0% reached",
    ):
        assert line in found, line
    assert "REHEARSAL" not in text
    cut = tables.render(gpu | {"rehearsal": True, "finished": False})
    assert cut.startswith("REHEARSAL on the CPU")
    assert "CUT OFF" in cut


# What is kept ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """What is kept lies in tmp_path / "results", README and page in tmp_path."""
    monkeypatch.setattr(program, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(program, "README", tmp_path / "README.md")
    monkeypatch.setattr(program, "PAGE", tmp_path / "performance.md")
    program.RESULTS.mkdir()
    return program.RESULTS


def test_a_report_is_saved_by_date_and_processor(report, folder, tmp_path, capsys):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(report))
    assert program.main([str(path), "--save"]) == 0
    assert capsys.readouterr().out.startswith("date")
    stem = "2026-03-04-a-fast-cpu"
    plots = [f"{stem}-{name}.png" for name in ("peers", "scaling")]
    assert sorted(p.name for p in folder.iterdir()) == sorted([f"{stem}.json", f"{stem}.txt", *plots])
    for name in plots:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert (folder / f"{stem}.txt").read_text() == tables.render(program.slim(report))
    again = json.loads((folder / f"{stem}.json").read_text())
    assert again == program.slim(again) == program.newest()
    assert "flags" not in again["machine_info"]["cpu"]
    assert all(entry["stats"].keys() == {"data"} for entry in again["benchmarks"])


def test_the_newest_report_is_found(folder):
    assert program.newest() is None
    for name in ("2026-03-04-b", "2026-11-01-a", "2027-01-01-x-gpu"):
        (folder / f"{name}.json").write_text(json.dumps({"name": name}))
    assert program.newest() == {"name": "2026-11-01-a"}
    assert program.newest(gpu=True) == {"name": "2027-01-01-x-gpu"}


# README and page ------------------------------------------------------------------------------------------------------


def test_the_section_of_a_report(report):
    text = program.section(report, None)
    for part in (
        "on 2 threads of A (fast) CPU (avx2), torch 2.13.0, 2026-03-04.",
        "| 1000 × 1000 | AdamW | float32 | kept | 2.00 | 1.60 | 8.00 | slow one: 14.0 | 4.00× | 40% |",
        "| 1000 × 1000 | AdamW | bfloat16 | new | 2.00 |  | 1.80 |  | 0.90× |  |",
        "Ours is ahead in 9 of 10 comparisons of a peer and a case, and behind in these:",
        "- `half`: torch fused, 0.90× (bytes a parameter: ours 22, theirs 14)",
        "a step costs the host 10 µs and 0.50 µs a tensor",
        "A parameter group adds 2.00 µs to a step",
        "One tensor of 1e+05 elements takes 10.0 ms, 0 GB/s, 80% of the ceiling.",
        "Missing: optimi AdamW.",
        "(../bench/results/2026-03-04-a-fast-cpu-scaling.png)",
    ):
        assert part in text.replace("\n", " ") or part in text, part
    assert max(len(line) for line in text.splitlines() if line[:1] not in "|!" and "](" not in line) <= 120


def test_a_gpu_report_is_kept_and_joins_the_section(report, gpu, folder, tmp_path, capsys):
    for name, content in (("bench.json", report), ("gpu.json", gpu)):
        (tmp_path / name).write_text(json.dumps(content))
    readme, path = tmp_path / "README.md", tmp_path / "performance.md"
    readme.write_text("\n".join(f"<!-- {part}:{end} -->" for part in ("plot", "figures") for end in ("begin", "end")))
    path.write_text("<!-- performance:begin -->\n<!-- performance:end -->")
    assert program.main([str(tmp_path / "bench.json"), "--save"]) == 0
    assert program.main([str(tmp_path / "gpu.json"), "--save", "--docs"]) == 0
    assert "Budgets" in capsys.readouterr().out
    text = path.read_text()
    assert "On a GPU: some GPU, torch 2.11.0, 2026-03-04; a copy, the ceiling there, moves 2000 GB/s." in text
    row = "| 1 × 1000000000 | AdamW | float32 | kept | 14.0 | 14.0 | 15.4 | 1.10× | 1.50× | 100% |"
    assert row in text
    stem = "2026-03-04-some-gpu-gpu"
    assert f"](../bench/results/{stem}-peers.png)" in text
    assert "on 2 threads of A (fast) CPU" in text
    files = {f"{stem}{end}" for end in (".json", ".txt", "-peers.png")}
    assert {p.name for p in folder.iterdir() if p.name.startswith(stem)} == files
    assert program.newest(gpu=True) == program.slim(gpu)
    assert program.newest() == program.slim(report)
    assert (folder / f"{stem}.txt").read_text() == tables.render(gpu)
    assert program.main([str(tmp_path / "bench.json"), "--save", "--docs"]) == 0
    assert path.read_text() == text


def test_what_is_shown_is_rewritten_between_its_markers_only(report):
    begin, end = "<!-- performance:begin -->", "<!-- performance:end -->"
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    once = program.rewritten(text, report, None)
    assert once.startswith(f"before\n{begin}\nWhole `opt.step()`")
    assert once.endswith(f"{end}\nafter\n")
    assert "old" not in once
    assert program.rewritten(once, report, None) == once
    for broken in ("nothing", f"{end} {begin}", text + text):
        with pytest.raises(ValueError, match="once each"):
            program.rewritten(broken, report, None)


def test_the_readme_begins_with_a_plot_and_a_few_rows(report):
    plot, plotted, begin, end = (f"<!-- {p}:{e} -->" for p in ("plot", "figures") for e in ("begin", "end"))
    text = f"before\n{plot}\nold\n{plotted}\nbetween\n{begin}\nold\n{end}\nafter\n"
    once = program.opening(text, report)  # which has none of the leading cases
    assert once.startswith(f"before\n{plot}\n\n{plotted}\nbetween\n{begin}\n| tensors × elements |")
    assert once.endswith(f"{end}\nafter\n")
    drawn = json.loads(json.dumps(report).replace('"some"', f'"{LEAD[0]}"'))
    again = program.opening(once, drawn)
    assert "](bench/results/2026-03-04-a-fast-cpu-lead.png)\n" in again
    rows = [line for line in again.splitlines() if line.startswith("|")]
    assert rows[2:] == ["| 1000 × 1000 | AdamW | float32 | kept | 2.00 | 1.60 | 8.00 | slow one: 14.0 | 4.00× | 40% |"]
    assert program.opening(again, drawn) == again
    for broken in ("nothing", f"{plot} {plotted} {end} {begin}", f"{plotted} {plot} {begin} {end}", text + text):
        with pytest.raises(ValueError, match="once each"):
            program.opening(broken, report)


def test_a_rehearsal_is_not_kept(gpu, folder, tmp_path, capsys):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(gpu | {"rehearsal": True}))
    for option in ("--save", "--docs"):
        with pytest.raises(SystemExit):
            program.main([str(path), option])
        assert "no figure in it is a GPU's" in capsys.readouterr().err
    assert program.main([str(path)]) == 0


def test_readme_and_page_say_what_was_measured():
    """`python bench/report.py --docs` makes it so."""
    readme, page = program.README.read_text(), program.PAGE.read_text()
    report, gpu = program.newest(), program.newest(gpu=True)
    assert report is not None
    assert program.opening(readme, report) == readme
    assert program.rewritten(page, report, gpu) == page


def test_what_is_kept_is_what_its_json_says():
    for path in program.RESULTS.glob("[0-9]*.json"):
        report = json.loads(path.read_text())
        assert path.stem == program.stem_of(report)
        assert path.with_suffix(".txt").read_text() == tables.render(report)
