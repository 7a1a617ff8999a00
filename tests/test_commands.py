"""The commands `plan` and `bench`: the shapes they take, and the bytes that they count, beside hand-worked ones."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wd_kernels
from wd_kernels import __main__ as program
from wd_kernels import printing
from wd_kernels.byte_model import Stored, stored_as
from wd_kernels.commands import bench, plan
from wd_kernels.model_shapes import MODELS, elements, model_shapes, read_shapes, sharded

ROOT = Path(__file__).parent.parent
F32, BF16, F16, I8, U8, I16 = (
    torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int16,
)  # fmt: skip

Run = Callable[..., "Said"]


class Said:
    """What a command has left: its status and output; `rows` are a table's, by their first cell."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def rows(self) -> dict[str, list[str]]:
        cells = [re.split(r"  +", line.strip()) for line in self.out.splitlines()]
        return {own[0]: own[1:] for own in cells if len(own) > 4}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def go(*argv: object) -> Said:
        status = program.main([str(word) for word in argv])
        return Said(status, *capsys.readouterr())

    return go


# Shapes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensors", "total"),
    [
        ("bert", 199, 109_482_240),
        ("gpt2", 148, 124_439_808),
        ("gpt2-medium", 292, 354_823_168),
        ("gpt2-xl", 580, 1_557_611_200),
        ("llama-1b", 146, 1_235_814_400),
        ("llama-8b", 291, 8_030_261_248),
        ("llama-70b", 723, 70_553_706_496),
        ("lora-7b", 448, 39_976_960),
        ("resnet50", 161, 25_557_032),
        ("vit-b", 152, 86_567_656),
        ("vit-l", 296, 304_326_632),
    ],
)
def test_models_have_the_published_numbers_of_parameters(name, tensors, total):
    assert (len(model_shapes(name)), elements(model_shapes(name))) == (tensors, total)
    if name != "resnet50":  # a layer more is a layer's
        one, two, three = (elements(model_shapes(name, layers)) for layers in (1, 2, 3))
        assert one < two < three
        assert two - one == three - two


def test_every_model_is_tested():
    (mark,) = test_models_have_the_published_numbers_of_parameters.pytestmark
    assert [name for name, *_ in mark.args[1]] == list(MODELS)


def test_shards_are_those_of_fully_shard():
    """The first rank's, which are torch's chunks."""
    shapes = [(10, 3), (7,), (1, 5), (64, 2, 2)]
    for ranks in (1, 2, 4, 16):
        assert sharded(shapes, ranks) == tuple(torch.empty(s).chunk(ranks)[0].shape for s in shapes)


def test_a_file_of_shapes(tmp_path):
    path = tmp_path / "shapes"
    path.write_text(
        "# a small model\n768x3072\nmlp.up 768x3072 *12  # a layer each\n\n4 * 3\n  norm.weight\t768\n2x3x4x5*2\n"
    )
    assert read_shapes(path) == ((768, 3072), *((768, 3072),) * 12, (4,), (4,), (4,), (768,), *((2, 3, 4, 5),) * 2)


@pytest.mark.parametrize(("name", "text"), [("a.txt", "3x4\r\n"), ("a.json", "[[3, 4]]")])
def test_a_mark_of_the_byte_order_is_no_name(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert read_shapes(tmp_path / name) == ((3, 4),)


def test_a_sparse_tensor_is_an_error(tmp_path):
    torch.save({"w": torch.ones(3, 4).to_sparse()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: a tensor of \(3, 4\) is torch.sparse_coo"):
        read_shapes(tmp_path / "a.pt")


def test_shapes_of_models_in_files_are_those_of_their_parameters(tmp_path):
    from safetensors.torch import save_file

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 5, bias=False), nn.LayerNorm(5))
    shapes = [tuple(p.shape) for p in model.parameters()]
    state = {**model.state_dict(), "count": torch.tensor(3), "mask": torch.ones(2, dtype=torch.bool)}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert sorted(read_shapes(tmp_path / "model.safetensors")) == sorted(shapes)
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": dict.fromkeys(state, "model.safetensors")}))
    assert sorted(read_shapes(tmp_path / "index.json")) == sorted(shapes)
    torch.save({**state, "tied": state["1.weight"]}, tmp_path / "model.pt")
    assert list(read_shapes(tmp_path / "model.pt")) == shapes
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "model.pth")
    assert list(read_shapes(tmp_path / "model.pth")) == shapes
    (tmp_path / "named.json").write_text(json.dumps({"w": [3, 4], "b": [4]}))
    assert read_shapes(tmp_path / "named.json") == ((3, 4), (4,))
    (tmp_path / "list.json").write_text("[[3, 4], []]")
    assert read_shapes(tmp_path / "list.json") == ((3, 4), ())


