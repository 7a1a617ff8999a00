"""What `make dist` makes: its files and tags, and that each artifact works in an empty environment."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import codegen_cuda
import pytest
from building import ENVIRONMENT, ROOT, built_in, compilers, sources

import wd_kernels


def done(*command: str | Path, cwd: Path, **more: str) -> str:
    """What a command prints; it succeeds."""
    found = subprocess.run(command, cwd=cwd, env=ENVIRONMENT | more, capture_output=True, text=True)
    assert found.returncode == 0, f"{' '.join(map(str, command))}\n{found.stdout}{found.stderr}"
    return found.stdout


def test_the_version_stands_in_one_place() -> None:
    """The package has it of version.py, the build too, and the changelog's last entry is that version's."""
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest[1] == wd_kernels.__version__
    files = [*ROOT.glob("wd_kernels/**/*.py"), ROOT / "setup.py", ROOT / "pyproject.toml"]
    holders = [path.name for path in files if f'"{wd_kernels.__version__}"' in path.read_text()]
    assert holders == ["version.py"]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make wheel-manylinux` does it, of a copy: the sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    tracked = done("git", "ls-files", cwd=ROOT).splitlines()
    for name in tracked:
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target)
    rules = (ROOT / "Makefile").read_text()
    assert 'WD_KERNELS_LINK_WITH="$$($(RUN) bench/old_glibc.py build/glibc)" $(RUN) -m build --no-isolation\n' in rules
    old = done(sys.executable, ROOT / "bench" / "old_glibc.py", folder / "glibc", cwd=folder).strip()
    build = (sys.executable, "-m", "build", "--no-isolation")
    done(*build, cwd=folder / "source", **compilers(), WD_KERNELS_LINK_WITH=old)
    return folder / "source" / "dist"


@pytest.fixture(scope="module")
def named(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel with the name that auditwheel gives it, as the Makefile calls it."""
    folder = tmp_path_factory.mktemp("named")
    rule = re.search(r"^REPAIR := .*-m (auditwheel repair .*)--wheel-dir dist$", (ROOT / "Makefile").read_text(), re.M)
    assert rule
    (wheel,) = dist.glob("*.whl")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done(sys.executable, "-m", *shlex.split(rule[1]), "--wheel-dir", folder, wheel, cwd=folder, PATH=path)
    return next(folder.glob("*.whl"))


def names(dist: Path) -> tuple[list[str], list[str]]:
    """The files of the sdist and of the wheel."""
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        own = [name.partition("/")[2] for name in sdist.getnames() if not name.endswith("/")]
    return own, zipfile.ZipFile(next(dist.glob("*.whl"))).namelist()


@pytest.mark.slow
def test_what_is_in_them(dist: Path) -> None:
    sdist, wheel = names(dist)
    version = wd_kernels.__version__
    (path,) = dist.glob("*.whl")
    assert re.fullmatch(rf"wd_kernels-{re.escape(version)}-cp310-abi3-\w+\.whl", path.name)
    modules = {str(p.relative_to(ROOT)) for p in ROOT.glob("wd_kernels/**/*.py")} | {"wd_kernels/py.typed"}
    sources = {str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.is_file()}
    assert modules | sources | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= set(sdist)
    assert not [name for name in sdist if name.startswith(("tests", "bench")) or name.endswith((".so", ".o"))]
    native = {"wd_kernels/_C.abi3.so", f"wd_kernels/_cuda.{'abi3.so' if codegen_cuda.LIBRARY.exists() else 'txt'}"}
    assert {name for name in wheel if ".dist-info/" not in name} == modules | native
    assert f"wd_kernels-{version}.dist-info/licenses/LICENSE" in wheel
    assert path.stat().st_size < 5 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the name is of glibc")
