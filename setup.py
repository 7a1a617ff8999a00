"""Builds the native extension where a C++ compiler and torch's headers are; installs without it where they are not.

One shared library for every Python from 3.10 (limited API) and every torch from 2.10 (LibTorch stable ABI). Each file
of csrc/cpu/ is compiled for its own instruction set, which setuptools' Extension cannot say: so ninja builds, from the
rules below. torch is found by its place on disk, not imported, so that `pip install .` works in an isolated build too.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TARGET_TORCH = "0x020a000000000000"  # 2.10, the oldest torch supported
# Exact arithmetic: no contraction, nothing of -ffast-math. The two last flags change no value: they let the compiler
# vectorise the root and the selections.
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -ffp-contract=off -fno-math-errno -fno-trapping-math"
INSTRUCTION_SETS = {
    "baseline": "",
    "avx2": "-mavx2",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
}


def torch_home() -> Path | None:
    """The directory of the installed torch, found without importing it."""
    places = [os.environ.get("WD_KERNELS_TORCH_HOME"), *sys.path, sysconfig.get_paths()["purelib"]]
    for place in places:
        if place and (Path(place) / "torch" / "include" / "torch" / "csrc" / "stable").is_dir():
            return Path(place) / "torch"
    return None


def missing() -> str | None:
    """Why the native extension cannot be built here, or None."""
    if os.environ.get("WD_KERNELS_NO_NATIVE"):
        return "WD_KERNELS_NO_NATIVE is set"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler ({compiler!r} is not on the PATH; CXX names another)"
    if torch_home() is None:
        return "no torch headers (install torch first; WD_KERNELS_TORCH_HOME names the directory that holds it)"
    return None


def ninja_file(home: Path, build: Path, library: Path) -> str:
    """The build as ninja reads it: one compile rule, flags per file, one link."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sources = [ROOT / "csrc" / f"{name}.cpp" for name in ("ops", "tensors", "walk", "held", "assign", "gather")]
    sets = INSTRUCTION_SETS if x86 else {"baseline": ""}
    sources += [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in sets]
    includes = f"-isystem {_word(home / 'include')} -isystem {_word(sysconfig.get_paths()['include'])}"
    namespace = os.environ.get("WD_KERNELS_NAMESPACE", "wd_kernels")  # of the operators in torch.ops
    if not namespace.isidentifier():
        raise ValueError(f"WD_KERNELS_NAMESPACE={namespace!r}: expected an identifier")
    lines = [
        f"cxx = {os.environ.get('CXX', 'c++')}",
        f"flags = {FLAGS} -ffile-prefix-map={_word(ROOT)}/= -DTORCH_TARGET_VERSION={TARGET_TORCH} "
        f"-DWD_NAMESPACE={namespace} {includes}",
        "rule compile",
        "  command = $cxx $flags $set -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        f"  command = $cxx -shared $in -o $out -L{_word(home / 'lib')} -ltorch_cpu -ltorch -lc10 {linker_flags()}",
        "  description = link $out",
    ]
    objects = [build / (source.stem + ".o") for source in sources]
    for source, target in zip(sources, objects, strict=True):
        lines += [f"build {_path(target)}: compile {_path(source)}", f"  set = {sets.get(source.stem, '')}"]
    return "\n".join([*lines, f"build {_path(library)}: link {' '.join(map(_path, objects))}", ""])


def _path(path: Path) -> str:
    """A path as ninja reads it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def _word(path: object) -> str:
    """A path as a word of a ninja command, which a shell reads."""
    return shlex.quote(str(path)).replace("$", "$$")


def linker_flags() -> str:
    return "-undefined dynamic_lookup" if sys.platform == "darwin" else "-Wl,--as-needed"


class NinjaBuild(build_ext):
    """Writes the ninja file and runs it; ninja decides what is out of date."""

    def build_extension(self, ext: Extension) -> None:
        home = torch_home()
        assert home is not None
        build = ROOT / "build" / "native"  # one place for every way of building; tests look at the objects
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(home, build, library))
        ninja = shutil.which("ninja")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        subprocess.check_call([*command, "-C", str(build)])


class Abi3Wheel(bdist_wheel):
    """Tags the wheel for every Python from 3.10."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, plat = super().get_tag()
        return ("cp310", "abi3", plat) if self.distribution.ext_modules else (python, abi, plat)


why_not = missing()
if why_not is not None:
    print(f"wd_kernels: installing without the native extension: {why_not}", file=sys.stderr)

setup(
    ext_modules=[] if why_not else [Extension("wd_kernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": Abi3Wheel},
)