def test_weights_are_not_loaded(tmp_path, monkeypatch):
    """A header is read, though the file ends behind it."""
    entry = {"dtype": "BF16", "shape": [1 << 20, 1 << 10], "data_offsets": [0, 1 << 31]}
    header = json.dumps({"w": entry, "__metadata__": {"a": "b"}}).encode()
    (tmp_path / "large.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert read_shapes(tmp_path / "large.safetensors") == ((1 << 20, 1 << 10),)


def header(held: Any) -> str:
    """A .safetensors file of it alone."""
    text = json.dumps(held)
    return len(text).to_bytes(8, "little").decode() + text


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "768x3072\nw 12xx5\n", "a.txt, line 2: 'w 12xx5'; expected [NAME] 768x3072 [*12] [# comment]"),
        ("a.txt", "1x2 *x\n", "a.txt, line 1: "),
        ("a.txt", "-3x4\n", "a.txt, line 1: "),
        ("a.txt", "# none\n", "a.txt has no shapes"),
        ("a.txt", "0x3\n", "a.txt has no elements"),
        ("a.json", '{"w": [3, "4"]}', "a.json, entry 'w': [3, '4']; expected a list of whole numbers"),
        ("a.json", '{"w": [3, -4]}', "a.json, entry 'w': "),
        ("a.json", "3", "a.json, entry '': 3"),
        ("a.json", "{", "a.json is no JSON"),
        ("a.safetensors", "abc", "a.safetensors is no .safetensors file: its header would be longer"),
        ("a.safetensors", header([1]), "a.safetensors is no .safetensors file: its header is a list"),
        ("a.safetensors", header({"w": 5}), "'w' has no dtype and shape in its header"),
        ("a.safetensors", header({"w": {"dtype": "F32"}}), "'w' has no dtype and shape in its header"),
        ("a.safetensors", header({"w": {"dtype": "F32", "shape": [-3]}}), "'w' has no dtype and shape in its header"),
        ("a.json", '{"weight_map": {"w": 5}}', "No such file"),
        ("a.txt", "3x4\n2x2 *99999999999\n", "a.txt, line 2: 99999999999 times; allowed are up to 1000000"),
        ("a.pt", "abc", "a.pt is not read by torch.load"),
    ],
)
def test_a_file_that_is_wrong_is_an_error_that_names_the_place(tmp_path, run, name, text, said):
    (tmp_path / name).write_text(text)
    found = run("plan", "--shapes", tmp_path / name)
    assert found.status == 2
    assert not found.out
    assert found.err.startswith("python -m wd_kernels plan: error: ")
    assert said in found.err


# Bytes ----------------------------------------------------------------------------------------------------------------


#: (class, options, dtype of parameters), and the bytes of an element that are kept and moved, by hand.
STORED: list[tuple[str, dict[str, Any], torch.dtype, float, float]] = [
    ("AdamW", {}, F32, 16, 28),
    ("AdamW", {"state_dtype": BF16}, F32, 12, 20),
    ("AdamW", {"state_dtype": I8}, F32, 8 + 2 * 33 / 32, 16.125),
    ("AdamW", {"amsgrad": True}, F32, 20, 36),
    ("AdamW", {}, BF16, 12, 22),
    ("AdamW", {"state_dtype": "param"}, BF16, 8, 14),
    ("AdamW", {"state_dtype": I8}, BF16, 4 + 2 * 33 / 32, 10.125),
    ("AdamW", {"master_weights": "split32"}, BF16, 14, 26),
    ("AdamW", {"master_weights": "split24", "state_dtype": I8}, BF16, 5 + 2 * 33 / 32, 12.125),
    ("AdamW", {"master_weights": "float32"}, F16, 16, 28),
    ("AdamW", {"ema_decay": 0.999}, F32, 20, 36),
    ("AdamW", {"ema_decay": 0.999, "ema_dtype": BF16}, BF16, 14, 26),
    ("AdamW", {"decay_to": "initial", "weight_decay": 0.1}, F32, 20, 32),
    ("SGDW", {"momentum": 0.9}, F32, 12, 20),
    ("SGDW", {"momentum": 0.9, "state_dtype": I8}, F32, 8 + 33 / 32, 14.0625),
    ("SGDW", {}, F32, 8, 12),
    ("AdagradW", {}, BF16, 8, 14),
]


