"""Builds the unpatched rivals and the memory floor as shared libraries that the benchmark loads.

| library | what |
| --- | --- |
| `fa3.so` | FlashAttention-3, head dims 64/512 (MLA), bf16 forward only, as torch operators |
| `libfi.so`, `libfi8.so` | FlashInfer's Hopper MLA kernel behind plain C functions, bf16 and e4m3 cache |
| `libmb.so` | the memory floor: streams bytes through bulk copies |
| `fa3_d.so`, `libfi_d.so`, `libfi8_d.so` | the same kernels throttled: the emulated H20 |

The emulated H20 is a Hopper GPU on which every 16-bit wgmma is issued several times over (`throttle_cutlass`) and
kernels use 78 SMs. Throttled kernels compute wrong numbers by design: they serve for time alone.

Sources come from the package registry through pip, pinned by hash. Compiling needs nvcc 13 and no GPU. Everything lands
under `bench_dir()`; a file is moved to its place only once it is complete.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.etap_build import sources_hash

CSRC = Path(__file__).resolve().parent / "csrc"
ROOT = CSRC.parents[2]

H20_SMS = 78
"""Streaming multiprocessors of an H20."""

XFORMERS_REQUIREMENT = "xformers==0.0.33.post2"
FLASHINFER_REQUIREMENT = "flashinfer-python==0.7.2.post1"

_NAMES = {"floor": "libmb", "fa3": "fa3", "fa3-etap": "fa3-etap", "flashinfer": "libfi", "flashinfer-e4m3": "libfi8"}


def library_name(kind: str, emulated: str | None = None) -> str:
    """File name of a rival's library; the floor has no throttled twin, since it issues no wgmma."""
    return _NAMES[kind] + ("_d.so" if emulated and kind != "floor" else ".so")


def bench_dir() -> Path:
    """Where sources, objects and libraries lie: `ETAP_BENCH_DIR`, else the user's cache folder."""
    if chosen := os.environ.get("ETAP_BENCH_DIR"):
        return Path(chosen)
    import platformdirs  # needed only here: a machine that is given its libraries can do without

    return platformdirs.user_cache_path("etap") / "bench"


def library_dir() -> Path:
    """Where the built libraries lie."""
    return bench_dir() / "lib"


# ---------------------------------------------------------------------------------------------------------------------
# Sources


@dataclass(frozen=True)
class Archive:
    """A pinned file of the package registry.

    Attributes:
        requirement: name and exact version.
        sha256: hash of the file.
        folder: where it is unpacked, below the source folder.
        members: path prefixes to unpack; all if empty.
        pip_options: further options of `pip download`.
    """

    requirement: str
    sha256: str
    folder: str
    members: tuple[str, ...] = ()
    pip_options: tuple[str, ...] = ()


XFORMERS = Archive(
    XFORMERS_REQUIREMENT,
    "647ddf26578d2b8643230467ef1f0fbfef0bbe556a546bd27a70d4855d3433e1",
    "xformers",
    ("xformers-0.0.33.post2/third_party/flash-attention/",),
    # pip reads the metadata of an sdist by running its setup, which imports torch: no isolated environment
    ("--no-binary=:all:", "--no-build-isolation"),
)
FLASHINFER = Archive(
    FLASHINFER_REQUIREMENT,
    "bfdc18b9e1e4d8d0730fe4343dc0e284cd0c160086de80f99888bc4867922d49",
    "flashinfer",
    ("flashinfer/data/",),
)
TORCH = Archive(
    "torch==2.11.0",
    "0f68f4ac6d95d12e896c3b7a912b5871619542ec54d3649cf48cc1edd4dd2756",
    "torch",
    ("torch/include/", "torch/lib/"),
    (
        "--only-binary=:all:", "--python-version=3.12", "--implementation=cp",
        "--platform=manylinux_2_28_x86_64",
    ),
)  # fmt: skip
# CUDA headers that torch's own headers include and a bare toolkit lacks
CUDA_HEADERS = (
    Archive(
        "nvidia-cublas==13.1.1.3", "37936a16db8fe4ac1f065c2139360608a543a09275cb1a1af612e08cfa065436", "cublas",
        ("nvidia/cu13/include/",),
    ),
    Archive(
        "nvidia-cusolver==12.0.4.66", "0a759da5dea5c0ea10fd307de75cdeb59e7ea4fcb8add0924859b944babf1112", "cusolver",
        ("nvidia/cu13/include/",),
    ),
    Archive(
        "nvidia-cusparse==12.6.3.3", "2b3c89c88d01ee0e477cb7f82ef60a11a4bcd57b6b87c33f789350b59759360b", "cusparse",
        ("nvidia/cu13/include/",),
    ),
)  # fmt: skip


