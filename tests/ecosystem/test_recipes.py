"""Every recipe runs as it stands: its blocks one after another, or as the program that its command line starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
PAGES = sorted(page for page in (ROOT / "docs" / "recipes").glob("*.md") if page.stem != "index")
BLOCK = re.compile(r"^```(python|yaml|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:torchrun|python|deepspeed|accelerate launch) .*?(\w+\.py).*$", re.MULTILINE)
LIBRARIES = {
    "plain-pytorch": "torch", "ddp": "torch", "fsdp2": "torch", "huggingface-trainer": "transformers",
    "hydra": "hydra-core",
}  # fmt: skip


def blocks(page: Path, language: str) -> list[str]:
    return [text for own, text in BLOCK.findall(page.read_text()) if own == language]


@pytest.fixture
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """An empty folder; and what libraries keep of a run in the process is gone, before and after."""

    def forget() -> None:
        if "accelerate.state" in sys.modules:
            sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
        if dist.is_initialized():
            dist.destroy_process_group()

    forget()
    monkeypatch.chdir(tmp_path)
    yield
    forget()


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page, id=page.stem, marks=pytest.mark.works(LIBRARIES.get(page.stem, page.stem), f"recipe: {page.stem}")
        )
        for page in PAGES
    ],
)
def test_a_recipe(page: Path) -> None:
    programs = blocks(page, "python")
    assert programs, f"{page.name} has no python block"
    assert "assert " in "".join(programs), f"{page.name} checks nothing"
    for text in blocks(page, "yaml"):
        Path(text.splitlines()[0].removeprefix("#").strip()).write_text(text)
    command = COMMAND.search("\n".join(blocks(page, "bash")))
    if command is None:
        namespace = {"__name__": "__main__"}
        for number, text in enumerate(programs):
            exec(compile(text, f"{page.name}, block {number}", "exec"), namespace)
        return
    Path(command[1]).write_text("\n".join(programs))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(["bash", "-c", command[0]], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
