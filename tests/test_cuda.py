"""backend="cuda": its operators and the choice of it, where there is no GPU. What it computes is in test_kernels.py."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import on_cpu
import pytest
import torch
from cases import Piece, assert_same, f32, f64, gradient, make_params, snapshot

import wd_kernels
from wd_kernels import native
from wd_kernels.backends import BACKENDS, FallbackWarning, cuda, resolve
from wd_kernels.clipping import Window
from wd_kernels.commands import check as program
from wd_kernels.formats import format_of
from wd_kernels.layout import Spec
from wd_kernels.norms import Bank
from wd_kernels.rules import ADAMW

ROOT = Path(__file__).parent.parent
FORMATS = [2, 2, 2, 2]  # AdamW, all float32
WIDTH = len(ADAMW.scalars)


def arguments(n: int = 1024, offset: int = 0, aligned: int = 1) -> dict[str, Any]:
    """Of cuda_step_: one segment of `n` elements, its parameter `offset` elements off alignment."""
    theta, *others = (torch.full((n + 8,), 0.5) for _ in range(4))
    assert theta.data_ptr() % 16 == 0
    row = torch.zeros(1, WIDTH, dtype=f64)
    row[0, 1:] = 0.25
    return {
        "chunks": torch.zeros(1, dtype=torch.int64),
        "places": torch.tensor([[0, 0, 0, theta.data_ptr() + 4 * offset, *(t.data_ptr() for t in others[1:])]]),
        "moving": torch.tensor([[others[0].data_ptr(), n, 0, aligned]]),
        "control": torch.tensor([1.0, 0.0], dtype=f64),
        "chunk_size": 1024,
        "rule": 0,
        "variant": 0,
        "epilogues": 0,
        "formats": FORMATS,
        "rows": row,
        "keep": (theta, *others),
    }


def step(given: dict[str, Any], token: int | None = None) -> None:
    ops = on_cpu.operators()
    ops.cuda_step_(ops.TOKEN if token is None else token, *[given[name] for name in list(given)[:10]])


# The operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("chunks", torch.zeros(1), "chunks must be a contiguous"),
        ("chunks", torch.zeros(1, 1, dtype=torch.int64), "chunks must have one dimension"),
        ("places", torch.zeros(1, 5, dtype=torch.int64), "places must have a word for every role"),
        ("places", torch.zeros(6, 2, dtype=torch.int64).T, "places must be a contiguous"),
        ("places", torch.zeros(2, 6, dtype=torch.int64), "2 places beside 1 segments"),
        ("moving", torch.zeros(4, dtype=torch.int64), "moving must have 4 columns"),
        ("rows", torch.zeros(1, 10, dtype=f64), f"rows must have {WIDTH} columns"),
        ("rows", torch.zeros(1, WIDTH), "rows must be a contiguous"),
        ("control", torch.zeros(3, dtype=f64), "control must hold grad_factor and skip"),
        ("chunk_size", 1000, "chunk_size=1000: expected a multiple of 1024"),
        ("chunk_size", 0, "chunk_size=0: expected a multiple of 1024"),
        ("chunk_size", 2**31, "expected a multiple of 1024"),
        ("formats", [2], "formats must name 2 to 16 roles"),
        ("formats", [2, 1, 2, 2], "no CUDA kernel for this rule, these epilogues and these"),
        ("formats", [3, 3, 4, 4], "no CUDA kernel for this rule, these epilogues and these"),
        ("rule", 7, "no CUDA kernel for this rule"),
        ("variant", 1, "no CUDA kernel for this rule"),
        ("variant", 2, "no CUDA kernel for this rule"),
        ("epilogues", 1 << 3, "no CUDA kernel for this rule"),
    ],
)
def test_bad_arguments_are_named(name: str, value: Any, message: str) -> None:
    given = arguments()
    given[name] = value
    with pytest.raises(RuntimeError, match=message):
        step(given)
    assert all(bool((t == 0.5).all()) for t in given["keep"])


def test_whoever_has_not_the_token_is_refused() -> None:
    """Before anything else is looked at: a table is addresses."""
    given = arguments()
    own = on_cpu.operators().TOKEN
    for token in (0, 1, -1, own + 1, own ^ (1 << 40)):
        for wrong in ({}, {"chunks": torch.zeros(1)}):
            with pytest.raises(RuntimeError, match=r"cuda_step_ is for this package alone: .* Call an optimizer, or a"):
                step({**given, **wrong}, token)
    assert all(bool((t == 0.5).all()) for t in given["keep"])
    step(given, own)
    assert not bool((given["keep"][0][:1024] == 0.5).any())


def squares(**changed: Any) -> None:
    ops, given = on_cpu.operators(), arguments()
    own = {"token": ops.TOKEN, "param": 2, "grad": 2, "accumulates": False, "copies": 1, "stride": 70, **changed}
    ops.cuda_squares_(
        own["token"], *(own.get(name, given[name]) for name in ("chunks", "places", "moving", "chunk_size")),
        *(own[name] for name in ("param", "grad", "accumulates", "copies", "stride")),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"token": 1, "chunks": torch.zeros(1)}, "cuda_squares_ is for this package alone"),
        ({"grad": 11}, "no CUDA kernel that adds up squares of these storage formats"),
        ({"param": 1}, "no CUDA kernel that adds up squares of these storage formats"),
        ({"copies": 0}, "cuda_squares_: copies and stride"),
        ({"stride": 69}, "cuda_squares_: copies and stride"),
        ({"moving": torch.zeros(4, dtype=torch.int64)}, "moving must have 4 columns"),
        ({"chunk_size": 1000}, "chunk_size=1000: expected a multiple of 1024"),
    ],
)
def test_bad_arguments_of_squares(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        squares(**changed)


def begin(which: int = -1, other: Any = None, rule: int = 0, token: int | None = None) -> Bank:
    """A step of two parameters of one group that measures nothing; tensor `which` is another."""
    ops, cpu = on_cpu.operators(), torch.device("cpu")
    bank = Bank.of(cpu, 2, [0], 1)
    rows, groups = bank.rows_for(1, ADAMW)
    limits = torch.tensor([0.0, math.inf, 0.0, math.inf, 1.0, 0.0, 0.0, math.nan], dtype=f64)
    settings = torch.full((1, len(ADAMW.settings)), 0.5, dtype=f64)
    settings[0, ADAMW.settings.index("eta")], settings[0, ADAMW.settings.index("base_lr")] = 1.0, 0.0
    sources, window = torch.zeros(1, len(ADAMW.settings) + 5, dtype=torch.int64), Window.empty()
    keys, active = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([1, 0])
    tensors = [
        bank.sums, bank.totals, bank.slots_of, limits, bank.one, bank.zero, settings, sources, keys, active, bank.steps,
        bank.fresh, bank.schedule_steps, bank.etas, groups, rows, bank.clips, bank.control, bank.found, *window,
        bank.no_loss,
    ]  # fmt: skip
    if which >= 0:
        tensors[which] = other
    ops.cuda_begin_(ops.TOKEN if token is None else token, rule, tensors)
    return bank


@pytest.mark.parametrize(
    ("which", "other", "message"),
    [
        (0, torch.zeros(1, 1, 69, dtype=torch.int64), "the tensors do not belong together"),
        (2, torch.zeros(3, dtype=torch.int64), "the tensors do not belong together"),
        (3, torch.zeros(4), "limits must be a contiguous tensor of 1 dimensions on the device that steps"),
        (4, torch.ones(2), "the tensors do not belong together"),
        (7, torch.zeros(1, 3, dtype=torch.int64), "the tensors of groups do not belong together"),
        (9, torch.ones(3, dtype=torch.int64), "the tensors do not belong together"),
        (10, torch.zeros(2, dtype=f64), "steps must be a contiguous"),
        (13, torch.zeros(2, dtype=f64), "the tensors of groups do not belong together"),
        (15, torch.zeros(1, 2 * WIDTH, dtype=f64)[:, ::2], "rows must be a contiguous"),
        (15, torch.zeros(2, WIDTH + 2, dtype=f64), "the tensors do not belong together"),
        (15, torch.zeros(1, WIDTH, dtype=f64), "the rows of this rule and of averages have"),
        (19, torch.zeros(2, 1000, dtype=f64), "what spikes are told by"),
    ],
)
def test_bad_arguments_of_the_begin_of_a_step(which: int, other: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        begin(which, other)
    with pytest.raises(RuntimeError, match="cuda_begin_ is for this package alone"):
        begin(which, other, token=1)


def test_the_begin_of_a_step_by_hand() -> None:
    """Parameter 0 takes its first step; the row of beta 1/2 has bias corrections of a half."""
    with pytest.raises(RuntimeError, match="no CUDA kernel that begins steps of this rule"):
        begin(rule=7)
    bank = begin()
    assert bank.steps.tolist() == [1.0, 0.0]
    assert bank.control.tolist() == [1.0, 0.0]
    assert math.isnan(bank.found[0].item())
    assert bank.rows is not None
    row = dict(zip((*ADAMW.scalars, "kept", "not_kept"), bank.rows[0].tolist(), strict=True))
    assert (row["kept"], row["not_kept"]) == (1.0, 0.0)
    assert (row["t"], row["step_size"], row["seed"], row["grad_scale"]) == (1.0, 1.0, 0.5, 0.5)
    assert row["inv_sqrt_bias2"] == 1 / math.sqrt(0.5)


def test_another_token_in_every_process() -> None:
    paths = [str(ROOT / "tests"), str(ROOT)]
    code = f"import sys; sys.path[:0] = {paths}; import on_cpu; print(on_cpu.operators().TOKEN)"
    found = {int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) for _ in "ab"}
    assert len({*found, on_cpu.operators().TOKEN}) == 3


def test_no_chunks_are_no_launch() -> None:
    """A launch of no blocks is an error, of CUDA and of the test build."""
    given = {**arguments(), "chunks": torch.zeros(0, dtype=torch.int64)}
    step(given)
    assert all(bool((t == 0.5).all()) for t in given["keep"])


ONE = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import test_cuda
test_cuda.step(test_cuda.arguments(offset={offset}, aligned={aligned}))
print("stepped")
"""


