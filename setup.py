"""Builds the native libraries where a C++ compiler and torch's headers are; installs without them where they are not.

Each serves every Python from 3.10 (limited API) and every torch from 2.10 (LibTorch stable ABI): `_C` always, `_cuda`
where a CUDA toolkit is found, whatever torch is there. Each file of csrc/cpu/ is compiled for its own instruction set
and csrc/cuda/ by nvcc, which setuptools' Extension cannot say: so ninja builds, from the rules below. torch is found by
its place on disk, not imported, so that `pip install .` works in an isolated build too.

Environment, beside CXX:
    WD_KERNELS_NO_NATIVE     1: no native library at all
    WD_KERNELS_CUDA          1: without the CUDA library the build fails; 0: it is not built; else: where that can be
    CUDA_HOME, CUDA_PATH     the CUDA toolkit (or else: that of the nvcc on the PATH, or /usr/local/cuda)
    TORCH_CUDA_ARCH_LIST     what it is built for, as torch reads it: "8.0;9.0+PTX"
    WD_KERNELS_NAMESPACE     the operators' namespace in torch.ops
    WD_KERNELS_TORCH_HOME    the directory that holds torch
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
BUILD = ROOT / "build" / "native"  # one place for every way of building; tests look at what lies there
TARGET_TORCH = "0x020a000000000000"  # 2.10, the oldest torch supported
# Exact arithmetic: no contraction, nothing of -ffast-math. The two last flags change no value: they let the compiler
# vectorise the root and the selections.
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -ffp-contract=off -fno-math-errno -fno-trapping-math"
INSTRUCTION_SETS = {
    "baseline": "",
    "avx2": "-mavx2",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
}
#: Of the test build: what would be a fault on a GPU, or wrong, ends the process.
TRAPS = "-fsanitize=alignment,bounds,null,shift,signed-integer-overflow -fsanitize-undefined-trap-on-error"
NVCC_FLAGS = "-std=c++17 -O3 -fmad=false -prec-div=true -prec-sqrt=true -ftz=false"
ARCHITECTURES = ("8.0", "9.0", "10.0")  # and PTX of the last, for what comes after
#: Names that torch has for lists of architectures.
NAMED = {
    "Turing": "7.5+PTX", "Ampere": "8.0;8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}  # fmt: skip


def torch_home() -> Path | None:
    """The directory of the installed torch, found without importing it."""
    places = [os.environ.get("WD_KERNELS_TORCH_HOME"), *sys.path, sysconfig.get_paths()["purelib"]]
    for place in places:
        if place and (Path(place) / "torch" / "include" / "torch" / "csrc" / "stable").is_dir():
            return Path(place) / "torch"
    return None


def missing() -> str | None:
    """Why nothing native can be built here, or None."""
    if os.environ.get("WD_KERNELS_NO_NATIVE"):
        return "WD_KERNELS_NO_NATIVE is set"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler ({compiler!r} is not on the PATH; CXX names another)"
    if torch_home() is None:
        return "no torch headers (install torch first; WD_KERNELS_TORCH_HOME names the directory that holds it)"
    return None


# CUDA -----------------------------------------------------------------------------------------------------------------


class NoCuda(Exception):
    """Why the CUDA library cannot be built here."""


def nvcc() -> str:
    """The compiler of the CUDA toolkit."""
    if os.environ.get("WD_KERNELS_CUDA") == "0":
        raise NoCuda("WD_KERNELS_CUDA=0 was set")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            found = shutil.which("nvcc", path=str(Path(os.environ[name]) / "bin"))
            if found is None:
                raise NoCuda(f"{name}={os.environ[name]} holds no bin/nvcc")
            return found
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise NoCuda("no CUDA toolkit was found (no nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda)")
    return found


def asked(compiler: str, option: str) -> str:
    """What nvcc answers."""
    done = subprocess.run([compiler, option], capture_output=True, text=True)
    if done.returncode:
        raise NoCuda(f"{compiler} {option} failed: {first_error(done.stdout + done.stderr)}")
    return done.stdout


def architectures(compiler: str) -> list[str]:
    """What the kernels are compiled for, as torch writes it: "8.0", "9.0a", "10.0+PTX"."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if not wanted.strip():
        known = asked(compiler, "--list-gpu-code").split()
        found = [a for a in ARCHITECTURES if f"sm_{a.replace('.', '')}" in known]
        if not found:
            raise NoCuda(f"{compiler} knows none of {', '.join(ARCHITECTURES)} (TORCH_CUDA_ARCH_LIST names others)")
        return [*found[:-1], f"{found[-1]}+PTX"]
    for name, own in NAMED.items():
        wanted = wanted.replace(name, own)
    found = list(dict.fromkeys(re.split(r"[;,\s]+", wanted.strip(" ;,"))))
    for one in found:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", one):
            names = ", ".join(NAMED)
            raise NoCuda(f"TORCH_CUDA_ARCH_LIST names {one!r}: expected such as 9.0, 9.0a or 9.0+PTX, or {names}")
    return found