def test_the_name_of_the_wheel(dist: Path, named: Path) -> None:
    """It runs wherever torch's own wheels do (glibc 2.28); nothing was packed into it, of torch least of all."""
    tag = re.fullmatch(r"wd_kernels-[\d.]+-cp310-abi3-((?:\.?manylinux\w+)+)\.whl", named.name)
    assert tag, named.name
    oldest = min(int(n) for n in re.findall(r"manylinux_2_(\d+)_", tag[1]))
    assert oldest <= 28
    own, before = {*zipfile.ZipFile(named).namelist()}, {*names(dist)[1]}
    assert {name for name in own ^ before if not name.endswith("/")} == set()  # folders have entries of their own now
    said = zipfile.ZipFile(named).read(f"wd_kernels-{wd_kernels.__version__}.dist-info/WHEEL").decode()
    assert re.findall(r"^Tag: cp310-abi3-(\S+)$", said, re.M) == tag[1].split(".")


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has torch alone, as the README says."""
    folder = tmp_path_factory.mktemp("empty")
    done(sys.executable, "-m", "venv", "empty", cwd=folder)
    python = folder / "empty" / "bin" / "python"
    pins = (ROOT / "requirements-dev.txt").read_text().splitlines()
    done(
        python,
        "-m",
        *PIP,
        "install",
        "--no-compile",
        next(line for line in pins if line.startswith("torch==")),
        cwd=folder,
    )
    return python


PIP = ("pip", "--quiet", "--disable-pip-version-check")


#: What an installation says of itself, and whether it steps as the reference does.
STEPS = """
import torch, wd_kernels
from wd_kernels import native
print(wd_kernels.__file__, native.WHY_NOT, sep="\\n")
runs = []
for backend in ("reference", "reference" if native.C is None else "cpu"):
    p = torch.nn.Parameter(torch.linspace(-2, 3, 1031))
    opt = wd_kernels.AdamW([p], lr=0.1, weight_decay=0.3, backend=backend)
    for t in range(3):
        p.grad = torch.linspace(1, -t - 1, 1031)
        opt.step()
    runs.append(p.detach())
