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
    WD_KERNELS_LINK_WITH     files that both libraries are linked with
    WD_KERNELS_TORCH_HOME    the directory that holds torch
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
LIBRARIES = {"_C": "native extension", "_cuda": "CUDA library"}
BUILD = ROOT / "build" / "native"  # one place for every way of building; tests look at what lies there
TARGET_TORCH = "0x020a000000000000"  # 2.10, the oldest torch supported
# Exact arithmetic: no contraction, nothing of -ffast-math. The two last flags change no value: they let the compiler
# vectorise the root and the selections.
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -ffp-contract=off -fno-math-errno -fno-trapping-math"
LINK = "-undefined dynamic_lookup" if sys.platform == "darwin" else "-Wl,--as-needed"
LINK_WITH = os.environ.get("WD_KERNELS_LINK_WITH", "").replace("$", "$$")
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
    "Turing": "7.5+PTX", "Ampere": "8.0;8.6+PTX", "Ampere+Tegra": "8.7", "Ada": "8.9+PTX", "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX", "Blackwell+Tegra": "11.0",
}  # fmt: skip


class CannotBuild(Exception):
    """Why a library cannot be built here."""


def torch_home() -> Path:
    """The directory of the installed torch, found without importing it, where its headers and a compiler are."""
    if os.environ.get("WD_KERNELS_NO_NATIVE", "0") not in ("", "0"):
        raise CannotBuild("WD_KERNELS_NO_NATIVE was set")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        raise CannotBuild(f"no C++ compiler was found ({compiler!r} is not on the PATH; CXX names another)")
    for place in (os.environ.get("WD_KERNELS_TORCH_HOME"), *sys.path, sysconfig.get_paths()["purelib"]):
        if place and (Path(place) / "torch" / "include" / "torch" / "csrc" / "stable").is_dir():
            return Path(place) / "torch"
    raise CannotBuild(
        "torch's headers were not found (install torch first; pip's --no-build-isolation shows it to the build, or "
        "WD_KERNELS_TORCH_HOME, the directory that holds it)"
    )


# CUDA -----------------------------------------------------------------------------------------------------------------


def nvcc() -> str:
    """The compiler of the CUDA toolkit."""
    if os.environ.get("WD_KERNELS_CUDA") == "0":
        raise CannotBuild("WD_KERNELS_CUDA=0 was set")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            found = shutil.which("nvcc", path=str(Path(os.environ[name]) / "bin"))
            if found is None:
                raise CannotBuild(f"{name}={os.environ[name]} holds no bin/nvcc")
            return str(Path(found).absolute())
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise CannotBuild("no CUDA toolkit was found (no nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda)")
    return str(Path(found).absolute())