@pytest.mark.parametrize(("offset", "aligned", "ends"), [(0, 1, False), (1, 0, False), (1, 1, True)])
def test_a_false_promise_of_alignment_traps(offset: int, aligned: int, ends: bool) -> None:
    """So what runs in test_kernels.py is aligned where it says so, and 16-byte accesses are taken there."""
    code = ONE.format(tests=str(ROOT / "tests"), root=str(ROOT), offset=offset, aligned=aligned)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == (-signal.SIGILL if ends else 0), done.stderr
    assert done.stdout == ("" if ends else "stepped\n")


# The choice -----------------------------------------------------------------------------------------------------------


def spec(device: str) -> Spec:
    return Spec(torch.device(device), ("exp_avg", "exp_avg_sq"), tuple(format_of(f32) for _ in range(4)))


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A torch that has CUDA, as far as it says."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "load_cuda", native.load_cuda.__wrapped__)
    return monkeypatch


def test_a_torch_without_cuda(with_cuda: Any) -> None:
    with_cuda.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError) as error:
        resolve("cuda", spec("cuda:0"))
    expected = f"backend='cuda' cannot be used: torch {torch.__version__} is built without CUDA. Here are "
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize("reason", ["no CUDA toolkit was found (no nvcc)", None])
def test_a_package_without_the_library(reason: str | None, with_cuda: Any, tmp_path: Path) -> None:
    """The reason is the build's, if it has left one."""
    if reason:
        (tmp_path / "_cuda.txt").write_text(reason + "\n")
    with_cuda.setattr(native, "__file__", str(tmp_path / "native.py"))
    with_cuda.setattr(native.importlib.util, "find_spec", lambda *name: None)
    why = BACKENDS["cuda"].why_not()
    assert why is not None
    assert why.startswith(
        f"the CUDA library is not there ({reason or 'the package was built without it'}); mend that and build the "
        "package again, in its source folder: WD_KERNELS_CUDA=1 pip install "
    )