assert torch.equal(*runs) and runs[0].isfinite().all() and abs(float(runs[0][0]) + 2) > 0.1
"""


def stepped(python: Path, folder: Path) -> str | None:
    """Three steps of what is installed; why it has no native code, if so."""
    where, why_not = done(python, "-c", STEPS, cwd=folder).splitlines()
    assert Path(where).is_relative_to(python.parent.parent)
    return None if why_not == "None" else why_not


def installed(artifact: Path, python: Path, folder: Path, **variables: str) -> str | None:
    """The same after the artifact was installed, by nothing but pip."""
    done(python, "-m", *PIP, "uninstall", "--yes", "wd_kernels", cwd=folder)
    done(python, "-m", *PIP, "install", "--no-cache-dir", artifact, cwd=folder, **variables)
    return stepped(python, folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_installed_into_an_empty_environment(kind: str, dist: Path, named: Path, empty: Path, tmp_path: Path) -> None:
    artifact = named if kind == "*.whl" else next(dist.glob(kind))
    assert installed(artifact, empty, tmp_path, **compilers()) is None
    if kind == "*.tar.gz":  # the same package: the whole self-check, half a minute long, is of the wheel
        return
    said = done(empty, "-m", "wd_kernels", cwd=tmp_path)
    assert re.search(r"^  cpu +available$", said, re.MULTILINE), said
    assert re.search(r"^  cuda +not available: torch \S+ is built without CUDA$", said, re.MULTILINE), said
    assert re.search(r"^  check +native$", said, re.MULTILINE), said
    assert "all backends compute right" in said


@pytest.mark.slow
def test_installed_without_a_compiler_and_mended(dist: Path, empty: Path, tmp_path: Path) -> None:
    """It says what is missing, and the rest works; what it says to do, in the source folder, helps."""
    (sdist,) = dist.glob("*.tar.gz")
    said = installed(sdist, empty, tmp_path, CXX="no-such-compiler")
    why = "no C\\+\\+ compiler was found \\('no-such-compiler' is not on the PATH; CXX names another\\)"
    found = re.fullmatch(rf"the native extension is not there \({why}\); .*: (pip .*)", str(said))
    assert found, said
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    done(empty, "-m", *found[1].split(), cwd=source, **compilers() | {"WD_KERNELS_CUDA": "0"})
    assert stepped(empty, tmp_path) is None


NO_TOOLKIT = codegen_cuda.no_toolkit()
#: What hinders the CUDA library, and the reason that is given; the last two come from a toolkit that is there.
HINDRANCES = [
    ({"WD_KERNELS_CUDA": "0"}, "WD_KERNELS_CUDA=0 was set"),
    ({"CUDA_HOME": "/nowhere"}, "CUDA_HOME=/nowhere holds no bin/nvcc"),
    ({"CUDA_HOME": "../old"}, "nvcc --list-gpu-code failed: nvcc fatal: no such option"),
    ({"CUDA_HOME": "../odd"}, "nvcc cannot be run: "),
    ({"TORCH_CUDA_ARCH_LIST": "9.0;Hoper"}, "TORCH_CUDA_ARCH_LIST names 'Hoper': expected such as 9.0, 9.0a or"),
    ({"TORCH_CUDA_ARCH_LIST": "1.0"}, "nvcc failed (TORCH_CUDA_ARCH_LIST=1.0): nvcc fatal"),
]


def fake_nvcc(folder: Path, text: str) -> None:
    program = folder / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    program.write_text(text)
    program.chmod(0o755)


@pytest.mark.slow
def test_a_build_without_a_fitting_toolkit(tmp_path: Path) -> None:
    """The package is built without the CUDA library and knows why; where it was demanded, the build fails."""
    folder = sources(tmp_path)
    fake_nvcc(tmp_path / "old", "#!/bin/sh\n[ $1 = --version ] || { echo nvcc fatal: no such option; exit 1; }\n")
    fake_nvcc(tmp_path / "odd", "no program")
    package = folder / "wd_kernels"
    (package / "_cuda.abi3.so").write_text("of an earlier build")
    for variables, why in HINDRANCES if NO_TOOLKIT is None else HINDRANCES[:-2]:
        built = built_in(folder, CXX=compilers()["CXX"], **variables)
        assert built.returncode == 0, built.stderr
        reason = (package / "_cuda.txt").read_text()
        assert why in reason
        assert len(reason.splitlines()) == 1
        assert f"wd_kernels: installing without the CUDA library: {reason}" in built.stderr
        assert (package / "_C.abi3.so").exists()
        assert not (package / "_cuda.abi3.so").exists()
        if "WD_KERNELS_CUDA" not in variables:
            demanded = built_in(folder, WD_KERNELS_CUDA="1", CXX=compilers()["CXX"], **variables)
            assert demanded.returncode != 0
            assert f"WD_KERNELS_CUDA=1, and the CUDA library cannot be built: {reason}" in demanded.stderr


@pytest.mark.slow
@pytest.mark.skipif(NO_TOOLKIT is not None, reason=str(NO_TOOLKIT))
def test_builds_in_turn(tmp_path: Path) -> None:
    """For what was named, with a compiler of two words; then without anything native; then with all again."""
    folder = sources(tmp_path)
    package = folder / "wd_kernels"
    ours = compilers()
    two_words = ours | {"CXX": f"env {ours['CXX']}", "WD_KERNELS_CUDA": "1"}
    built = built_in(folder, TORCH_CUDA_ARCH_LIST="Hopper; 8.0,", **two_words)
    assert built.returncode == 0, built.stdout + built.stderr
    listed = codegen_cuda.disassembly.tool("cuobjdump", "-lelf", "-lptx", str(package / "_cuda.abi3.so"))
    found = sorted(re.findall(r"(sm_\d+)\.(\w+)", listed))
    assert found == [("sm_80", "cubin"), ("sm_90", "cubin"), ("sm_90", "ptx")]
    native = {"_C.abi3.so", "_cuda.abi3.so"}
    assert {path.name for path in package.glob("_c*.*")} | {path.name for path in package.glob("_C.*")} == native
    demanded = built_in(folder, WD_KERNELS_NO_NATIVE="1", WD_KERNELS_CUDA="1")
    assert "the CUDA library cannot be built: WD_KERNELS_NO_NATIVE was set" in demanded.stderr
    assert demanded.returncode != 0
    assert built_in(folder, WD_KERNELS_NO_NATIVE="1").returncode == 0
    assert not native & {path.name for path in package.iterdir()}
    assert (package / "_C.txt").read_text() == (package / "_cuda.txt").read_text() == "WD_KERNELS_NO_NATIVE was set\n"
    assert built_in(folder, WD_KERNELS_NO_NATIVE="0", **ours).returncode == 0
    assert native <= {path.name for path in package.iterdir()}
    assert not list(package.glob("*.txt"))