def cuda_rules(home: Path, library: Path) -> list[str]:
    """How ninja builds the CUDA library; nvcc links it, with the CUDA runtime inside."""
    compiler = nvcc()
    release = re.search(r"release ([\d.]+)", asked(compiler, "--version"))
    targets = architectures(compiler)
    gencode = []
    for target in targets:
        number = target.removesuffix("+PTX").replace(".", "")
        codes = [f"sm_{number}"] + ([f"compute_{number}"] if target.endswith("+PTX") else [])
        gencode += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    built = f"CUDA {release[1] if release else '?'} for {', '.join(targets)}".replace("+PTX", " and its PTX")
    host = f"-ccbin {shlex.quote(os.environ['CXX'])} " if os.environ.get("CXX") else ""
    kernels, ops = BUILD / "kernels.o", BUILD / "cuda_ops.o"
    return [
        f"nvcc = {_word(compiler)} {host}",
        "rule nvcc",
        f"  command = $nvcc {NVCC_FLAGS} {' '.join(gencode)} -t 0 -Xcompiler -fPIC,-fvisibility=hidden "
        f"-Xcompiler -ffile-prefix-map={_word(ROOT)}/= -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule nvlink",
        # libtorch.so, needed or not, brings libtorch_cuda.so where torch has it: the current stream is asked of that.
        f"  command = $nvcc -shared -nodlink -cudart static $in -o $out -L{_word(home / 'lib')} "
        "-Xlinker --push-state,--no-as-needed,-ltorch,--pop-state -ltorch_cpu -lc10",
        "  description = link $out",
        f"build {_path(kernels)}: nvcc {_path(ROOT / 'csrc' / 'cuda' / 'kernels.cu')}",
        f"build {_path(ops)}: compile {_path(ROOT / 'csrc' / 'cuda' / 'ops.cpp')}",
        f"  set = -DUSE_CUDA '-DWD_BUILT=\"{built}\"'",
        f"build {_path(library)}: nvlink {_path(kernels)} {_path(ops)}",
    ]


def first_error(output: str) -> str:
    """The line of a compiler's output that says most."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)), (lines or ["?"])[-1])


# ninja ----------------------------------------------------------------------------------------------------------------


def ninja_rules(home: Path, library: Path) -> list[str]:
    """How ninja builds the library that is always there, and the CUDA kernels as the tests run them on the CPU."""
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
        f"namespace = {namespace}",
        f"flags = {FLAGS} -ffile-prefix-map={_word(ROOT)}/= -DTORCH_TARGET_VERSION={TARGET_TORCH} {includes}",
        "rule compile",
        "  command = $cxx $flags -DWD_NAMESPACE=$namespace $set -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        f"  command = $cxx -shared $in -o $out -L{_word(home / 'lib')} -ltorch_cpu -ltorch -lc10 {linker_flags()}",
        "  description = link $out",
    ]
    objects = [BUILD / (source.stem + ".o") for source in sources]
    for source, target in zip(sources, objects, strict=True):
        lines += [f"build {_path(target)}: compile {_path(source)}", f"  set = {sets.get(source.stem, '')}"]
    lines.append(f"build {_path(library)}: link {' '.join(map(_path, objects))}")
    on_cpu = [BUILD / "on_cpu" / f"{name}.o" for name in ("ops", "on_cpu")]
    for target in on_cpu:
        lines += [f"build {_path(target)}: compile {_path(ROOT / 'csrc' / 'cuda' / f'{target.stem}.cpp')}"]
        lines += [f"  set = -DWD_ON_CPU '-DWD_BUILT=\"plain loops\"' {TRAPS}", "  namespace = wd_kernels_on_cpu"]
    return [*lines, f"build {_path(BUILD / 'on_cpu.so')}: link {' '.join(map(_path, on_cpu))}"]


def _path(path: Path) -> str:
    """A path as ninja reads it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def _word(path: object) -> str:
    """A path as a word of a ninja command, which a shell reads."""
    return shlex.quote(str(path)).replace("$", "$$")