@pytest.mark.parametrize(("cls", "options", "dtype", "kept", "moved"), STORED)
def test_bytes_are_those_that_a_stepped_optimizer_really_keeps(cls, options, dtype, kept, moved):
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((40, 32), (33,), (1,), (1024,))]
    optimizer = getattr(wd_kernels, cls)(params, lr=1e-3, **options)
    stored = stored_as(optimizer)
    assert stored.per_element().kept == kept
    assert stored.step_bytes == moved
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()
    optimizer.zero_grad()
    of_report = {row.role: row.bytes for row in optimizer.memory_report().rows if row.role != "step counts"}
    roles = stored.whole([p.numel() for p in params])
    assert sum(role.kept for role in roles.values()) == sum(of_report.values())
    tensors = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert sum(t.nbytes for t in tensors) + 2 * sum(p.nbytes for p in params) == sum(of_report.values())
    assert roles["weights"].kept == of_report["parameters"]
    assert roles.get("masters", stored.roles(0)["weights"]).kept == of_report.get("master_param", 0)
    assert roles.get("average", stored.roles(0)["weights"]).kept == of_report.get("ema", 0)


def test_bytes_are_those_of_the_page_on_storage_formats():
    """Its rows, made by what it says they are asked for."""
    text = (ROOT / "docs" / "features" / "storage-formats.md").read_text()
    lines = text[text.index("| parameters | states | bytes a") :].split("\n\n")[0].splitlines()[2:]
    assert len(lines) == 13
    for line in lines:
        params, states, numbers = (cell.strip() for cell in line.split("|")[1:4])
        master = {"16 bits more": I16, "8 bits more": I8, "copied from a float32 master": F32}
        master = next((dtype for words, dtype in master.items() if words in params), None)
        param = F32 if params == "float32" else BF16
        state = {"float32": F32, "bfloat16": BF16, "8 bits": U8}[states]
        expected = [Stored(param, param, (state,) * n, master).step_bytes for n in (2, 1)]
        assert [float(number) for number in numbers.split(",")] == expected, line


def test_what_is_beside_a_step_adds_its_bytes():
    """By hand, of 1024 elements: float32 weights, bfloat16 gradients."""
    plain: dict[str, Any] = {"param": F32, "grad": BF16, "states": (F32, F32)}
    assert Stored(**plain).step_bytes == 26
    assert Stored(**plain, clips=True).step_bytes == 28  # gradients once more
    # Four passes read gradients and write sums, three of them read sums; the step reads the sum.
    assert Stored(**plain, accumulated=4).step_bytes == 24 + 4 * 2 + 4 * 4 + 3 * 4 + 4
    assert Stored(**plain, accumulated=4, clips=True).step_bytes == Stored(**plain, accumulated=4).step_bytes
    assert Stored(**plain, accumulated=4).per_element().kept == 14 + 4
    assert Stored(**plain, statistics=True).step_bytes == 26 + 5 * 4 / 1024
    assert Stored(**plain, marks=True).step_bytes == 26 + 2 / 8
    assert Stored(**plain, marks=True).roles(33)["marks"] == (8, 8, 8)  # two words


def test_accumulators_and_marks_are_those_that_an_optimizer_keeps():
    p = nn.Parameter(torch.ones(65, dtype=BF16))
    optimizer = wd_kernels.AdamW([p], lr=1e-3, track_changes=True)
    p.grad = torch.ones_like(p)
    optimizer.accumulate()
    roles = stored_as(optimizer, accumulated=2, marks=True).roles(65)
    rows = {row.role: row.bytes for row in optimizer.memory_report().rows}
    assert roles["accumulators"].kept == rows["accumulators"] == 65 * 4


# plan -----------------------------------------------------------------------------------------------------------------


