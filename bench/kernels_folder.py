"""Makes the folder that `kernels.get_local_kernel` loads, or that is uploaded as a kernel repository: `make kernels`.

    python bench/kernels_folder.py --out dist/kernels

A variant lies in `build/<its name>`: the package, its native libraries with an operators' namespace of their own, so
that it is loaded beside others of its kind, and metadata.json. There is one for the CPU (LibTorch stable ABI: every
torch from 2.10), one for CUDA where a toolkit is found, and one without native code, for all else: Triton, and the
reference. Names come from build.toml; Python 3.11 or newer makes it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parent.parent
BUILT = ROOT / "build" / "kernels"
VERSION = runpy.run_path(str(ROOT / "wd_kernels" / "version.py"))["__version__"]


def identifier(name: str, backend: str) -> str:
    """The module's name, and the operators' namespace."""
    return re.sub(r"\W", "_", f"{name}_{VERSION}_{backend}")


def source(folder: Path) -> None:
    """What a build needs, as it is now; objects of an earlier build stay, and are made anew where that is old."""
    for name in ("csrc", "wd_kernels"):
        shutil.rmtree(folder / name, ignore_errors=True)
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "_C.txt", "_cuda.txt")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy2(ROOT / name, folder)


def built(backend: str, namespace: str) -> tuple[Path, str]:
    """The package built for a backend, and for which architectures; CUDA's is demanded."""
    folder = BUILT / backend
    folder.mkdir(parents=True, exist_ok=True)
    source(folder)
    own = {"WD_KERNELS_NAMESPACE": namespace, "WD_KERNELS_CUDA": str(int(backend == "cuda"))}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True, text=True)
    if done.returncode or not list((folder / "wd_kernels").glob("_C.abi3.*")):
        raise SystemExit(f"the native libraries cannot be built: {done.stdout}{done.stderr}")
    rules = (folder / "build" / "native" / "build.ninja").read_text()
    found = re.search(r'WD_BUILT="(CUDA (\d+)\S* for .*?)"', rules) if backend == "cuda" else None
    return folder / "wd_kernels", found[1] if found else ""


def write(out: Path, variant: str, package: Path, about: dict[str, Any], native: bool) -> None:
    """One variant: the package's files and what is said of it."""
    folder = out / "build" / variant
    without = ["__pycache__", "_C.txt", "_cuda.txt", *([] if native else ["*.so"])]
    shutil.copytree(package, folder, ignore=shutil.ignore_patterns(*without))
    (folder / "metadata.json").write_text(json.dumps(about, indent=2) + "\n")
    print(f"wrote {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "kernels")
    parser.add_argument("--backends", nargs="*", choices=("cpu", "cuda"), help="by default cpu, and cuda if it can be")
    args = parser.parse_args()
    declared = tomllib.loads((ROOT / "build.toml").read_text())
    general, abi = declared["general"], declared["torch"]["stable-abi"].replace(".", "")
    backends = args.backends
    if backends is None:
        setup = runpy.run_path(str(ROOT / "setup.py"))
        try:
            setup["nvcc"]()
        except setup["CannotBuild"] as why:
            print(f"without a variant for CUDA: {why}")
            backends = ["cpu"]
        else:
            backends = ["cpu", "cuda"]
    shutil.rmtree(args.out, ignore_errors=True)
    machine = f"{platform.machine()}-{platform.system().lower()}"

    def about(backend: str, kind: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": identifier(general["name"], backend),
            "name": general["name"],
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": kind,
        }

    for backend in backends:
        package, compiled = built(backend, identifier(general["name"], backend))
        kind: dict[str, Any] = {"type": backend}
        name = backend
        if backend == "cuda":  # its runtime is inside: any driver of that major version
            release, _, architectures = compiled.removeprefix("CUDA ").partition(" for ")
            name = f"cu{release.split('.')[0]}0"
            kind["archs"] = architectures.replace(" and its PTX", "+PTX").split(", ")
        write(args.out, f"torch-stable-abi{abi}-{name}-{machine}", package, about(backend, kind), native=True)
    write(args.out, "torch-universal", ROOT / "wd_kernels", about("universal", {"type": "cpu"}), native=False)
    for file in ("build.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, args.out)


if __name__ == "__main__":
    main()
