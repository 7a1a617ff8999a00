"""What to link with, so that libraries built here run with glibc 2.24 and newer: `make wheel-manylinux`.

    WD_KERNELS_LINK_WITH="$(python bench/old_glibc.py build/glibc)" python -m build

In glibc 2.34 libpthread, libdl and librt became part of libc, and what is linked there asks for their functions by that
version, which older systems lack. They are in libc by their old versions too, which is what old programs use. So
libraries are made that have these functions by these versions alone: what is linked with them first asks for those.
Nothing of them is loaded, each system has its own by these names.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from collections import defaultdict
from pathlib import Path

MOVED = "2.34"
#: By how the names of their functions begin.
LIBRARIES = (
    (("dl",), "libdl.so.2"),
    (("shm_", "aio_", "lio_", "mq_", "timer_"), "librt.so.1"),
    (("",), "libpthread.so.0"),
)


def moved(libc: str) -> dict[str, str]:
    """Each function that has a version of 2.34 as its default: its newest version before."""
    listed = subprocess.run(["objdump", "-T", libc], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"\.text\s+\S+\s+(\(?)GLIBC_([\d.]+)\)?\s+(\w+)$", listed, re.MULTILINE)
    now = {name for hidden, version, name in found if not hidden and version == MOVED}
    before: dict[str, list[str]] = defaultdict(list)
    for hidden, version, name in found:
        if hidden and name in now:
            before[name].append(version)
    return {name: max(own, key=lambda v: [*map(int, v.split("."))]) for name, own in before.items()}


def make(folder: Path, soname: str, functions: dict[str, str]) -> Path:
    """A library of these names and versions, and nothing else."""
    code = [
        f'void own_{name}(void) {{}} __asm__(".symver own_{name}, {name}@@GLIBC_{v}");' for name, v in functions.items()
    ]
    nodes = [f"GLIBC_{version} {{}};" for version in sorted(set(functions.values()))]
    plain = folder / f"{soname.partition('.so')[0]}.so"  # nvcc takes no other endings
    source, script, library = plain.with_suffix(".c"), plain.with_suffix(".map"), plain
    source.write_text("\n".join([*code, ""]))
    script.write_text("\n".join([*nodes, ""]))
    command = ["cc", "-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{soname}", f"-Wl,--version-script={script}"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where they are made")
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    libc = subprocess.run(
        ["cc", "-print-file-name=libc.so.6"], capture_output=True, text=True, check=True
    ).stdout.strip()
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    for name, version in moved(libc).items():
        parts[next(library for begin, library in LIBRARIES if name.startswith(begin))][name] = version
    print(shlex.join(str(make(folder, soname, functions)) for soname, functions in parts.items()))


if __name__ == "__main__":
    main()