def test_a_plan_by_hand(run, tmp_path):
    """One matrix of 1000 x 1000 at 100 GB/s: 28 MB are 0.28 ms."""
    (tmp_path / "one").write_text("1000x1000\n")
    found = run("plan", "--shapes", tmp_path / "one", "--bandwidth", 100, "--json", tmp_path / "plan.json")
    assert found.status == 0
    assert "one: 1 tensors, 1,000,000 parameters; AdamW" in found.out
    assert "PREDICTED by counting bytes; nothing was measured. Memory: 100 GB/s, as given by --bandwidth" in found.out
    rows = found.rows
    assert len(rows) == 1 + 2 + 3 + 4 * 3  # the heading, torch's, float32's, bfloat16's
    # weights, gradients, states, masters, all, GiB, moved, GB, ms, quotient
    assert rows["AdamW of torch, float32"] == ["4", "4", "8", "0", "16", "0.0149", "28", "0.028", "0.28", "1.00"]
    assert rows["AdamW of torch, bfloat16"] == ["2", "2", "4", "0", "8", "0.00745", "14", "0.014", "0.14", "2.00"]
    assert rows["float32, int8 states"][2:] == [
        "2.0625",
        "0",
        "10.0625",
        "0.00937",
        "16.125",
        "0.0161",
        "0.161",
        "1.74",
    ]
    assert rows["bfloat16 + split24, int8 states"][:5] == ["2", "2", "2.0625", "1", "7.0625"]
    assert rows["bfloat16 + split24, int8 states"][6:] == ["12.125", "0.0121", "0.121", "2.31"]
    report = json.loads((tmp_path / "plan.json").read_text())
    (int8,) = (row for row in report["rows"] if row["stored"] == "float32, int8 states")
    assert int8["bytes_moved"] == 16_125_000
    assert int8["bytes_kept"]["states"] == 2 * (1_000_000 + 31_250)
    assert int8["predicted_ms"] == pytest.approx(0.16125)


def test_a_plan_of_a_shard_on_a_gpu(run):
    """125,472,832 parameters: the embeddings' 2 x 2004 rows, 32 layers' and norms' 64th parts."""
    layer = 218_112_000
    assert 2 * 2004 * 4096 + 32 * layer // 64 + 64 == 125_472_832
    formats = ["--state-dtype", "int8", "--master-weights", "split24"]
    found = run("plan", "--model", "llama-8b", "--shard", 64, "--gpu", "h200", *formats)
    assert found.status == 0
    assert "llama-8b, one of 64 shards: 291 tensors, 125,472,832 parameters" in found.out
    assert "4320 GB/s: 90% of the 4800 of h200's datasheet" in found.out
    rows = found.rows
    assert list(rows)[1:] == ["AdamW of torch, float32", "AdamW of torch, bfloat16", "bfloat16 + split24, int8 states"]
    assert float(rows["AdamW of torch, float32"][-2]) == pytest.approx(125_472_832 * 28 / 4320e9 * 1e3, rel=1e-2)
    assert rows["bfloat16 + split24, int8 states"][6] == "12.125"
    assert run("plan", "--model", "llama-8b/64", "--gpu", "h200").out.startswith(found.out.splitlines()[0])


def test_a_plan_of_clipping_and_an_average(run, tmp_path):
    """README: a step that clips moves 32 bytes where torch's two calls move 40; one that averages 36 and 40."""
    (tmp_path / "one").write_text("1024x1024\n")

    def moved(*more: str) -> tuple[str, str]:
        rows = run("plan", "--shapes", tmp_path / "one", "--dtype", "float32", *more).rows
        index = next(iter(rows.values())).index("moved, B")
        return rows["AdamW of torch, float32"][index], rows["float32, float32 states"][index]

    assert moved() == ("28", "28")
    assert moved("--clip") == ("40", "32")
    assert moved("--ema") == ("40", "36")
    assert moved("--clip", "--ema", "bfloat16") == ("52", "36")
    assert moved("--accumulate", "2")[1] == str(24 + 4 + 2 * 4 + 4 + 2 * 4)
    assert moved("--optimizer", "adamw", "--amsgrad") == ("36", "36")
    assert moved("--grad-dtype", "bfloat16") == ("28", "26")


def test_quotients_are_left_out_where_torch_does_less(run):
    assert "torch float32 / it" in run("plan", "--model", "gpt2").out
    for flag in (["--accumulate", "4"], ["--decay-to"], ["--statistics"], ["--track-changes"]):
        found = run("plan", "--model", "gpt2", *flag)
        assert found.status == 0
        assert "torch float32 / it" not in found.out
        assert "torch's row has none" in found.out


