"""Builds the interpreter: our kernels compiled to PTX, their host code, and the machine that runs both on the CPU."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from tools import etap_build

HERE = Path(__file__).resolve().parent
NAME = "_interpreter"
PTX_FLAGS = [
    "-O3", "-std=c++17", "--expt-relaxed-constexpr", "--expt-extended-lambda", "-DNDEBUG", "-Xcompiler", "-fPIC",
    "-diag-suppress", "186,174,128", "-gencode", "arch=compute_90a,code=compute_90a", "-Xfatbin", "-compress=false",
]  # fmt: skip
CXX_FLAGS = ["-O3", "-march=native", "-std=c++20", "-fPIC", "-Wno-deprecated-declarations"]


def commands(root: Path) -> dict[Path, list[str]]:
    """Compiler command by source, without -o. Raises `etap_build.Unbuildable` without nvcc, CUTLASS or pybind11."""
    nvcc, cutlass = etap_build.Nvcc.find(), etap_build.Cutlass.find()
    if importlib.util.find_spec("pybind11") is None:
        raise etap_build.Unbuildable("no pybind11")
    import pybind11

    system = [cutlass.path, *nvcc.includes, Path(pybind11.get_include()), Path(sysconfig.get_paths()["include"])]
    host = [os.environ.get("CXX", "c++"), *CXX_FLAGS, f"-I{root / 'csrc'}", *(f"-isystem{p}" for p in system)]
    device = [nvcc.path, *PTX_FLAGS, f"-I{root / 'csrc'}", f"-I{cutlass.path}"]
    made = dict.fromkeys(sorted(HERE.glob("*.cpp")), host)
    made[root / "csrc/ops/launch.cpp"] = host
    return made | dict.fromkeys(sorted((root / "csrc/instances").glob("*.cu")), device)


def build(folder: Path, root: Path = etap_build.ROOT) -> Path:
    """The module's path in `folder`, built where something changed. A failing compiler's output is in the error."""
    todo = commands(root)
    ours = sorted([*(root / "csrc").rglob("*.h"), *(root / "csrc").rglob("*.cuh")])
    headers = {".cu": _digest(ours), ".cpp": _digest([*ours, *sorted(HERE.glob("*.h"))])}
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(item: tuple[Path, list[str]]) -> Path:
        source, command = item
        key = hashlib.sha256(f"{command}{headers[source.suffix]}".encode() + source.read_bytes()).hexdigest()[:16]
        target = folder / f"{source.stem}-{key}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.o")
            _run([*command, "-c", str(source), "-o", str(partial)])
            partial.replace(target)
        return target

    with ThreadPoolExecutor(int(os.environ.get("ETAP_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, todo.items()))
    digest = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:16]
    library = folder / digest / (NAME + sysconfig.get_config_var("EXT_SUFFIX"))
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        _run([os.environ.get("CXX", "c++"), "-shared", "-o", str(partial), *map(str, objects)])
        partial.replace(library)
    return library


def load(folder: Path) -> ModuleType:
    """Builds and imports the module."""
    spec = importlib.util.spec_from_file_location(NAME, build(folder))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if reason := module.load_error():
        raise RuntimeError(f"the kernels' PTX was not understood: {reason}")
    return module


def _digest(files: list[Path]) -> str:
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")


def available() -> str | None:
    """Why the interpreter cannot be built here; None if it can."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "no C++ compiler"
    try:
        commands(etap_build.ROOT)
    except etap_build.Unbuildable as reason:
        return str(reason)
    return None