def _run(command: Sequence[str | Path], **options: object) -> None:
    texts = [str(part) for part in command]
    done = subprocess.run(texts, capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError(f"failed with status {done.returncode}: {' '.join(texts)}\n{done.stdout}{done.stderr}")


@contextmanager
def _fresh_folder(destination: Path) -> Iterator[Path]:
    """Yields a temporary folder that replaces `destination` on success and vanishes on failure."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}."))
    try:
        yield temporary
        shutil.rmtree(destination, ignore_errors=True)
        temporary.chmod(0o755)
        temporary.rename(destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(archive: Archive, folder: Path) -> Path:
    """The archive's file in `folder`, downloaded by pip unless a file with its hash is there."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = archive.requirement.split("==")[0].replace("-", "_")
    for path in sorted(folder.glob(f"{stem}-*")):
        if _sha256(path) == archive.sha256:
            return path
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        requirements = Path(temporary) / "requirements.txt"
        requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", *archive.pip_options]
        command += ["-d", temporary, "-r", str(requirements)]
        _run(command, env={**os.environ, "XFORMERS_BUILD_TYPE": "Release"})
        (path,) = (p for p in Path(temporary).iterdir() if p != requirements)
        return path.rename(folder / path.name)


def _unpack(path: Path, members: tuple[str, ...], destination: Path) -> None:
    """Unpacks the members of a wheel or sdist that begin with one of the prefixes."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(destination, [n for n in wheel.namelist() if not members or n.startswith(members)])
    else:
        with tarfile.open(path) as sdist:
            chosen = (m for m in sdist if not members or m.name.startswith(members))
            sdist.extractall(destination, chosen, filter="data")


def fetch(archive: Archive) -> Path:
    """The folder of an archive's unpacked sources, fetched where it is missing."""
    destination = bench_dir() / "src" / archive.folder
    if not destination.exists():
        path = download(archive, bench_dir() / "downloads")
        with _fresh_folder(destination) as folder:
            _unpack(path, archive.members, folder)
    return destination


def _hopper() -> Path:
    return fetch(XFORMERS) / "xformers-0.0.33.post2/third_party/flash-attention/hopper"


def _patched_fa3() -> Path:
    """A tree with the files that ETAP's series touches, patched anew."""
    from etap_integration.patching import series  # needed only here, and so are its requirements
    from etap_integration.patching.manifest import load_manifest

    release, pristine = load_manifest("flash-attention-3").release(), _hopper().parent
    destination = bench_dir() / "src/fa3-etap"
    with _fresh_folder(destination) as folder:
        for file in release.files:
            (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(pristine / file.path, folder / file.path)
        series.apply(release, folder)
    return destination


def _fa3_cutlass() -> Path:
    return _hopper().parent / "csrc/cutlass/include"


def _flashinfer_data() -> Path:
    return fetch(FLASHINFER) / "flashinfer/data"


def _cuda_home() -> Path:
    return Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


def _torch_root() -> Path:
    """The torch package to build FA3 against: the installed one if it has CUDA, else the pinned wheel's."""
    import torch

    return Path(torch.__file__).parent if torch.version.cuda else fetch(TORCH) / "torch"


def _cuda_header_dirs() -> list[Path]:
    """Include folders with the toolkit's headers and, where it lacks them, those of the CUDA libraries."""
    toolkit = [_cuda_home() / "include", _cuda_home() / "include/cccl"]
    if (toolkit[0] / "cusparse.h").exists():
        return toolkit
    installed = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/include"))
    if any((folder / "cusparse.h").exists() for folder in installed):
        return toolkit + installed
    return toolkit + [fetch(archive) / "nvidia/cu13/include" for archive in CUDA_HEADERS]


# ---------------------------------------------------------------------------------------------------------------------
# Throttling

_WGMMA_16BIT = re.compile(r'"wgmma\.mma_async\.sync\.aligned\.m64n(?P<n>\d+)k16\.')
_STATEMENT_END = re.compile(r';\\n"\s*$')


def throttle_factor(n: int) -> int:
    """How often a 16-bit wgmma of width `n` is issued, so that an H200's SM is about as slow as an H20's."""
    return 1 if n <= 8 else 2 if n <= 16 else 3 if n <= 32 else 4


def throttle_source(text: str) -> tuple[str, int]:
    """Repeats each 16-bit wgmma instruction inside its asm block; returns the text and how many there were."""
    lines: list[str] = []
    instruction: list[str] = []
    factor = count = 0
    for line in text.splitlines(keepends=True):
        if match := _WGMMA_16BIT.search(line):
            factor, count = throttle_factor(int(match["n"])), count + 1
        elif not instruction:
            lines.append(line)
            continue
        instruction.append(line)
        if _STATEMENT_END.search(line):
            lines += instruction * factor
            instruction = []
    if instruction:
        raise ValueError(f"a wgmma instruction has no end: {instruction[0].strip()}")
    return "".join(lines), count


def throttle_cutlass(include: Path, destination: Path) -> int:
    """Copies a CUTLASS include folder with every 16-bit wgmma throttled; returns how many were found."""
    total = 0
    with _fresh_folder(destination) as folder:
        shutil.copytree(include, folder, dirs_exist_ok=True)
        for path in sorted((folder / "cute/arch").glob("mma_sm90_gmma*.hpp")):
            text, count = throttle_source(path.read_text())
            path.write_text(text)
            total += count
        if not total:
            raise RuntimeError(f"no wgmma instruction found below {include}")
    return total


def _throttled(name: str, include: Path) -> Path:
    destination = bench_dir() / "throttled" / name
    if not destination.exists():
        throttle_cutlass(include, destination)
    return destination


def throttle_flashinfer_jit(data: Path) -> None:
    """Has FlashInfer's JIT build throttled modules that plan for 78 SMs, in a folder of their own, in this process.

    Args:
        data: the `data` folder of the installed package, whose CUTLASS headers are copied.

    Raises:
        RuntimeError: FlashInfer is imported already; it reads where its modules lie when it is.
    """
    base = str(bench_dir() / "flashinfer-h20")
    if os.environ.get("FLASHINFER_WORKSPACE_BASE") == base:
        return
    if "flashinfer" in sys.modules:
        raise RuntimeError("FlashInfer is imported already: an emulated H20 needs a process of its own")
    flags = [
        f"-I{_throttled('flashinfer-jit', data / 'cutlass/include')}", f"-I{CSRC}", "-include", "planned_sms.h",
        f"-DPLANNED_SMS={H20_SMS}",
    ]  # fmt: skip
    own = os.environ.get("FLASHINFER_EXTRA_CUDAFLAGS", "")
    os.environ["FLASHINFER_EXTRA_CUDAFLAGS"] = f"{own} {shlex.join(flags)}".strip()
    os.environ["FLASHINFER_WORKSPACE_BASE"] = base


# ---------------------------------------------------------------------------------------------------------------------
# Compiling

_ARCH = ("-gencode", "arch=compute_90a,code=sm_90a", "-Xcompiler", "-fPIC")
_NVCC_KERNEL = (
    "nvcc", "-O3", "-std=c++17", "--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda", "-DNDEBUG",
    "-diag-suppress", "186,174,128", *_ARCH,
)  # fmt: skip

# What the FA3 build leaves out. Of the 64-wide head dims only the 64/512 instances stay; csrc/fa3_stubs.cu fills in
# the others that flash_api.cpp refers to.
_FA3_DISABLED = (
    "BACKWARD", "FP16", "FP8", "SOFTCAP", "LOCAL", "SM8x", "CLUSTER", "APPENDKV",
    "HDIM96", "HDIM128", "HDIM192", "HDIM256",
)  # fmt: skip
_FA3_VARIANTS = ("paged_split_", "split_", "paged_", "packgqa_", "")

# The patched library's operators are registered under another name, so that one process can hold both.
FA3_ETAP_NAMESPACE = "flash_attn_3_etap"

Log = Callable[[str], None]


@dataclass(frozen=True)
class Builder:
    """Compiles the libraries.

    Attributes:
        throttled: build the twins for the emulated H20.
        jobs: compilers to run at once.
        log: receives one line for each step.
    """

    throttled: bool = False
    jobs: int = 1
    log: Log = print

    def _produce(self, target: Path, command: Sequence[str | Path]) -> Path:
        """Runs a command with `-o` a temporary file, then moves it to `target`."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self.log(f"building {target.name}")
        temporary = target.with_name(f".{os.getpid()}.{target.name}")
        try:
            _run([*command, "-o", temporary])
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        return target

    def _object(self, source: Path, command: Sequence[str | Path]) -> Path:
        """Compiles one source unless the same command has compiled it before, and with it the same headers of ours."""
        command = [*command, "-c", source]
        ours = sources_hash() if f"-I{ROOT / 'csrc'}" in command else ""
        key = hashlib.sha256("\0".join(map(str, [*command, ours])).encode() + source.read_bytes()).hexdigest()[:16]
        target = bench_dir() / "obj" / f"{source.stem}-{key}.o"
        return target if target.exists() else self._produce(target, command)

    def _library(self, kind: str) -> Path:
        return library_dir() / library_name(kind, "h20" if self.throttled else None)

    def floor(self) -> None:
        """The memory floor."""
        command = ["nvcc", "-O3", "-std=c++17", *_ARCH, "-shared", CSRC / "floor.cu"]
        self._produce(library_dir() / library_name("floor"), command)

    def flashinfer(self) -> None:
        """FlashInfer's kernel, for bf16 and for e4m3 caches."""
        data = _flashinfer_data()
        cutlass = data / "cutlass/include"
        include = [
            data / "cccl/libcudacxx/include", data / "cccl/cub", data / "cccl/thrust", data / "include", data / "csrc",
            _throttled("flashinfer", cutlass) if self.throttled else cutlass,
            data / "cutlass/tools/util/include", data / "spdlog/include",
        ]  # fmt: skip
        features = [f"-DFLASHINFER_ENABLE_{name}" for name in ("BF16", "F16", "FP8_E4M3", "FP8_E5M2")]
        for kind, fp8 in (("flashinfer", 0), ("flashinfer-e4m3", 1)):
            defines = [*features, f"-DKV_E4M3={fp8}", f"-DPLANNED_SMS={H20_SMS if self.throttled else 0}"]
            command = [*_NVCC_KERNEL, *defines, *_includes(include), "-shared", CSRC / "flashinfer_shim.cu"]
            self._produce(self._library(kind), command)

    def fa3(self) -> None:
        """FlashAttention-3."""
        hopper = _hopper()
        self._link_fa3("fa3", hopper / "flash_api.cpp", [], [])

    def fa3_etap(self) -> None:
        """FlashAttention-3 with ETAP's patch: all of upstream's objects but the patched one, and ETAP's kernels."""
        csrc = ROOT / "csrc"
        renamed = [f"-I{csrc}", f"-Dflash_attn_3={FA3_ETAP_NAMESPACE}"]
        cutlass = _throttled("fa3", _fa3_cutlass()) if self.throttled else _fa3_cutlass()
        device = [*_NVCC_KERNEL, *_includes([csrc, cutlass])]
        ours = [(source, device) for source in sorted(csrc.glob("fa3/*_sm90.cu"))]
        self._link_fa3("fa3-etap", _patched_fa3() / "hopper/flash_api.cpp", renamed, ours)

    def _link_fa3(self, kind: str, api: Path, api_flags: list[str], more: list[tuple[Path, list[str]]]) -> None:
        """Compiles upstream's kernels, `api` and `more`, (source, command) each, and links them."""
        hopper = _hopper()
        cutlass = _throttled("fa3", _fa3_cutlass()) if self.throttled else _fa3_cutlass()
        defines = [f"-DFLASHATTENTION_DISABLE_{feature}" for feature in _FA3_DISABLED]
        kernels = [
            *(hopper / f"instantiations/flash_fwd_hdim64_512_bf16_{variant}sm90.cu" for variant in _FA3_VARIANTS),
            hopper / "flash_fwd_combine.cu", hopper / "flash_prepare_scheduler.cu", CSRC / "fa3_stubs.cu",
        ]  # fmt: skip
        device = [
            *_NVCC_KERNEL, "-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED", "-DCUTLASS_ENABLE_GDC_FOR_SM90", *defines,
            *_includes([hopper, cutlass]),
        ]  # fmt: skip
        torch_root = _torch_root()
        host_include = [
            hopper, _fa3_cutlass(), torch_root / "include", torch_root / "include/torch/csrc/api/include",
            *_cuda_header_dirs(), Path(sysconfig.get_path("include")),
        ]  # fmt: skip
        host = ["g++", "-O2", "-std=c++17", "-fPIC", "-w", "-DNDEBUG", "-DPy_LIMITED_API=0x03090000", *defines]
        host += [*api_flags, *_includes(host_include)]
        work = [(api, host), *((kernel, device) for kernel in kernels), *more]
        with ThreadPoolExecutor(self.jobs) as pool:
            objects = list(pool.map(lambda item: self._object(*item), work))
        libraries = [f"-l{name}" for name in ("torch", "torch_cpu", "torch_cuda", "c10", "c10_cuda")]
        self._produce(self._library(kind), ["nvcc", "-shared", *objects, f"-L{torch_root / 'lib'}", *libraries])


def _includes(folders: Iterable[Path]) -> list[str]:
    return [f"-I{folder}" for folder in folders]
