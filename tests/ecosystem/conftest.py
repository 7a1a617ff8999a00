"""What works with which library: a test says it by `@pytest.mark.works("accelerate", "save and load")`.

One that shows nothing of ours with it, but something of the library itself, says `works("torchao")` alone.

`--save-matrix` writes the table, with the versions that were there, where docs and README show it.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torchvision_alone  # noqa: F401 (before whatever imports torchvision)

ROOT = Path(__file__).parent.parent.parent
BEGIN, END = "<!-- matrix:begin -->", "<!-- matrix:end -->"
SHOWN = pytest.StashKey[dict[tuple[str, str], set[str]]]()
torch.set_num_threads(1)
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--save-matrix", action="store_true", help="write what passed into docs and README")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SHOWN] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        marks = list(item.iter_markers("works"))
        if not marks:
            raise pytest.UsageError(f'{item.nodeid} does not say what it shows: @pytest.mark.works("library", "what")')
        item.user_properties.extend(("works", list(mark.args)) for mark in marks if len(mark.args) == 2)


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> None:
    """Keeps how each claim fared; with xdist this is called where the reports of all workers come together."""
    if report.when == "call" or report.outcome != "passed":
        for name, own in getattr(report, "user_properties", ()):  # what could not be collected has none
            if name == "works":
                config.stash[SHOWN].setdefault((own[0], own[1]), set()).add(report.outcome)


def table(shown: dict[tuple[str, str], set[str]], *, recipes: str, brief: bool) -> str:
    """Markdown: a row for each library, its version, and what passed; what did not is said in its own words.

    "clipping: within the step" is "clipping" where it is to be brief, "recipe: ddp" a link into the folder of them.
    """
    rows = ["| library | version | works | recipe |", "|---|---|---|---|"]
    for library in sorted({name for name, _ in shown}, key=str.lower):
        cells: dict[str, None] = {}
        pages: list[str] = []
        for what, outcomes in sorted((what, found) for (name, what), found in shown.items() if name == library):
            topic, _, detail = what.partition(": ")
            if topic == "recipe" and outcomes == {"passed"}:
                pages.append(f"[{detail}]({recipes}/{detail}.md)")
            else:
                words = topic if brief else what
                cells[words if outcomes == {"passed"} else f"**not: {what}**"] = None
        known = version(library).split("+")[0]  # of which build says nothing here
        rows.append(f"| {library} | {known} | {'; '.join(sorted(cells, key=str.lower))} | {', '.join(pages)} |")
    return "\n".join(rows)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.config.getoption("--save-matrix") or hasattr(session.config, "workerinput"):
        return
    shown = session.config.stash[SHOWN]
    for path, recipes in ((ROOT / "docs" / "compatibility.md", "recipes"), (ROOT / "README.md", "docs/recipes")):
        text = path.read_text()
        if BEGIN in text:
            before, after = text.split(BEGIN, 1)[0], text.split(END, 1)[1]
            found = table(shown, recipes=recipes, brief=path.name == "README.md")
            path.write_text(f"{before}{BEGIN}\n{found}\n{END}{after}")
