"""The patched module as FlashInfer's own JIT generates it, and compiled for sm_90a.

FlashInfer itself is imported, in a process of its own, from the pinned archive's tree in the user's cache. Skipped
where its requirements, or for compiling nvcc, are missing. Compiling takes minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from etap_integration.patching import fetching
from etap_integration.patching.manifest import load_manifest

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = load_manifest("flashinfer")
REQUIREMENTS = (
    "torch",
    "tvm_ffi",
    "jinja2",
    "filelock",
    "ninja",
    "tqdm",
    "pynvml",
    "requests",
    "einops",
    "tabulate",
    "click",
)

GENERATE = """
import json, sys
from pathlib import Path
import flashinfer.jit as flashinfer_jit
import torch
from etap_integration import flashinfer as ours
from etap_integration.flashinfer import activation

arguments = lambda kv: (torch.bfloat16, kv, torch.bfloat16, torch.int32, 512, 64, False)
make = lambda backend, kv: flashinfer_jit.gen_batch_mla_module(backend, *arguments(kv))
shown = lambda spec: {"name": spec.name, "sources": [str(path) for path in spec.sources], "aot": spec.is_aot}
before, place = make("fa3", torch.bfloat16), str(ours.activate())
found = {
    "place": place,
    "before": shown(before),
    "patched": shown(make("fa3", torch.bfloat16)),
    "fp8": shown(make("fa3", torch.float8_e4m3fn)),
    "fa2": shown(make("fa2", torch.bfloat16)),
}
ours.deactivate()
found["after"] = shown(make("fa3", torch.bfloat16))
specification = activation.module_specification("bfloat16")
specification.write_ninja()
found["ninja"] = str(specification.ninja_path)
found["ahead"] = [activation.module_specification("bfloat16", cache).name for cache in activation.CACHES]
print(json.dumps(found))
"""


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """Of a process that finds the pinned FlashInfer, has caches of its own, and compiles for Hopper."""
    missing = [name for name in REQUIREMENTS if not _importable(name)]
    if missing:
        pytest.skip(f"not run: FlashInfer needs {', '.join(missing)}")
    (tmp_path / "site").mkdir()
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(tmp_path / "site"), str(ROOT), os.environ.get("PYTHONPATH", ""))),
        "ETAP_CACHE_DIR": str(tmp_path / "cache"),
        "FLASHINFER_WORKSPACE_BASE": str(tmp_path),
        "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
    }


def _importable(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0


def generate(release_id: str, tmp_path: Path, environment: dict[str, str]) -> dict[str, Any]:
    """What FlashInfer's generator makes, before, under and after `activate`."""
    (tmp_path / "site/flashinfer").symlink_to(fetching.fetch(MANIFEST.release(release_id)))
    ran = subprocess.run(
        [sys.executable, "-c", GENERATE], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_generated_module(tmp_path, environment) -> None:
    """Its own name, the patched sources and ETAP's; nothing changes for FA2, and all is as before afterwards."""
    found = generate(MANIFEST.release().id, tmp_path, environment)
    before, patched = found["before"], found["patched"]
    assert patched["name"].startswith(before["name"] + "_etap_") and not patched["aot"]
    assert found["after"] == before and "_etap_" not in found["fa2"]["name"]
    assert Path(found["place"]).is_relative_to(tmp_path / "cache/overlays")
    assert all("flashinfer_adapter.h" not in Path(path).read_text() for path in before["sources"])
    upstream = [path for path in patched["sources"] if not path.startswith(str(ROOT))]
    assert [Path(path).name for path in upstream] == [Path(path).name for path in before["sources"]]
    assert sum("flashinfer_adapter.h" in Path(path).read_text() for path in upstream) == 2
    assert not {*patched["sources"]} & {*before["sources"]}
    ours = {Path(path).name for path in patched["sources"]} - {Path(path).name for path in upstream}
    assert {"adapter.cu", "mla_decode_bf16_rows16.cu", "without_fp16.cu"} <= ours
    kernels = [Path(path).name for path in found["fp8"]["sources"] if "instances" in path]
    assert found["ahead"] == [patched["name"], found["fp8"]["name"]], "what is compiled ahead is what a plan loads"
    assert "_etap_" in found["fp8"]["name"] and len(kernels) == 3 and all("bf16_e4m3" in name for name in kernels)


@pytest.mark.parametrize("release_id", [MANIFEST.releases[0].id, MANIFEST.releases[-1].id])
def test_patched_module_compiles(release_id: str, tmp_path, environment) -> None:
    """FlashInfer's own build rules, by nvcc, for sm_90a: the patched files, the adapter and a kernel, no warning of
    ptxas's among them. Not linked: that takes CUDA's libraries."""
    if not shutil.which("nvcc") or not shutil.which("c++"):
        pytest.skip("not run: no nvcc or C++ compiler")
    if extra := os.environ.get("ETAP_EXTRA_INCLUDES"):
        environment["CPATH"] = os.pathsep.join(filter(None, (extra, os.environ.get("CPATH"))))
    ninja = Path(generate(release_id, tmp_path, environment)["ninja"])
    run = lambda *args: subprocess.run(  # noqa: E731
        [sys.executable, "-m", "ninja", *args], cwd=ninja.parent, env=environment, capture_output=True, text=True
    )
    objects = [line.split(":")[0] for line in run("-t", "targets", "all").stdout.splitlines()]
    wanted = ("sm90_plan.cuda.o", "sm90_run.cuda.o", "adapter.cuda.o", "mla_decode_bf16_rows16.cuda.o")
    targets = [name for name in objects if name.endswith(wanted)]
    assert len(targets) == len(wanted), objects
    assert "-gencode=arch=compute_90a,code=sm_90a" in ninja.read_text()
    built = run("-j", os.environ.get("ETAP_JOBS", "2"), *targets)
    assert built.returncode == 0, built.stdout[-3000:]
    assert "C75" not in built.stdout  # ptxas: wgmma serialised
    assert all((ninja.parent / name).stat().st_size > 0 for name in targets)
