"""The documentation: its Python runs, its links lead somewhere, Sphinx builds it, and its pictures are what is drawn.

Blocks of a page run one after another, in one namespace, which begins with what PREAMBLE makes. Those of docs/recipes
are not here: they want the libraries that they are about, and tests/ecosystem/test_recipes.py runs them.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import decay_modes
import pytest
from torch import distributed

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in [ROOT / "README.md", *DOCS.rglob("*.md")] if DOCS / "recipes" not in path.parents)
TEXTS = [*PAGES, *sorted((DOCS / "recipes").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
#: A block of Python, and what has to be there for it.
BLOCK = re.compile(r"(?:^<!-- needs: (?P<needs>\w+) -->\s*)?^```python\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)

#: What a reader has already: a model that gives its loss, batches, parameters, numbers.
PREAMBLE = """
import copy, math, torch, wd_kernels
from torch import nn
class Model(nn.Sequential):
    def forward(self, x):
        return super().forward(x).square().mean()
torch.manual_seed(0)
model = Model(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 1))
batches = torch.randn(8, 4, 8)
loss = lambda model, batch: model(batch)
optimizer = wd_kernels.AdamW(model.parameters(), lr=1e-3)
params, lr, betas, eps, weight_decay, wd = list(model.parameters()), 1e-3, (0.9, 0.999), 1e-8, 0.01, 1e-4
momentum, dampening, nesterov, lr_decay, initial_accumulator_value = 0.9, 0, False, 0.1, 0.1
log = evaluate = lambda *what: None
"""
#: And more of it, where a page speaks of more.
PREAMBLES = {
    "features/accumulation.md": "batches = torch.randn(3, 2, 4, 8).bfloat16()",
    "features/cuda-graphs.md": "model.cuda()",
    "features/functional.md": """
grads = [torch.randn_like(p) for p in params]
exp_avgs, exp_avg_sqs, momentum_buffers, state_sums = ([torch.zeros_like(p) for p in params] for _ in range(4))
(shard, grad_shard), exp_avg, exp_avg_sq, t, scale = torch.randn(2, 100), torch.zeros(100), torch.zeros(100), 1, 8.0
""",
    "features/gradient-release.md": "optimizer = wd_kernels.AdamW(model.parameters(), lr=1e-3)",
    "features/sharding.md": "model.blocks = model[::2]",
    "features/watching.md": "served_model = copy.deepcopy(model)",
}


def blocks(page: Path) -> list[tuple[str, str | None]]:
    """The Python of a page, padded to its lines there, and what it needs."""
    text = page.read_text()
    found = [(own["code"], own["needs"], text[: own.start("code")].count("\n")) for own in BLOCK.finditer(text)]
    return [("\n" * before + code, needs) for code, needs, before in found]


def run(page: Path, has: frozenset[str]) -> dict[str, Any]:
    """Runs a page's blocks, but those that need what is not there; gives what they have left."""
    own = PREAMBLES.get(str(page.relative_to(DOCS)) if page.is_relative_to(DOCS) else page.name, "")
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(PREAMBLE + own * (has >= {needs for _, needs in blocks(page) if needs}), names)
    for code, needs in blocks(page):
        compiled = compile(code, str(page), "exec")
        if needs is None or needs in has:
            exec(compiled, names)
    return names


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder to write into, and a process group of one."""
    monkeypatch.chdir(tmp_path)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def with_python(needs: str | None) -> list[Any]:
    """Pages with blocks; those alone that need something, if that is said."""
    own = [page for page in PAGES if (found := blocks(page)) and (needs is None or needs in {n for _, n in found})]
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in own]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("page", with_python(None))
def test_python_runs(page: Path) -> None:
    run(page, frozenset())


@pytest.mark.gpu
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("page", with_python("cuda"))
def test_python_runs_on_a_gpu(page: Path) -> None:
    run(page, frozenset({"cuda"}))


def test_no_python_is_missed() -> None:
    """Every fence that says Python is a block, and there are not fewer than there were."""
    assert sum(len(blocks(page)) for page in PAGES) == sum(page.read_text().count("```python") for page in PAGES) >= 25


@pytest.mark.usefixtures("alone")
def test_what_pages_say_of_results(tmp_path: Path) -> None:
    """The conversion of the guide is what its comment says; the picture of schedules is drawn."""
    names = run(DOCS / "practice.md", frozenset())
    text = (DOCS / "practice.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("convert_weight_decay(0.1"))
    code, _, comment = line.partition("  # ")
    assert f"Conversion{comment}" == repr(eval(code, names))
    run(DOCS / "schedules.md", frozenset())
    assert (tmp_path / "schedules.png").read_bytes().startswith(b"\x89PNG")


# Pages ----------------------------------------------------------------------------------------------------------------


def plain(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """What headings are called in links."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", plain(page)):
        if not target.startswith(("https://", "http://")):
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


