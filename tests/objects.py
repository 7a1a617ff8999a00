"""A compiler that compiles nothing twice: `objects.py c++ ... -c a.cpp -o a.o` takes what an equal command made before.

Equal are commands of the same words but for where things lie, of compilers of the same version, with the same torch and
Python, where the source and all that csrc has to include are the same. Tests that build the package again and again use
it (building.py): what they say of files, tags and installations stays true. It takes over what `make` has compiled, so
that CI compiles little.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "build" / "objects"
MADE = ROOT / "build" / "native"


@cache
def version(compiler: str) -> str:
    return subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, text=True, check=True).stdout


@cache
def contents(csrc: Path, source: Path) -> str:
    """Of a source, and of all that it may include."""
    found = hashlib.sha256()
    for file in sorted(csrc.rglob("*.*")):
        if file.is_file() and (file == source or file.suffix != ".cpp"):
            found.update(f"{file.relative_to(csrc.parent)}\n".encode() + file.read_bytes())
    return found.hexdigest()


@cache
def headers(folder: Path) -> str:
    """What is in a folder of headers: torch's by its version, Python's likewise."""
    known = [folder.parent / "version.py", folder / "patchlevel.h"]
    found = [file.read_text() for file in known if file.is_file()]
    return found[0] if found else str(folder)


def place(compiler: str, words: Sequence[str]) -> Path | None:
    """Where the object of a command is kept; None of what compiles no file of csrc, or includes a file of tests."""
    if "-c" not in words or "-o" not in words or "WD_TEST_EPILOGUE" in " ".join(words):
        return None
    source = Path(words[words.index("-c") + 1]).resolve()
    csrc = next((parent for parent in source.parents if parent.name == "csrc"), None)
    if csrc is None:
        return None
    key, rest = [version(compiler), contents(csrc, source), str(source.relative_to(csrc))], iter(words)
    for word in rest:
        if word in ("-o", "-MF", "-c", "-ccbin"):
            next(rest)
        elif word == "-isystem":
            key.append(headers(Path(next(rest))))
        elif not word.startswith("-ffile-prefix-map="):
            key.append(word)
    return KEPT / hashlib.sha256("\n".join(key).encode()).hexdigest()


def keep(made: str | Path, kept: Path) -> None:
    """Whole or not at all: several processes keep the same."""
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=KEPT, delete=False) as file:
        file.write(Path(made).read_bytes())
    os.replace(file.name, kept)


def take_over() -> None:
    """Keeps the objects that `make` has compiled, where they are of the sources as they are now."""
    rules = MADE / "build.ninja"
    if not rules.exists():
        return
    libraries = re.findall(r"^build (\S+_(?:C|cuda)\.abi3\.so): (?:nv)?link", rules.read_text(), re.MULTILINE)
    for library in libraries:
        ninja = [shutil.which("ninja") or "ninja", "-C", str(MADE)]
        if "no work to do" not in subprocess.run([*ninja, "-n", library], capture_output=True, text=True).stdout:
            continue
        said = subprocess.run([*ninja, "-t", "commands", library], capture_output=True, text=True, check=True).stdout
        for line in said.splitlines():
            compiler, *words = shlex.split(line)
            kept = place(compiler, words)
            if kept is not None and not kept.exists():
                keep(words[words.index("-o") + 1], kept)


def main(compiler: str, *words: str) -> int:
    kept = place(compiler, words)
    if kept is None:
        return subprocess.run([compiler, *words]).returncode
    made = words[words.index("-o") + 1]
    if not kept.exists():
        done = subprocess.run([compiler, *words])
        if done.returncode:
            return done.returncode
        keep(made, kept)
        return 0
    shutil.copy(kept, made)
    if "-MF" in words:
        target, source = (path.replace(" ", "\\ ") for path in (made, words[words.index("-c") + 1]))
        Path(words[words.index("-MF") + 1]).write_text(f"{target}: {source}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