def test_a_library_that_does_not_load(with_cuda: Any) -> None:
    with_cuda.setattr(native.importlib.util, "find_spec", lambda *name: "it is there")
    with_cuda.setitem(sys.modules, "wd_kernels._cuda", None)  # an ImportError for whoever asks
    why = BACKENDS["cuda"].why_not()
    assert why is not None
    assert why.startswith("the CUDA library does not load (import of wd_kernels._cuda halted")


def test_no_gpu(with_cuda: Any) -> None:
    with_cuda.setattr(native, "load_cuda", lambda: None)
    with_cuda.setattr(torch.cuda, "is_available", lambda: False)
    assert BACKENDS["cuda"].why_not() == "no GPU is there that torch can use"


@pytest.fixture
def two_gpus(with_cuda: Any) -> Any:
    """cuda:0 is too old for the library, and cuda:1 is not; what `wrong` says of it comes before."""
    wrong: list[str] = []

    def cuda_load(device: int, rule: int, variant: int, epilogues: int, formats: list[int]) -> str:
        return wrong.pop() if wrong else ("" if device else "no kernel image is available for execution on the device")

    ops = SimpleNamespace(cuda_load=cuda_load, cuda_built=lambda: "CUDA 13.0 for 8.0, 9.0, 10.0 and its PTX")
    with_cuda.setattr(native, "load_cuda", lambda: None)
    with_cuda.setattr(native, "OPS", ops)
    with_cuda.setattr(torch.cuda, "is_available", lambda: True)
    with_cuda.setattr(torch.cuda, "get_device_capability", lambda device: (6 + device.index, 1))
    with_cuda.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    with_cuda.setitem(BACKENDS, "cuda", cuda.CUDA())
    return SimpleNamespace(wrong=wrong, patch=with_cuda)