def test_without_a_gpu_a_plan_has_no_time(run):
    found = run("plan", "--model", "gpt2", "--optimizer", "sgdw")
    assert " ms " not in found.out
    assert found.rows["float32, float32 states"][:5] == ["4", "4", "4", "0", "12"]
    assert found.rows["SGD of torch, bfloat16"][:5] == ["2", "2", "2", "0", "6"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model", "gpt5"], f"model 'gpt5': known are {', '.join(MODELS)}"),
        (["--model", "resnet50", "--layers", "3"], "layers=3 of resnet50"),
        (["--model", "gpt2", "--layers", "0"], "layers=0: allowed are 1 to 10000"),
        (["--model", "gpt2", "--shard", "0"], "shard=0: allowed are 1 and more"),
        (["--model", "gpt2/x"], "--model gpt2/x: expected NAME, with --shard N, or NAME/N"),
        (["--model", "gpt2/4", "--shard", "4"], "expected NAME, with --shard N, or NAME/N"),
        (["--shapes", "no/such/file"], "No such file"),
        (["--model", "gpt2", "--bandwidth", "-3"], "--bandwidth -3.0: allowed are numbers > 0"),
        (["--model", "gpt2", "--accumulate", "-1"], "--accumulate -1: allowed are 0 and more"),
        (["--model", "gpt2", "--amsgrad", "--optimizer", "sgdw"], "adamw alone has it"),
        (["--model", "gpt2", "--dtype", "float16", "--master-weights", "split24"], "allowed are none, float32"),
    ],
)
def test_a_plan_that_cannot_be_is_an_error(run, argv, said):
    found = run("plan", *argv)
    assert (found.status, found.out) == (2, "")
    assert said in found.err


# bench ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small"
    path.write_text("w 64x32 *3\nb 96  # 6240 parameters\n")
    return path


@pytest.mark.parametrize("rule", ["adamw", "sgdw", "adagradw"])
def test_a_benchmark_from_end_to_end(run, small, tmp_path, rule):
    threads = torch.get_num_threads()
    png, report = tmp_path / "step.png", tmp_path / "step.json"
    found = run(
        "bench", "--shapes", small, "--optimizer", rule, "--rounds", 4, "--threads", 1, "--plot", png, "--json", report
    )
    assert found.status == 0, found.err
    assert torch.get_num_threads() == threads
    assert "small: 4 tensors, 6,240 parameters" in found.out
    assert "threads: 1" in found.out
    assert "measuring small: 100%" in found.err
    moved = {"adamw": "28", "sgdw": "20", "adagradw": "20"}[rule]
    assert list(found.rows)[1:] == ["wd_kernels", "torch fused", "stream"]
    assert re.search(rf"^wd_kernels +[\d.]+ +[\d.]+ to [\d.]+ +{moved} +[\d.]+ +\d+% +1.00$", found.out, re.MULTILINE)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.stat().st_size > 5000
    held = json.loads(report.read_text())
    assert held["parameters"] == 6240
    for name, bytes_each in (("wd_kernels", int(moved)), ("torch fused", int(moved))):
        result = held["results"][name]
        assert result["bytes"] == 6240 * bytes_each
        assert len(result["seconds"]) == 4
        assert min(result["seconds"]) > 0
    assert held["left_out"] == {}


def test_the_table_s_numbers_are_those_of_the_rounds():
    """By hand: 1000 parameters, 28 bytes each; medians of quotients are not quotients of medians."""
    ours = {"bytes": 28_000, "seconds": [1e-5, 2e-5, 4e-5]}
    theirs = {"bytes": 28_000, "seconds": [3e-5, 4e-5, 4e-5]}
    stream = {"bytes": 8_000, "seconds": [2e-6, 4e-6, 5e-6]}
    _, own, other, ceiling = bench.cells_of({"wd_kernels": ours, "torch fused": theirs, "stream": stream}, 1000)
    assert own == ["wd_kernels", "0.02", "0.015 to 0.03", "28", "1.4", "70%", "1.00"]
    assert other == ["torch fused", "0.04", "0.035 to 0.04", "28", "0.7", "35%", "2.00"]
    assert ceiling == ["stream", "0.004", "0.003 to 0.0045", "-", "2", "-", "-"]


