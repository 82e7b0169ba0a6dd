"""The build: its report parser, its hashes, and the kernels of the library where one is built."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from etap_integration import _library

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import etap_build  # noqa: E402  (needs the path above)

REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fPf' for 'sm_90a'
ptxas info    : Function properties for _Z1fPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 9 barriers, 1024 bytes smem
ptxas info    : Compile time = 12.3 ms
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x in '_Z1gPf'
ptxas info    : Compiling entry function '_Z1gPf' for 'sm_90a'
ptxas info    : Function properties for _Z1gPf
    48 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size
ptxas info    : Function properties for _Z6helperv
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""


def test_ptxas_report_is_read() -> None:
    kernels, warnings = etap_build.parse_ptxas(REPORT)
    assert kernels["_Z1fPf"] == {
        "arch": "sm_90a", "registers": 168, "barriers": 9, "smem": 1024,
        "stack": 0, "spill_stores": 0, "spill_loads": 0,
    }  # fmt: skip
    assert kernels["_Z1gPf"]["registers"] == 255 and kernels["_Z1gPf"]["spill_loads"] == 12
    assert len(warnings) == 1 and "C7510" in warnings[0]
    told = etap_build.problems(kernels, warnings)
    assert len(told) == 3 and any("48 B stack" in line for line in told) and any("_Z6helperv" in line for line in told)


def test_sources_hash_is_sha256sums() -> None:
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum")
    lines = subprocess.run(
        "find csrc -type f -not -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum",
        shell=True, cwd=ROOT, capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert etap_build.sources_hash() == hashlib.sha256(lines).hexdigest()


def test_sources_hash_follows_names_and_contents(tmp_path: Path) -> None:
    files = {"csrc/a.h": "one", "csrc/B.cu": "two", "csrc/deep/er/c d.cuh": "", "csrcs/not": "x", "other": "y"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    before = etap_build.sources_hash(tmp_path)
    (tmp_path / "other").write_text("z")
    assert etap_build.sources_hash(tmp_path) == before
    (tmp_path / "csrc/a.h").write_text("three")
    changed = etap_build.sources_hash(tmp_path)
    (tmp_path / "csrc/a.h").rename(tmp_path / "csrc/b.h")
    assert len({before, changed, etap_build.sources_hash(tmp_path)}) == 3


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ETAP_TORCH_DIR", str(tmp_path))
    with pytest.raises(etap_build.Unbuildable, match="ETAP_TORCH_DIR"):
        etap_build.Torch.find()
    monkeypatch.setenv("ETAP_CUTLASS_DIR", str(tmp_path))
    with pytest.raises(etap_build.Unbuildable, match="has no cutlass/version"):
        etap_build.Cutlass.find()
    monkeypatch.setattr(etap_build.shutil, "which", lambda _: None)
    with pytest.raises(etap_build.Unbuildable, match="no nvcc"):
        etap_build.Nvcc.find()


def test_objects_are_rebuilt_when_a_header_changes(tmp_path: Path) -> None:
    """The object cache, with a shell script for a compiler."""
    compiler = tmp_path / "cxx"
    compiler.write_text(
        "#!/bin/sh\necho run >>" + str(tmp_path / "runs") + '\nwhile [ $# -gt 0 ]; do case "$1" in\n'
        '-MF) dep=$2;; -o) out=$2;; -c) src=$2;; esac; shift; done\ntouch "$out"\n'
        'echo "$out: $src ' + str(tmp_path / "csrc/a.h") + '" >"$dep"\n'
    )
    compiler.chmod(0o755)
    source, header = tmp_path / "csrc/ops/a.cpp", tmp_path / "csrc/a.h"
    source.parent.mkdir(parents=True)
    source.write_text("1")
    header.write_text("1")
    (tmp_path / "csrc/other.h").write_text("1")
    nvcc = etap_build.Nvcc("nvcc", "13.0", ())
    torch = etap_build.Torch(tmp_path, "2", "13.0")
    cutlass = etap_build.Cutlass(tmp_path, "4")
    plan = etap_build.Plan(nvcc, torch, cutlass, tmp_path, cxx=str(compiler))
    runs = []
    for change in (None, None, header, tmp_path / "csrc/other.h", source, None):
        if change:
            change.write_text(str(len(runs) + 2))
        etap_build._compile(plan, source, tmp_path / "build", lambda _: None)
        runs.append((tmp_path / "runs").read_text().count("run"))
    assert runs == [1, 1, 2, 2, 3, 3]


def test_headers_of_cudas_libraries_are_found(tmp_path: Path) -> None:
    """torch's headers include them: the toolkit's, a given folder's, or those of torch's own CUDA packages."""
    toolkit, packaged = tmp_path / "cuda/include", tmp_path / "site/nvidia/cu13/include"
    for folder in (toolkit, packaged, tmp_path / "site/torch"):
        folder.mkdir(parents=True)
    nvcc = etap_build.Nvcc("nvcc", "13.0", (toolkit,))
    torch = etap_build.Torch(tmp_path / "site/torch", "2", "13.0")
    plan = etap_build.Plan(nvcc, torch, etap_build.Cutlass(tmp_path, "4"), tmp_path)
    assert packaged not in plan.system_includes(), "it has none"
    (packaged / "cusparse.h").touch()
    assert plan.system_includes()[-2:] == [toolkit, packaged], "the toolkit's own headers come first"
    assert str(packaged) in plan.command(tmp_path / "csrc/ops/a.cpp")
    assert str(packaged) not in " ".join(plan.command(tmp_path / "csrc/instances/a.cu")), "nvcc has its own"
    (toolkit / "cusparse.h").touch()
    assert packaged not in plan.system_includes()


def test_host_code_is_compiled_first(tmp_path: Path) -> None:
    for name in ("csrc/instances/a.cu", "csrc/ops/b.cpp"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    nothing = etap_build.Nvcc("nvcc", "13.0", ()), etap_build.Torch(tmp_path, "2", "13.0")
    plan = etap_build.Plan(*nothing, etap_build.Cutlass(tmp_path, "4"), tmp_path)
    assert [source.name for source in plan.sources()] == ["b.cpp", "a.cu"]


def test_device_files_stay_short() -> None:
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cuh", ".cu", ".h", ".cpp")]
    long = {p.relative_to(ROOT).as_posix(): n for p in files if (n := len(p.read_text().splitlines())) > 400}
    assert not long, long


def test_no_spills_and_no_serialised_wgmma(ptxas: dict[str, Any]) -> None:
    assert ptxas["kernels"], "the report names no kernel"
    assert etap_build.problems(ptxas["kernels"], ptxas["warnings"]) == []
    assert all(k["arch"] == "sm_90a" and k["registers"] <= 255 for k in ptxas["kernels"].values())


def test_library_is_built_from_these_sources(ptxas: dict[str, Any]) -> None:
    library = _library.library_path()
    assert hashlib.sha256(library.read_bytes()).hexdigest() == ptxas["build"]["library"]
    if ptxas["build"]["sources"] != etap_build.sources_hash():
        pytest.fail("csrc/ changed since the library was built: `python setup.py build_ext --inplace`")


@pytest.fixture(scope="module")
def sass(ptxas: dict[str, Any]) -> dict[str, str]:
    """{mangled kernel name: its machine code}, by the nvidia-cuda-* packages' tools or the toolkit's."""
    folders = [str(p) for p in sorted((Path(sysconfig.get_path("purelib")) / "nvidia").glob("*/bin"))]
    folders += [
        os.environ.get("PATH", ""),
        *(f"{os.environ[v]}/bin" for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ),
    ]
    path = os.pathsep.join([*folders, "/usr/local/cuda/bin"])
    if not shutil.which("cuobjdump", path=path) or not shutil.which("nvdisasm", path=path):
        pytest.skip("not run: no cuobjdump and nvdisasm (`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`)")
    tool = str(shutil.which("cuobjdump", path=path))
    command = [tool, "--dump-sass", "-arch", "sm_90a", str(_library.library_path())]
    environment = {**os.environ, "PATH": path}
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    sections = re.split(r"^\s*Function : (\S+)$", text, flags=re.M)[1:]
    return dict(zip(sections[::2], sections[1::2], strict=True))


def wgmma_shapes(code: str) -> set[int]:
    """N of every HGMMA, all of which must be 64 x N x 16."""
    shapes = re.findall(r"\bHGMMA\.(\d+)x(\d+)x(\d+)", code)
    assert {(m, k) for m, _, k in shapes} <= {("64", "16")}, shapes
    return {int(n) for _, n, _ in shapes}


def test_wgmma_shapes(sass: dict[str, str], host: ModuleType) -> None:
    """KV on M, query rows on N: m64nNk16 with the N of each configuration and nothing wider."""
    shapes = sorted(tuple(sorted(wgmma_shapes(code))) for code in sass.values())
    expected = [tuple(sorted(set(c["wgmma_n"]))) for c in host.kernel_configs()]
    assert shapes == sorted(expected * 2)  # bfloat16 and float16


def test_no_local_memory(sass: dict[str, str]) -> None:
    """Spills by another name: loads from and stores to local memory."""
    bad = {name: len(hits) for name, code in sass.items() if (hits := re.findall(r"\b(?:LDL|STL)\b", code))}
    assert not bad, bad


def test_host_module_is_importable_where_it_was_built() -> None:
    if importlib.util.find_spec("etap_integration._C._host") is None:
        pytest.skip("the host module is not built for this Python")
    assert isinstance(_library.host_module().build_info(), dict)