def test_a_gpu_that_the_kernels_do_not_load_on(two_gpus: Any) -> None:
    """What it is, what CUDA says, what the library was built for, and what to do. Another GPU has nothing of it."""
    assert BACKENDS["cuda"].why_not() is None
    with pytest.raises(RuntimeError) as error:
        resolve("cuda", spec("cuda:0"))
    assert str(error.value) == (
        "backend='cuda' cannot be used: its kernels do not load on cuda:0, GPU 0 of compute capability 6.1: no kernel "
        "image is available for execution on the device; they were built with CUDA 13.0 for 8.0, 9.0, 10.0 and its "
        "PTX. If they are not for it, build them with TORCH_CUDA_ARCH_LIST=6.1 and a CUDA toolkit no newer than the "
        "driver"
    )
    assert resolve("cuda", spec("cuda:1")).name == "cuda"


def test_the_program_says_what_hinders_its_gpu(two_gpus: Any) -> None:
    two_gpus.patch.setattr(program, "device_of", lambda name: torch.device("cuda", int(name == "triton")))
    assert str(program.refusal("cuda")).startswith("its kernels do not load on cuda:0, GPU 0 of compute capability 6.1")


def test_a_failure_that_passes_is_not_remembered(two_gpus: Any) -> None:
    two_gpus.wrong.append("out of memory")
    with pytest.raises(RuntimeError, match=r"its kernels do not load on cuda:1, GPU 1 .*: out of memory"):
        resolve("cuda", spec("cuda:1"))
    assert resolve("cuda", spec("cuda:1")).name == "cuda"
    two_gpus.wrong.append("it is not asked again")
    assert resolve("cuda", spec("cuda:1")).name == "cuda"


def test_operators_in_another_namespace(with_cuda: Any) -> None:
    """A vendored build without its extension does not know its own name."""
    with_cuda.setattr(native.importlib.util, "find_spec", lambda *name: "it is there")
    with_cuda.setitem(sys.modules, "wd_kernels._cuda", SimpleNamespace())
    with_cuda.setattr(native, "OPS", SimpleNamespace())
    assert BACKENDS["cuda"].why_not() == "the CUDA library has no operators in torch.ops.wd_kernels"


def test_tensors_elsewhere() -> None:
    backend = cuda.CUDA()
    assert backend.refuses(spec("cpu")) == "the tensors are on cpu, and this backend steps CUDA tensors"


class Fake:
    """A backend that is there or not."""

    def __init__(self, name: str, why: str | None) -> None:
        self.name, self.why = name, why

    def why_not(self) -> str | None:
        return self.why

    def refuses(self, spec: Spec) -> str | None:
        return None


@pytest.mark.parametrize(
    ("triton", "own", "taken"),
    [
        (None, None, "triton"),
        ("no Triton", None, "cuda"),
        (None, "no toolkit", "triton"),
        ("no Triton", "no GPU", None),
    ],
)
def test_auto_prefers_triton(
    triton: str | None, own: str | None, taken: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "triton", Fake("triton", triton))
    monkeypatch.setitem(BACKENDS, "cuda", Fake("cuda", own))
    if taken:
        assert resolve("auto", spec("cuda:0")).name == taken
        return
    message = "on cuda:0: 'triton' cannot be used: no Triton; 'cuda' cannot be used: no GPU"
    with pytest.warns(FallbackWarning, match=message):
        assert resolve("auto", spec("cuda:0")).name == "reference"


def test_a_kernel_that_cannot_be_loaded_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "cuda", on_cpu.OnCPU())

    pieces = [Piece((1030,)), Piece((5,))]
    params = make_params(pieces, f32, f32)
    opt = wd_kernels.AdamW(params, lr=0.1, weight_decay=0.1, backend="cuda")
    for k, (p, piece) in enumerate(zip(params, pieces, strict=True)):
        p.grad = gradient(piece, f32, k)
    before = snapshot(params, opt)
    ops = on_cpu.operators()
    failing = SimpleNamespace(cuda_load=lambda *given: "out of memory", cuda_step_=ops.cuda_step_)
    with monkeypatch.context() as patch:
        patch.setattr(on_cpu.OnCPU, "ops", failing)
        with pytest.raises(RuntimeError, match="a CUDA kernel cannot be loaded on cpu: out of memory"):
            opt.step()
    assert_same({k: v for k, v in snapshot(params, opt).items() if k in before}, before)
    opt.step()
    assert not torch.equal(params[0], before["0"])
    assert float(opt.state[params[0]]["step"]) == 1