def linker_flags() -> str:
    return "-undefined dynamic_lookup" if sys.platform == "darwin" else "-Wl,--as-needed"


def ninja(target: Path) -> subprocess.CompletedProcess[str]:
    found = shutil.which("ninja")
    command = [found] if found else [sys.executable, "-m", "ninja"]
    return subprocess.run([*command, "-C", str(BUILD), str(target)], stdout=subprocess.PIPE, text=True)


class NinjaBuild(build_ext):
    """Writes the ninja file and runs it; ninja decides what is out of date."""

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        if ext.name.endswith("._cuda"):
            self.build_cuda(library)
            return
        home = torch_home()
        assert home is not None
        BUILD.mkdir(parents=True, exist_ok=True)
        rules = ninja_rules(home, library)
        (BUILD / "build.ninja").write_text("\n".join([*rules, ""]))
        done = ninja(library)
        print(done.stdout)
        done.check_returncode()

    def copy_extensions_to_source(self) -> None:
        """What a build in place leaves in the package: the CUDA library, or why it is not there."""
        super().copy_extensions_to_source()
        built = Path(self.get_ext_fullpath("wd_kernels._cuda")).resolve()  # as inplace as the command is now
        inside = Path(self.build_lib) / "wd_kernels"
        for name in (built.name, "_cuda.txt"):
            built.with_name(name).unlink(missing_ok=True)
            if (inside / name).exists():
                shutil.copy(inside / name, built.with_name(name))

    def build_cuda(self, library: Path) -> None:
        """Whatever hinders is written beside the library that is missing: the package says it when it is asked."""
        reason = library.with_name("_cuda.txt")
        reason.unlink(missing_ok=True)
        home = torch_home()
        assert home is not None
        try:
            rules = cuda_rules(home, library)
            with (BUILD / "build.ninja").open("a") as file:
                file.write("\n".join([*rules, ""]))
            done = ninja(library)
            print(done.stdout)
            if done.returncode:
                raise NoCuda(f"{nvcc()} failed: {first_error(done.stdout)}")
        except NoCuda as why:
            if os.environ.get("WD_KERNELS_CUDA") == "1":
                raise SystemExit(f"WD_KERNELS_CUDA=1, and the CUDA library cannot be built: {why}") from None
            library.unlink(missing_ok=True)
            reason.write_text(f"{why}\n")
            print(f"wd_kernels: installing without the CUDA library: {why}", file=sys.stderr)


class Abi3Wheel(bdist_wheel):
    """Tags the wheel for every Python from 3.10."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, plat = super().get_tag()
        return ("cp310", "abi3", plat) if self.distribution.ext_modules else (python, abi, plat)


def libraries() -> list[Extension]:
    """What is built here: the CUDA library may turn out to be impossible."""
    why_not = missing()
    if why_not is not None:
        print(f"wd_kernels: installing without the native extension: {why_not}", file=sys.stderr)
        return []
    return [
        Extension("wd_kernels._C", sources=[], py_limited_api=True),
        Extension("wd_kernels._cuda", sources=[], py_limited_api=True, optional=True),
    ]


if __name__ == "__main__":  # not where a test reads it
    setup(ext_modules=libraries(), cmdclass={"build_ext": NinjaBuild, "bdist_wheel": Abi3Wheel})