def asked(compiler: str, option: str) -> str:
    """What nvcc answers."""
    try:
        done = subprocess.run([compiler, option], capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise CannotBuild(f"{compiler} cannot be run: {error}") from None
    if done.returncode:
        raise CannotBuild(f"{compiler} {option} failed: {failure(done)}")
    return done.stdout


def architectures(compiler: str) -> list[str]:
    """What the kernels are compiled for, as torch writes it: "8.0", "9.0a", "10.0+PTX"."""
    words = re.findall(r"[^;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if not words:
        known = asked(compiler, "--list-gpu-code").split()
        found = [a for a in ARCHITECTURES if f"sm_{a.replace('.', '')}" in known]
        if not found:
            raise CannotBuild(
                f"{compiler} knows none of {', '.join(ARCHITECTURES)} (TORCH_CUDA_ARCH_LIST names others)"
            )
        return [*found[:-1], f"{found[-1]}+PTX"]
    for word in words:
        if word not in NAMED and not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", word):
            names = ", ".join(NAMED)
            raise CannotBuild(f"TORCH_CUDA_ARCH_LIST names {word!r}: expected such as 9.0, 9.0a or 9.0+PTX, or {names}")
    return list(dict.fromkeys(own for word in words for own in NAMED.get(word, word).split(";")))


def cuda_rules(home: Path, library: Path) -> list[str]:
    """How ninja builds the CUDA library; nvcc links it, with the CUDA runtime inside."""
    compiler = nvcc()
    release = re.search(r"release ([\d.]+)", asked(compiler, "--version"))
    targets = architectures(compiler)
    split = [target.replace(".", "").partition("+") for target in targets]
    codes = [(n, code) for n, _, ptx in split for code in (f"sm_{n}", *[f"compute_{n}"] * bool(ptx))]
    gencode = [f"-gencode=arch=compute_{number},code={code}" for number, code in codes]
    # A quarter of the size. Any driver that runs what CUDA 13 has built can read it.
    small = "--compress-mode=size " if release and int(release[1].split(".")[0]) >= 13 else ""
    built = f"CUDA {release[1] if release else '?'} for {', '.join(targets)}".replace("+PTX", " and its PTX")
    host = os.environ.get("CXX", "")
    ccbin = f" -ccbin {_word(host)}" if len(host.split()) == 1 else ""  # nvcc takes no "ccache g++"
    kernels, ops, single = BUILD / "kernels.o", BUILD / "cuda_ops.o", BUILD / "single_threaded.o"
    return [
        f"nvcc = {_word(compiler)}{ccbin}",
        "rule nvcc",
        f"  command = $nvcc {NVCC_FLAGS} {' '.join(gencode)} {small}-t 0 -Xcompiler -fPIC,-fvisibility=hidden "
        "-MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule nvlink",
        # libtorch.so, needed or not, brings libtorch_cuda.so where torch has it: the current stream is asked of that.
        f"  command = $nvcc -shared -nodlink -cudart static $in -o $out -L{_word(home / 'lib')} "
        f"-Xlinker --push-state,--no-as-needed,-ltorch,--pop-state -ltorch_cpu -lc10 {LINK_WITH}",
        "  description = link $out",
        *edge(kernels, "nvcc", CSRC / "cuda" / "kernels.cu"),
        *edge(
            ops,
            "compile",
            CSRC / "cuda" / "ops.cpp",
            set=f"-DWD_NAMESPACE=$namespace -DUSE_CUDA '-DWD_BUILT=\"{built}\"'",
        ),
        *edge(library, "nvlink", kernels, ops, single),
    ]


def failure(done: subprocess.CompletedProcess[str]) -> str:
    """The line of a compiler's output that says most."""
    lines = [line.strip() for line in f"{done.stdout}{done.stderr or ''}".splitlines()]
    lines = [line for line in lines if line and not line.startswith(("ninja: ", "FAILED: "))]
    telling = [line for line in lines if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)]
    return (telling or lines[-1:] or [f"exit status {done.returncode}"])[0]


# ninja ----------------------------------------------------------------------------------------------------------------


def ninja_rules(home: Path, library: Path) -> list[str]:
    """How ninja builds the library that is always there, and the CUDA kernels as the tests run them on the CPU."""
    x86 = sysconfig.get_platform().lower().endswith(("x86_64", "amd64"))  # which _PYTHON_HOST_PLATFORM may say
    sets = INSTRUCTION_SETS if x86 else {"baseline": ""}
    sources = [CSRC / "cpu" / "plan.cpp", *sorted((CSRC / "python").glob("*.cpp"))]
    sources += [CSRC / "cpu" / f"{name}.cpp" for name in sets]
    includes = f"-isystem {_word(home / 'include')} -isystem {_word(sysconfig.get_paths()['include'])}"
    namespace = os.environ.get("WD_KERNELS_NAMESPACE", "wd_kernels")  # of the operators in torch.ops
    if not namespace.isidentifier():
        raise SystemExit(f"WD_KERNELS_NAMESPACE={namespace!r}: expected an identifier")
    lines = [
        f"cxx = {os.environ.get('CXX', 'c++')}",
        f"namespace = {namespace}",
        f"flags = {FLAGS} -ffile-prefix-map={_word(ROOT)}/= -DTORCH_TARGET_VERSION={TARGET_TORCH} {includes}",
        "rule compile",
        "  command = $cxx $flags $set -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $in",
        "rule link",
        f"  command = $cxx -shared $in -o $out -L{_word(home / 'lib')} -ltorch_cpu -ltorch -lc10 {LINK} {LINK_WITH}",
        "  description = link $out",
    ]
    lines += linked(library, BUILD, sources)
    # For tests: the CPU's and CUDA's kernels with an epilogue that only tests have, CUDA's as plain loops.
    probe = "'-DWD_TEST_EPILOGUE=\"../tests/probe.h\"'"
    lines += linked(BUILD / "probe.so", BUILD / "probe", sources, probe, namespace="wd_kernels_probe")
    cuda, loops = [CSRC / "cuda" / f"{name}.cpp" for name in ("ops", "on_cpu")], "-DWD_ON_CPU '-DWD_BUILT=\"loops\"'"
    for name, more in (("on_cpu", ""), ("probe_on_cpu", f"{probe} -O1")):
        own = f"{loops} {TRAPS} {more}"
        lines += linked(BUILD / f"{name}.so", BUILD / name, cuda, own, namespace=f"wd_kernels_{name}")
    return lines


def linked(
    library: Path, folder: Path, sources: Sequence[Path], flags: str = "", namespace: str = "$namespace"
) -> list[str]:
    """How a library is built: movers for their instruction sets, what registers operators in a namespace."""
    objects = [folder / f"{source.stem}.o" for source in sources]
    lines = edge(library, "link", *objects)
    for source, target in zip(sources, objects, strict=True):
        own = INSTRUCTION_SETS.get(source.stem, "") if source.parent.name == "cpu" else f"-DWD_NAMESPACE={namespace}"
        lines += edge(target, "compile", source, set=f"{own} {flags}")
    return lines


def edge(target: Path, rule: str, *sources: Path, **variables: str) -> list[str]:
    """How a file is built."""
    build = f"build {_path(target)}: {rule} {' '.join(map(_path, sources))}"
    return [build, *(f"  {name} = {value}" for name, value in variables.items())]


def _path(path: Path) -> str:
    """A path as ninja reads it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def _word(path: object) -> str:
    """A path as a word of a ninja command, which a shell reads."""
    return shlex.quote(str(path)).replace("$", "$$")


def ninja(target: Path) -> subprocess.CompletedProcess[str]:
    """Builds what is out of date; what ninja and the compilers say is printed, and kept."""
    found = shutil.which("ninja")
    command = [found] if found else [sys.executable, "-m", "ninja"]
    command += ["-C", str(BUILD), str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, errors="replace")
    if found is None and not done.stdout:
        raise SystemExit("ninja is missing: pip install ninja")
    print(done.stdout)
    return done


class NinjaBuild(build_ext):
    """Builds both libraries. Why one is not there is written beside it: the package says it when it is asked."""

    def build_extensions(self) -> None:
        libraries = {name: Path(self.get_ext_fullpath(f"wd_kernels.{name}")).resolve() for name in LIBRARIES}
        absent = self.build(libraries["_C"], libraries["_cuda"])
        if "_cuda" in absent and os.environ.get("WD_KERNELS_CUDA") == "1":
            raise SystemExit(f"WD_KERNELS_CUDA=1, and the CUDA library cannot be built: {absent['_cuda']}")
        for name, library in libraries.items():
            reason = library.with_name(f"{name}.txt")
            reason.unlink(missing_ok=True)
            if name in absent:
                library.unlink(missing_ok=True)
                library.parent.mkdir(parents=True, exist_ok=True)
                reason.write_text(f"{absent[name]}\n", encoding="utf-8")
                print(f"wd_kernels: installing without the {LIBRARIES[name]}: {absent[name]}", file=sys.stderr)

    def build(self, library: Path, cuda_library: Path) -> dict[str, str]:
        """Why which library could not be built."""
        try:
            home = torch_home()
        except CannotBuild as why:
            return dict.fromkeys(LIBRARIES, str(why))
        absent, rules = {}, ninja_rules(home, library)
        try:
            rules += cuda_rules(home, cuda_library)
        except CannotBuild as why:
            absent["_cuda"] = str(why)
        BUILD.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        (BUILD / "build.ninja").write_text("\n".join([*rules, ""]))
        done = ninja(library)
        if done.returncode:
            raise SystemExit(f"the native extension does not compile: {failure(done)}")
        if not absent:
            done = ninja(cuda_library)
            if done.returncode or not cuda_library.exists():
                wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
                where = f" (TORCH_CUDA_ARCH_LIST={wanted})" if wanted else ""
                absent["_cuda"] = f"{nvcc()} failed{where}: {failure(done)}"
        return absent

    def copy_extensions_to_source(self) -> None:
        """What a build in place leaves in the package: each library, or why it is not there."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "wd_kernels"
        for name in LIBRARIES:
            inplace = Path(self.get_ext_fullpath(f"wd_kernels.{name}")).resolve()
            for file in (inplace.name, f"{name}.txt"):
                if not (built / file).exists():
                    inplace.with_name(file).unlink(missing_ok=True)
                elif file.endswith(".txt"):
                    shutil.copy(built / file, inplace.with_name(file))


# What the package index shows -----------------------------------------------------------------------------------------


class Project(Distribution):
    """README.md as a page of its own: its links lead into the repository, where `project.urls` names one."""

    def parse_config_files(self, *arguments: Any, **options: Any) -> None:
        super().parse_config_files(*arguments, **options)
        repository = (self.metadata.project_urls or {}).get("Repository")
        if repository:
            of_version = f"v{self.metadata.version}"
            self.metadata.long_description = absolute(self.metadata.long_description, repository, of_version)


def absolute(markdown: str, repository: str, revision: str) -> str:
    """Its relative links, in Markdown and in HTML, as addresses in the repository; code is left as it is."""

    def address(found: re.Match[str]) -> str:
        before, target, after = found.groups()
        kind = "raw" if re.search(r"\.(png|svg|gif|jpg)$", target) else "blob"
        return f"{before}{repository.rstrip('/')}/{kind}/{revision}/{target.removeprefix('./')}{after}"

    relative = r"(?![a-z][a-z0-9+.-]*:|#|/)"
    parts = re.split(r"(^ *```.*?^ *```|`[^`\n]+`)", markdown, flags=re.DOTALL | re.MULTILINE)
    for k in range(0, len(parts), 2):  # between pieces of code
        for link in (rf"(\]\(){relative}([^)\s]+)(\))", rf"(\b(?:src|href)=\"){relative}([^\"]+)(\")"):
            parts[k] = re.sub(link, address, parts[k])
    return "".join(parts)


if __name__ == "__main__":  # not where a test reads it
    setup(
        distclass=Project,
        ext_modules=[Extension(f"wd_kernels.{name}", [], py_limited_api=True, optional=True) for name in LIBRARIES],
        cmdclass={"build_ext": NinjaBuild},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