def test_the_readme_is_read_in_two_minutes() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    assert {"    make demo ", "    make test "} <= {line[:14] for line in lines}


def test_the_readme_s_figures_are_those_that_are_kept() -> None:
    """Rows with a file: both times, to three digits, are in one line of it. Counts are those of the pages."""
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| [^|]* \| ([\d.]+) \| ([\d.]+) \| .*\]\((bench/results/.*?)\)", text, re.MULTILINE)
    assert len(rows) == 2
    for theirs, ours, path in rows:
        lines = [re.findall(r"\d+\.\d+", line) for line in (ROOT / path).read_text().splitlines()]
        assert any({f"{float(theirs):.3g}", ours} <= {f"{float(number):.3g}" for number in line} for line in lines), (
            path
        )
    behind, of = re.findall(r"(\d+) of (\d+) comparisons in which ours is behind", text)[0]
    assert f"Ours is ahead in {int(of) - int(behind)} of {of} comparisons" in (DOCS / "performance.md").read_text()
    trained = re.findall(r"trains (\d+) small networks", text)[0]
    assert f"`make study` trains {trained} networks" in (DOCS / "study.md").read_text()


@pytest.mark.slow  # half a minute of Sphinx
def test_the_site_is_built_and_asks_nobody(tmp_path: Path) -> None:
    """Without a warning (of a page in no toctree, a reference to nothing); no script, style or picture is elsewhere."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    pages = {str(page.relative_to(tmp_path).with_suffix("")) for page in tmp_path.rglob("*.html")}
    assert pages >= {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md")}
    for page in tmp_path.rglob("*.html"):
        asked = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=[\"'](?:https?:)?//[^\"']*", page.read_text()
        )
        assert asked == [], page


# Pictures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", decay_modes.MODES)
def test_what_is_drawn_of_decay_modes_is_their_equation(decay: Any) -> None:
    """What a step takes off: at another lr, and with gradients ten times as large."""
    without = decay in decay_modes.WITHOUT_LR
    for lr, size in ((1e-3, 1.0), (4e-3, 1.0), (1e-3, 10.0)):
        expected = 0.1 if without else 0.1 * lr
        if decay in ("l2", "metric_proximal"):
            expected /= size
        taken = decay_modes.share(decay, lr, 0.1, size)
        assert taken == pytest.approx(expected / (1 + 0.1 * (decay == "proximal")), rel=0.2 if decay == "l2" else 1e-3)


def test_linear_decay_overshoots_and_a_division_does_not() -> None:
    for product in (0.5, 1.5, 3.0):
        assert decay_modes.left("lr_scaled", product) == pytest.approx(1 - product)
        assert decay_modes.left("proximal", product) == pytest.approx(1 / (1 + product))
    cosine = {"lr": 0.02, "weight_decay": 0.1, "schedule": decay_modes.schedules.Cosine(1000)}
    *_, plain = decay_modes.means("lr_scaled", 1000, **cosine)
    *_, corrected = decay_modes.means("corrected", 1000, **cosine)
    assert (plain, corrected) == (pytest.approx(math.exp(-1), rel=0.01), pytest.approx(math.exp(-0.75), rel=0.01))