def test_a_benchmark_steps_what_it_is_asked_for(small):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    argv = ["--shapes", str(small), "--dtype", "bfloat16", "--state-dtype", "int8", "--master-weights", "split24"]
    setting = bench.setting_of(parser.parse_args([*argv, "--against", "fused", "foreach"]))
    skipped: dict[str, str] = {}
    them = bench.build(setting, skipped)
    assert not skipped
    assert {c.name: c.bytes_per_parameter for c in them[:-1]} == {
        "wd_kernels": 12.125, "torch fused": 14, "torch foreach": 14
    }  # fmt: skip
    ours, *theirs = (c.step.__self__ for c in them[:-1])
    assert isinstance(ours, wd_kernels.AdamW)
    assert all(isinstance(other, torch.optim.AdamW) for other in theirs)
    params = ours.param_groups[0]["params"]
    assert [tuple(p.shape) for p in params] == list(setting.shapes)
    assert {p.dtype for p in params} == {p.grad.dtype for p in params} == {BF16}
    assert all(len(p.unique()) > 10 for p in params)
    state = ours.state[params[0]]
    assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype, state["master_param"].dtype) == (I8, U8, I8)
    for other, flag in zip(theirs, ("fused", "foreach"), strict=True):
        assert other.param_groups[0]["params"][0] is params[0]
        assert other.defaults[flag]
        before = params[0].detach().clone()
        other.step()
        assert not torch.equal(before, params[0])
    needed = setting.needed(setting.shapes)
    assert needed["weights and gradients"] == 6240 * 4
    assert needed["states of ours"] == 6240 * (2 * 33 / 32 + 1)
    assert needed["states of torch fused"] == 6240 * 4


def test_states_of_the_same_dtype_are_the_same_memory(small):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    them = bench.build(bench.setting_of(parser.parse_args(["--shapes", str(small)])), {})
    ours, theirs = (c.step.__self__ for c in them[:2])
    for p in ours.param_groups[0]["params"]:
        for name in ("exp_avg", "exp_avg_sq"):
            assert ours.state[p][name] is theirs.state[p][name]
        assert ours.state[p]["step"] is not theirs.state[p]["step"]


def test_who_fails_is_left_out_with_the_reason(run, small, monkeypatch):
    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no fused step\nof that")

    monkeypatch.setattr(torch.optim, "AdamW", fail)
    found = run("bench", "--shapes", small, "--rounds", 2)
    assert found.status == 0
    assert "left out: torch fused: RuntimeError: no fused step" in found.out
    assert "wd_kernels" in found.out


def test_too_little_memory_is_an_error_before_anything_is_allocated(run, monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda: 20 << 30)
    monkeypatch.setattr(bench, "build", lambda *_: pytest.fail("allocates"))
    found = run("bench", "--model", "llama-8b")
    assert (found.status, found.out) == (2, "")
    each = 8_030_261_248 * 8 / 2**30
    assert f"needs {3 * each + 0.254:.0f} GiB ({each:.3g} GiB for weights and gradients, " in found.err
    assert f"{each:.3g} GiB for states of ours, {each:.3g} GiB for states of torch fused" in found.err
    assert "20 GiB are free" in found.err
    # 24 bytes a parameter in 18.4 GiB: 823 million, of which two embeddings are 1051
    assert found.err.rstrip().endswith("--shard 16 would fit")
    found = run("bench", "--model", "gpt2-xl")
    assert "--shard 2 or --layers 23 would fit" in found.err
    layer, rest = (1600 * 12 + 13) * 1600, (50257 + 1024 + 2) * 1600  # weights and biases of a layer
    fixed = (256 << 20) + (4 << 20)
    assert [(24 * (rest + n * layer) + fixed <= 0.92 * (20 << 30)) for n in (23, 24)] == [True, False]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model", "gpt5"], "model 'gpt5': known are bert, gpt2"),
        (["--model", "gpt2", "--rounds", "1"], "--rounds 1: allowed are 2 and more"),
        (["--model", "gpt2", "--threads", "0"], "--threads 0: allowed are 1 and more"),
        (["--model", "gpt2", "--device", "gpu"], "--device gpu: "),
        (["--model", "gpt2", "--device", "meta"], "--device meta: allowed are cpu and cuda"),
        (["--model", "gpt2", "--device", "cuda:99"], "--device cuda:99: there are "),
        (["--model", "gpt2", "--master-weights", "split32"], "--master-weights with --dtype float32"),
        (["--model", "gpt2", "--dtype", "float16", "--master-weights", "split32"], "allowed are none, float32"),
    ],
)
def test_a_benchmark_that_cannot_be_is_an_error(run, monkeypatch, argv, said):
    monkeypatch.setattr(bench, "build", lambda *_: pytest.fail("allocates"))
    found = run("bench", *argv)
    assert (found.status, found.out) == (2, "")
    assert said in found.err


