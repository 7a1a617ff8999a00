"""backend="triton" in Triton's interpreter: what is its own. What the kernels compute is in test_kernels.py."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from cases import BODIES, bf16, f32, f64, guarded, optimizer, with_dtypes
from torch import nn

from wd_kernels import native
from wd_kernels.backends import BACKENDS, FallbackWarning, resolve
from wd_kernels.backends import triton as backend_module
from wd_kernels.formats import format_of
from wd_kernels.layout import Spec

pytest.importorskip("triton", reason="the backend under test needs triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow and NaN


def test_the_kernels_are_interpreted() -> None:
    assert BACKENDS["triton"].why_not() is None
    assert backend_module.interpreted()


def test_only_aligned_segments_take_the_vector_path(promises: list[int]) -> None:
    """The interpreter gives the same bits on both paths; the hints tell them apart."""
    case = with_dtypes([BODIES[0]], [(bf16, f32)])[0]
    for offset, n, expected in ((0, 1023, 0), (0, 1024, 4), (0, 2100, 8), (1, 2100, 0)):
        p = nn.Parameter(guarded(torch.randn(n).to(bf16), offset)[1])
        p.grad_dtype = f32
        p.grad = torch.randn(n)
        promises.clear()
        optimizer(case, [p], "triton").step()
        assert len(promises) == expected, (offset, n)  # one for each role and block
        assert set(promises) <= {8, 16}  # bfloat16 beside float32


# Choice and failures --------------------------------------------------------------------------------------------------


def in_a_process(code: str, **env: str) -> str:
    """What a new Python prints, by default without the interpreter."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env
    done = subprocess.run([sys.executable, "-c", PRELUDE + code], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


PRELUDE = """
import sys
def train(backend, steps=3):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n)) for n in (5, 0, 1100)]
    opt = wd_kernels.AdamW(params, lr=0.1, weight_decay=0.1, backend=backend)
    for step in range(steps):
        for k, p in enumerate(params):
            p.grad = None if (step + k) % 3 == 2 else torch.randn(p.shape)
        opt.step()
    return [t.tolist() for t in params + [v for p in params for _, v in sorted(opt.state[p].items())]]
def refused():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    try:
        wd_kernels.AdamW([p], backend="triton", weight_decay=0.5).step()
    except RuntimeError as error:
        print(error)
    assert p.tolist() == [1, 1, 1], "something was written"
"""
IMPORTS = "import torch, wd_kernels\n"
BLOCKED = "sys.modules['triton'] = None\n"  # an ImportError for whoever asks


def test_as_documented_with_the_environment_variable() -> None:
    """As a user has it, from the start of a process."""
    code = (
        IMPORTS
        + "assert train('triton') == train('reference') == train('cpu')\nprint(train('triton', 2) == train('cpu'))"
    )
    assert in_a_process(code, TRITON_INTERPRET="1") == "False\n"


def test_cpu_tensors_without_the_interpreter_are_an_error_that_says_how() -> None:
    code = IMPORTS + (
        "refused()\n"
        "wd_kernels.backends.BACKENDS['triton'].why_not = lambda: None\n"  # as on a machine with a GPU
        "refused()"
    )
    first, second = in_a_process(code).splitlines()
    for line in (first, second):
        assert line.startswith("backend='triton' cannot be used: ")
        assert "TRITON_INTERPRET=1" in line
        assert "CPU tensors" in line
    assert "no GPU is there" in first or torch.cuda.is_available()
    assert "the tensors are on cpu" in second


def test_without_triton() -> None:
    """One sentence that says so; "auto" steps CPU tensors and misses nothing."""
    code = BLOCKED + IMPORTS + "refused()\nprint(train('auto') == train('reference'))"
    error, same = in_a_process(code).splitlines()
    assert error.startswith("backend='triton' cannot be used: Triton is not there (import of triton halted")
    assert "pip install triton" in error
    assert same == "True"


def test_auto_does_not_import_triton_for_cpu_tensors() -> None:
    """No more of it than torch does by itself where an optimizer is made."""
    count = "print(sorted(m for m in sys.modules if m.split('.')[0] == 'triton' or m.endswith('triton_kernels')))\n"
    code = IMPORTS + count + "torch.optim.AdamW([torch.ones(3)])\n" + count + "train('auto')\ntrain('cpu')\n" + count
    at_import, of_torch, after = in_a_process(code).splitlines()
    assert at_import == "[]"
    assert after == of_torch


def test_triton_that_is_too_old() -> None:
    """Newer ones are used: here, until the import finds that the module is empty."""
    code = IMPORTS + (
        "import importlib.machinery, types\n"
        "train('reference')\n"  # torch imports Triton for itself where an optimizer is made
        "sys.modules['triton'] = fake = types.ModuleType('triton')\n"
        "fake.__spec__ = importlib.machinery.ModuleSpec('triton', None)\n"
        "for fake.__version__ in ('2.3.1', '3.5.9+git1', '3.6', '10.0.0'):\n"
        "    wd_kernels.backends.triton._kernels.cache_clear()\n"
        "    try:\n"
        "        refused()\n"
        "    except AttributeError as error:\n"
        "        print('used', error)"
    )
    first, second, *newer = in_a_process(code).splitlines()
    for version, line in (("2.3.1", first), ("3.5.9+git1", second)):
        why = f"Triton {version} is too old: 3.6 is the oldest that is known here. Here are "
        assert line.startswith(f"backend='triton' cannot be used: {why}")
    assert len(newer) == 2
    assert all(line.startswith("used ") for line in newer)


def spec(device: str, *dtypes: torch.dtype) -> Spec:
    return Spec(torch.device(device), (), tuple(format_of(dtype) for dtype in dtypes))


def test_the_interpreter_refuses_tensors_of_a_gpu() -> None:
    of_gpu = spec("cuda:0", f32, f32)
    assert BACKENDS["triton"].refuses(spec("cpu", f32, f32)) is None
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot be used: .* on cuda:0, and TRITON_INTERPRET=1"):
        resolve("triton", of_gpu)
    with pytest.warns(FallbackWarning, match="slow reference for tensors on cuda:0: .*TRITON_INTERPRET=1"):
        assert resolve("auto", of_gpu).name == "reference"


def test_auto_never_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtypes in itertools.product((f32, bf16, f64), repeat=2):
        assert resolve("auto", spec("cpu", *dtypes)).name == "cpu"
    monkeypatch.setattr(native, "WHY_NOT", "it is not there")
    with pytest.warns(FallbackWarning, match="it is not there"):
        assert resolve("auto", spec("cpu", f32, f32)).name == "reference"
