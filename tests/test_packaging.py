"""What packages say of themselves, and that each processor and Python is given what works there."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from email import message_from_string
from pathlib import Path
from typing import Any

import portable
import pytest
from bits import assert_same_bits
from building import ENVIRONMENT, ROOT, sources
from cases import Case, ids

import wd_kernels

OLDEST = (3, 10)
SETUP = runpy.run_path(str(ROOT / "setup.py"))


# Processors that have no instruction set of their own here ------------------------------------------------------------


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return portable.compiled(tmp_path_factory.mktemp("portable"))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", portable.every_kernel(), ids=ids)
def test_portable_mover(case: Case, program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all but x86-64 is given, compiled for this processor; `make wheel-aarch64` runs it as Arm's."""
    backend = portable.provide(monkeypatch, [program])
    portable.compare(case)
    assert backend.launches >= 4


def test_portable_mover_of_subnormals(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = portable.subnormal_run("reference")
    portable.provide(monkeypatch, [program])
    assert_same_bits(portable.subnormal_run("cpu"), expected)


# Pythons --------------------------------------------------------------------------------------------------------------


def test_every_module_is_of_the_oldest_python() -> None:
    """Its grammar; and what it imports of the standard library is named there (`make wheel` installs on the others)."""
    project = (ROOT / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.10"' in project
    assert 'target-version = "py310"' in project  # by which ruff looks at every module
    for path in (*ROOT.glob("wd_kernels/**/*.py"), ROOT / "setup.py"):
        ast.parse(path.read_text(), str(path), feature_version=OLDEST)


AUDIT = (sys.executable, "-m", "abi3audit", "--assume-minimum-abi3", "3.10", "--strict", "--summary", "--verbose")


def test_the_library_asks_for_no_symbol_that_the_limited_api_lacks() -> None:
    """Every Python symbol of the extension is of Python 3.10's stable ABI."""
    said = subprocess.run(
        [*AUDIT, next((ROOT / "wd_kernels").glob("_C.abi3.*"))],
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stdout + said.stderr
    assert "0 ABI version mismatches and 0 ABI violations" in " ".join((said.stdout + said.stderr).split())


# What the package index shows -----------------------------------------------------------------------------------------

REPOSITORY = "https://example.org/them/wd_kernels"
PAGE = """[A](docs/a.md#part), ![B](bench/b.png) and [`c`](csrc/c.h), [here](#here), [there](https://example.org).
<a href="docs/d.md"><img src="bench/e.svg"></a> `[x](y)` [`z[0](1)`](./f.md)
```python
table[key](argument)
```
[g](LICENSE)
"""
SHOWN = f"""[A]({REPOSITORY}/blob/v7/docs/a.md#part), ![B]({REPOSITORY}/raw/v7/bench/b.png) and \
[`c`]({REPOSITORY}/blob/v7/csrc/c.h), [here](#here), [there](https://example.org).
<a href="{REPOSITORY}/blob/v7/docs/d.md"><img src="{REPOSITORY}/raw/v7/bench/e.svg"></a> `[x](y)` \
[`z[0](1)`]({REPOSITORY}/blob/v7/f.md)
```python
table[key](argument)
```
[g]({REPOSITORY}/blob/v7/LICENSE)
"""


def test_links_of_a_page() -> None:
    assert SETUP["absolute"](PAGE, f"{REPOSITORY}/", "v7") == SHOWN


def described(folder: Path) -> Any:
    """The metadata of a build."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", "."]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return message_from_string((folder / "wd_kernels.egg-info" / "PKG-INFO").read_text())


def test_the_readme_as_the_package_index_shows_it(tmp_path: Path) -> None:
    """Where the project names its repository, every link leads to a file that is there; else the page is as it is."""
    folder = sources(tmp_path)
    readme = (ROOT / "README.md").read_text()
    if "\n[project.urls]" not in (ROOT / "pyproject.toml").read_text():
        assert described(folder).get_payload().rstrip() == readme.rstrip()
        with (folder / "pyproject.toml").open("a") as file:
            file.write(f'\n[project.urls]\nRepository = "{REPOSITORY}"\n')
    found = described(folder)
    (repository,) = (url.partition(", ")[2] for url in found.get_all("Project-URL") if url.startswith("Repository"))
    page = found.get_payload()
    links = re.findall(rf"{re.escape(repository)}/(blob|raw)/v{wd_kernels.__version__}/([^)\"#]+)", page)
    assert len(links) >= 10
    assert {kind for kind, _ in links} == {"blob", "raw"}
    missing = [path for _, path in links if not (ROOT / path).exists()]
    assert not missing
    assert not re.search(r"\]\((?!https?:|#)[^)\s]*\.(md|png|svg)", page)
    assert len(page.splitlines()) == len(readme.splitlines())


def test_what_the_project_says_of_itself(tmp_path: Path) -> None:
    found = described(sources(tmp_path))
    assert found["Version"] == wd_kernels.__version__
    assert found["Requires-Python"] == ">=3.10"
    assert found["License-Expression"] == "Apache-2.0"
    assert [own for own in found.get_all("Requires-Dist") if "extra" not in own] == ["torch>=2.10"]
    pythons = {own.rpartition(" ")[2] for own in found.get_all("Classifier") if "Python :: 3." in own}
    assert pythons == {"3.10", "3.11", "3.12", "3.13", "3.14"}
