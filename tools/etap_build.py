#!/usr/bin/env python3
"""Builds the operator library `libetap_mla.so` with nvcc for sm_90a, with no help from torch's or pip's machinery.

`setup.py` calls `build_library`; on its own, `python tools/etap_build.py --output DIR` does the same into DIR.
torch, CUTLASS and CUDA are found without importing anything, so a build works inside pip's build isolation and against
another torch than the one installed. Objects are kept per set of flags under build/etap and rebuilt only where a flag,
a source or one of the project's headers that it includes changed.

Environment:
  ETAP_BUILD            auto (default: what the machine allows), op (anything missing is an error), host (no library)
  ETAP_JOBS             compiler processes at once (default: the number of CPUs)
  ETAP_CUTLASS_DIR      CUTLASS's include folder (default: the nvidia-cutlass package, then an installed flashinfer)
  ETAP_TORCH_DIR        a torch package folder, holding include/ and lib/ (default: the torch of this environment)
  ETAP_EXTRA_INCLUDES   more include folders, separated by ':' (CUDA's math headers, where neither the toolkit nor the
                        packages that torch was installed with have them)
  ETAP_NVCC_FLAGS       more nvcc flags
  ETAP_COMPILE_ONLY=1   with a CPU-only torch, compile the kernels alone: a library to inspect, not to load
  ETAP_BUILD_DIR        where objects are kept (default: build/etap)
  CUDACXX, CUDA_HOME, CXX   as usual
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY_NAME = "libetap_mla.so"
REPORT_NAME = "ptxas.json"
CUTLASS_PACKAGE = "nvidia-cutlass==4.2.0.0"
ARCH_FLAGS = ["-gencode", "arch=compute_90a,code=sm_90a"]
NVCC_FLAGS = [
    "-O3", "-std=c++17", "-Xptxas", "-v", "--expt-relaxed-constexpr", "--expt-extended-lambda", "-DNDEBUG",
    "-Xcompiler", "-fPIC", "-diag-suppress", "186,174,128",
]  # fmt: skip
CXX_FLAGS = ["-O2", "-std=c++20", "-fPIC", "-DNDEBUG", "-D_GLIBCXX_USE_CXX11_ABI=1"]


class Unbuildable(RuntimeError):
    """Something the operator library needs is missing; the message says what, and how to supply it."""


# ---------------------------------------------------------------------------------------------------------------------
# Finding the parts
# ---------------------------------------------------------------------------------------------------------------------


def _site_packages() -> list[Path]:
    """Package folders of this environment, also those that pip's build isolation takes off sys.path."""
    paths = [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    return [Path(p) for p in dict.fromkeys(paths) if p and Path(p).is_dir()]


def _find_package_file(relative: str) -> Path | None:
    return next((s / relative for s in _site_packages() if (s / relative).exists()), None)


@dataclass(frozen=True)
class Torch:
    """A torch package folder: headers and libraries to build against."""

    path: Path
    version: str
    cuda: str | None

    @classmethod
    def find(cls) -> Torch:
        given = os.environ.get("ETAP_TORCH_DIR")
        version_file = Path(given) / "version.py" if given else _find_package_file("torch/version.py")
        if version_file is None or not version_file.exists():
            where = f"no version.py in ETAP_TORCH_DIR={given}" if given else "no torch in this environment"
            raise Unbuildable(f"{where}: install torch first (or set ETAP_TORCH_DIR), then build again")
        text = version_file.read_text()
        version = re.search(r"__version__ = '([^']+)'", text)
        cuda = re.search(r"^cuda\b.*= '([^']+)'", text, re.M)
        return cls(version_file.parent.resolve(), version.group(1) if version else "?", cuda.group(1) if cuda else None)

    @property
    def has_cuda_headers(self) -> bool:
        return (self.path / "include/c10/cuda/impl/cuda_cmake_macros.h").exists()

    def includes(self) -> list[Path]:
        return [self.path / "include", self.path / "include/torch/csrc/api/include"]

    def packaged_cuda_includes(self) -> list[Path]:
        """Include folders of the CUDA packages that torch was installed with, which hold what its headers include."""
        found = sorted(self.path.parent.glob("nvidia/*/include"))
        return found if _have_math_headers(found) else []

    def link_flags(self) -> list[str]:
        folder = self.path / "lib"
        names = [n for n in ("torch", "torch_cpu", "c10", "torch_cuda", "c10_cuda") if (folder / f"lib{n}.so").exists()]
        return [f"-L{folder}", *(f"-l{n}" for n in names)]


@dataclass(frozen=True)
class Nvcc:
    """nvcc, the release it reports, and its toolkit's include folders."""

    path: str
    version: str
    includes: tuple[Path, ...]

    @classmethod
    def find(cls) -> Nvcc:
        candidates = [os.environ.get("CUDACXX")]
        candidates += [f"{os.environ[v]}/bin/nvcc" for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
        candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
        path = next((found for c in candidates if c and (found := shutil.which(c))), None)
        if path is None:
            raise Unbuildable("no nvcc: install CUDA 12.4 or newer, or set CUDACXX or CUDA_HOME")
        release = re.search(r"release [\d.]+, V([\d.]+)", _output([path, "--version"]))
        top = re.search(r"^#\$ TOP=(.*)$", _output([path, "--dryrun", "-c", "x.cu"]), re.M)
        root = Path(top.group(1)).resolve() if top else Path(path).resolve().parents[1]
        includes = tuple(p for p in (root / "include", root / "include/cccl") if p.is_dir())
        return cls(path, release.group(1) if release else "?", includes)


@dataclass(frozen=True)
class Cutlass:
    """CUTLASS's include folder and version."""

    path: Path
    version: str

    @classmethod
    def find(cls) -> Cutlass:
        given = os.environ.get("ETAP_CUTLASS_DIR")
        packaged = ("cutlass_library/source/include", "flashinfer/data/cutlass/include")
        path = Path(given) if given else next((p for r in packaged if (p := _find_package_file(r))), None)
        header = path / "cutlass/version.h" if path else None
        if header is None or not header.exists():
            where = f"ETAP_CUTLASS_DIR={given} has no cutlass/version.h" if given else "no CUTLASS headers"
            raise Unbuildable(f"{where}: `pip install --no-deps {CUTLASS_PACKAGE}`, or set ETAP_CUTLASS_DIR")
        text = header.read_text()
        numbers = [re.search(rf"#define CUTLASS_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
        return cls(path.resolve(), ".".join(n.group(1) if n else "?" for n in numbers))


def _have_math_headers(folders: Iterable[Path]) -> bool:
    return any((folder / "cusparse.h").exists() for folder in folders)


def _output(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Hashes
# ---------------------------------------------------------------------------------------------------------------------


def sources_hash(root: Path = ROOT) -> str:
    """SHA-256 over `sha256sum`'s lines for every file under csrc, by sorted path.

    For a clean checkout this equals `git ls-files -z csrc | sort -z | xargs -0 sha256sum | sha256sum` in the C locale.
    """
    ours = (p for p in (root / "csrc").rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    names = sorted(p.relative_to(root).as_posix().encode() for p in ours)
    lines = [f"{_sha256(root / n.decode())}  {n.decode()}\n" for n in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The ptxas report
# ---------------------------------------------------------------------------------------------------------------------

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SMEM = re.compile(r"(\d+) bytes smem")
_BARRIERS = re.compile(r"used (\d+) barriers")
_SERIALISED = re.compile(r"\(C75(?:1\d|20)\)")


def parse_ptxas(text: str) -> tuple[dict[str, dict], list[str]]:
    """Reads `ptxas -v` output.

    Returns (kernels, warnings): per mangled kernel name its arch, registers, stack, spill_stores, spill_loads (bytes),
    smem (static, bytes) and barriers; and every line with a C7510 to C7520 code or a ptxas warning.
    """
    kernels: dict[str, dict] = {}
    warnings: list[str] = []
    current: dict = {}
    properties: dict = {}
    for line in text.splitlines():
        if m := _ENTRY.search(line):
            current = kernels.setdefault(m.group(1), {})
            current.update(arch=m.group(2), stack=0, spill_stores=0, spill_loads=0)
        elif m := _PROPERTIES.search(line):
            # a device function that was not inlined has properties of its own
            properties = kernels.get(m.group(1)) or kernels.setdefault(m.group(1), {"arch": "device function"})
        elif m := _SPILLS.search(line):
            properties.update(stack=int(m.group(1)), spill_stores=int(m.group(2)), spill_loads=int(m.group(3)))
        elif m := _USED.search(line):
            current["registers"] = int(m.group(1))
            for key, pattern in (("smem", _SMEM), ("barriers", _BARRIERS)):
                found = pattern.search(line)
                current[key] = int(found.group(1)) if found else 0
        elif _SERIALISED.search(line) or "ptxas warning" in line:
            warnings.append(line.strip())
    return kernels, warnings


def problems(kernels: dict[str, dict], warnings: list[str]) -> list[str]:
    """What a user should know of a ptxas report: spills, stack frames and serialised wgmma, one line each."""
    lines = list(warnings)
    for name, k in kernels.items():
        if k.get("spill_stores") or k.get("spill_loads") or k.get("stack"):
            sizes = f"{k.get('stack')} B stack, {k.get('spill_stores')} B spilled, {k.get('spill_loads')} B reloaded"
            lines.append(f"{sizes}: {name}")
    return lines


def _demangle(names: list[str]) -> list[str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    done = subprocess.run([tool], input="\n".join(names), stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines()
    return lines if done.returncode == 0 and len(lines) == len(names) else names


# ---------------------------------------------------------------------------------------------------------------------
# Compiling and linking
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """All that decides the library's bytes, except the sources."""

    nvcc: Nvcc
    torch: Torch
    cutlass: Cutlass
    root: Path = ROOT
    extra_includes: list[Path] = field(default_factory=list)
    extra_nvcc_flags: list[str] = field(default_factory=list)
    cxx: str = "c++"
    compile_only: bool = False

    @classmethod
    def make(cls, root: Path = ROOT) -> Plan:
        """Finds every part, or raises `Unbuildable` with the reason."""
        torch, nvcc, cutlass = Torch.find(), Nvcc.find(), Cutlass.find()
        compile_only = os.environ.get("ETAP_COMPILE_ONLY", "0") not in ("", "0")
        if not torch.has_cuda_headers and not compile_only:
            raise Unbuildable(
                f"torch {torch.version} at {torch.path} is a CPU-only build: install a CUDA build of torch, set "
                "ETAP_TORCH_DIR to one, or set ETAP_COMPILE_ONLY=1 for kernels to inspect but not to load"
            )
        if torch.cuda and torch.cuda.split(".")[0] != nvcc.version.split(".")[0]:
            raise Unbuildable(f"nvcc is {nvcc.version} but torch {torch.version} was built for CUDA {torch.cuda}")
        includes = [Path(p) for p in os.environ.get("ETAP_EXTRA_INCLUDES", "").split(os.pathsep) if p]
        return cls(
            nvcc, torch, cutlass, root, includes, shlex.split(os.environ.get("ETAP_NVCC_FLAGS", "")),
            os.environ.get("CXX", "c++"), compile_only and not torch.has_cuda_headers,
        )  # fmt: skip

    def sources(self) -> list[Path]:
        """Host code where it can be compiled, and kernel instances, in a fixed order.

        Host code first: a header that is missing then shows before minutes of kernels.
        """
        found = [] if self.compile_only else sorted(self.root.glob("csrc/ops/*.cpp"))
        found += sorted(self.root.glob("csrc/instances/*.cu"))
        if not found:
            raise Unbuildable(f"no sources under {self.root / 'csrc'}")
        return found

    def system_includes(self) -> list[Path]:
        """What host code needs of others: headers of torch, of CUDA, and those of CUDA's math libraries, which torch's
        include and a bare toolkit lacks."""
        found = [*self.torch.includes(), *self.nvcc.includes, *self.extra_includes]
        return found if _have_math_headers(found) else found + self.torch.packaged_cuda_includes()

    def command(self, source: Path) -> list[str]:
        """The compiler's command line for one source, without -o and -MF."""
        includes = [self.root / "csrc", self.cutlass.path]
        if source.suffix == ".cpp":
            # torch's headers are system headers to us: their warnings are not ours to fix
            system = [flag for p in self.system_includes() for flag in ("-isystem", str(p))]
            includes_flags = [*(f"-I{p}" for p in includes), *system]
            return [*shlex.split(self.cxx), *CXX_FLAGS, "-Wall", *includes_flags, "-c", str(source)]
        base = [self.nvcc.path, *NVCC_FLAGS, *ARCH_FLAGS, *self.extra_nvcc_flags]
        return [*base, *(f"-I{p}" for p in [*includes, *self.extra_includes]), "-c", str(source)]

    def describe(self) -> dict:
        """For the report: versions and flags, and no path."""
        return {
            "sources": sources_hash(self.root),
            "torch": self.torch.version,
            "nvcc": self.nvcc.version,
            "cutlass": self.cutlass.version,
            "arch": "sm_90a",
            "nvcc_flags": [*NVCC_FLAGS, *self.extra_nvcc_flags],
            "loadable": not self.compile_only,
        }


def _dependencies(depfile: Path, root: Path) -> list[str]:
    """The project's own files that a depfile names, relative to the root."""
    words = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    ours = {Path(w).resolve() for w in words if Path(w).exists()}
    return sorted(p.relative_to(root).as_posix() for p in ours if p.is_relative_to(root / "csrc"))


def _digest(root: Path, names: list[str]) -> str:
    lines = [f"{_sha256(root / n)} {n}" if (root / n).exists() else f"missing {n}" for n in names]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _compile(plan: Plan, source: Path, build_dir: Path, say) -> tuple[Path, dict]:
    """One object and its record, compiled where something changed. Raises CalledProcessError, the output shown."""
    command = plan.command(source)
    versions = (plan.nvcc.version, plan.torch.version, plan.cutlass.version)
    key = hashlib.sha256(repr((command[:-1], versions)).encode()).hexdigest()[:12]
    folder = build_dir / key
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / source.name
    target, depfile, record_file = (Path(f"{stem}{suffix}") for suffix in (".o", ".d", ".json"))
    name = source.relative_to(plan.root).as_posix()
    if record_file.exists() and target.exists():
        record = json.loads(record_file.read_text())
        if record["digest"] == _digest(plan.root, record["depends"]):
            return target, record
    record_file.unlink(missing_ok=True)
    say(f"compiling {name}")
    full = [*command, "-MMD" if source.suffix == ".cpp" else "-MD", "-MF", str(depfile), "-o", str(target)]
    done = subprocess.run(full, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        say(f"{shlex.join(full)}\n{done.stdout}")
        raise subprocess.CalledProcessError(done.returncode, full)
    kernels, warnings = parse_ptxas(done.stdout) if source.suffix == ".cu" else ({}, [])
    for line in done.stdout.splitlines():
        if re.search(r"\bwarning\b", line, re.I) and line.strip() not in warnings:
            say(f"{name}: {line}")
    depends = _dependencies(depfile, plan.root)
    record = {"depends": depends, "digest": _digest(plan.root, depends), "kernels": kernels, "warnings": warnings}
    record_file.write_text(json.dumps(record))
    return target, record


def build_library(output: Path, root: Path = ROOT, *, plan: Plan | None = None, say=print) -> Path:
    """Builds `output`/libetap_mla.so and, beside it, ptxas.json.

    Raises `Unbuildable` where nvcc, torch or CUTLASS is missing, and CalledProcessError where a compiler fails.
    Spills, stack frames and serialised wgmma only warn here; the tests fail on them.
    """
    plan = plan or Plan.make(root)
    sources = plan.sources()
    build_dir = Path(os.environ.get("ETAP_BUILD_DIR") or root / "build/etap").resolve()
    build_dir.mkdir(parents=True, exist_ok=True)
    jobs = max(1, int(os.environ.get("ETAP_JOBS") or os.cpu_count() or 1))
    lock = threading.Lock()

    def tell(text: str) -> None:
        with lock:
            say(f"[etap] {text}")

    versions = f"nvcc {plan.nvcc.version}, torch {plan.torch.version}, CUTLASS {plan.cutlass.version}"
    tell(f"{versions}, {len(sources)} sources, {jobs} jobs")
    with ThreadPoolExecutor(jobs) as pool:
        built = list(pool.map(lambda source: _compile(plan, source, build_dir, tell), sources))
    kernels = {name: entry for _, record in built for name, entry in record["kernels"].items()}
    warnings = [line for _, record in built for line in record["warnings"]]
    for name, readable in zip(kernels, _demangle(list(kernels)), strict=True):
        kernels[name]["name"] = readable
    for line in problems(kernels, warnings):
        tell(f"WARNING: {line}")

    output.mkdir(parents=True, exist_ok=True)
    library, partial = output / LIBRARY_NAME, output / f".{LIBRARY_NAME}.{os.getpid()}"
    link = [plan.nvcc.path, "-shared", *ARCH_FLAGS, "-o", str(partial), *(str(o) for o, _ in built)]
    link += ["-Xlinker", "--exclude-libs,ALL", "-Xlinker", "--as-needed"]
    link += [] if plan.compile_only else plan.torch.link_flags()
    done = subprocess.run(link, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        tell(f"{shlex.join(link)}\n{done.stdout}")
        raise subprocess.CalledProcessError(done.returncode, link)
    report = {"build": {**plan.describe(), "library": _sha256(partial)}, "kernels": kernels, "warnings": warnings}
    partial.replace(library)  # a process that has the old one loaded keeps it
    (output / REPORT_NAME).write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    tell(f"built {library.name}: {len(kernels)} kernels, {len(problems(kernels, warnings))} warnings")
    return library


def main() -> int:
    """Command line: builds the library, or prints what a build would use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "etap_integration/_C"
    parser.add_argument("--output", type=Path, default=default, help="folder for the library and ptxas.json")
    parser.add_argument("--show", action="store_true", help="print what would be used, and build nothing")
    args = parser.parse_args()
    try:
        if args.show:
            print(json.dumps(Plan.make().describe(), indent=1))
        else:
            build_library(args.output)
    except Unbuildable as reason:
        print(f"[etap] cannot build {LIBRARY_NAME}: {reason}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as failure:
        print(f"[etap] a compiler exited with {failure.returncode}; its output is above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