@pytest.mark.parametrize("option", ["--plot", "--json"])
def test_a_file_that_cannot_be_written_is_an_error_before_anything_is_measured(run, small, monkeypatch, option):
    monkeypatch.setattr(bench, "build", lambda *_: pytest.fail("allocates"))
    for path in (small.parent / "none" / "x.png", small.parent):
        found = run("bench", "--shapes", small, option, path)
        assert found.status == 2
        assert f"{path} cannot be written: it is a folder, or is in one that is not there" in found.err


def test_a_plot_without_matplotlib_is_an_error_before_anything_is_measured(run, small, monkeypatch):
    monkeypatch.setattr(bench, "build", lambda *_: pytest.fail("allocates"))
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    found = run("bench", "--shapes", small, "--plot", "x.png")
    assert found.status == 2
    assert "--plot needs matplotlib, which is not installed" in found.err


# The page -------------------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "command-line.md").read_text()
SHOWN = re.findall(r"```console\n\$ python -m wd_kernels (\w+) (.*?)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("argv", "printed"), [own[1:] for own in SHOWN if own[0] == "plan"])
def test_plans_of_the_page_are_what_is_printed(run, argv, printed):
    assert run("plan", *shlex.split(argv)).out == printed


def test_benchmarks_of_the_page_are_of_the_form_that_is_printed(run, small, monkeypatch):
    (first, whole), (second, refused) = [own[1:] for own in SHOWN if own[0] == "bench"]
    assert first.startswith("--model gpt2 ")
    found = run("bench", "--shapes", small, "--rounds", 2, *first.split()[2:]).out
    numbers = r"\d[\d.]*(e\+\d+)?( [KMG]iB)?"
    forms = [re.sub(numbers, "0", re.sub(r" +", " ", text)).splitlines() for text in (found, whole)]
    assert forms[0][2:4] == forms[1][2:4]
    assert [line.split()[:2] for line in forms[0][4:8]] == [line.split()[:2] for line in forms[1][4:8]]
    assert forms[0][8:] == forms[1][8:]
    monkeypatch.setattr(bench, "free_memory", lambda: int(20.6 * 2**30))
    assert run("bench", *second.split()).err == refused


def test_code_of_the_page_runs():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    said = [line.rsplit("  # ", 1) for line in block.splitlines() if "  # " in line]
    assert len(said) == 2
    for code, comment in said:
        assert repr(eval(code, names)) == comment


def test_every_option_is_on_the_page():
    for command in (bench, plan):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        words = [word for action in parser._actions for word in action.option_strings if word.startswith("--")]
        assert len(words) > 10
        for word in words:
            assert f"`{word}" in PAGE or word == "--help", word


# Progress -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [["rich"], []])
def test_progress_is_told_on_stderr(there, capsys, monkeypatch):
    monkeypatch.setattr(printing.sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(printing.importlib.util, "find_spec", lambda name: name if name in there else None)
    with printing.progress("working", 8) as advance:
        for _ in range(8):
            advance()
    said = capsys.readouterr()
    assert not said.out
    if not there:
        assert said.err.splitlines() == ["working: 25%", "working: 50%", "working: 75%", "working: 100%"]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (2**30, "1 GiB"), (3 * 2**29, "1.5 GiB"),
        (1577.4 * 2**30, "1577 GiB"), (2**28, "256 MiB"), (2**30 - 1, "1024 MiB"),
        (2.25 * 2**20, "2.25 MiB"), (512, "0.5 KiB"), (99.96 * 2**30, "100 GiB"),
    ],
)  # fmt: skip
def test_sizes_are_readable(size, text):
    assert printing.in_bytes(size) == text
