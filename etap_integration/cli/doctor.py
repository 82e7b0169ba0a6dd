"""`etap doctor`: what is here, whether it works together, and what would be dispatched."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from etap_integration import __version__, _library, dispatch
from etap_integration.cli.output import Exit, JsonOption, emit, out, reported, table

# Distributions that bring, or use, an attention library that ETAP knows.
DISTRIBUTIONS = (
    "flash-attn-3", "flash-attn", "flashinfer-python", "sgl-kernel", "sglang", "vllm", "xformers", "nvidia-cutlass",
)  # fmt: skip

VARIABLES = frozenset((
    "ETAP_CHECK", "ETAP_LIBRARY", "ETAP_BUILD", "ETAP_JOBS", "ETAP_CUTLASS_DIR", "ETAP_TORCH_DIR",
    "ETAP_EXTRA_INCLUDES", "ETAP_NVCC_FLAGS", "ETAP_COMPILE_ONLY", "ETAP_BUILD_DIR", "ETAP_TEST_PROBLEMS",
    "ETAP_INTERPRETED_PROBLEMS", "ETAP_FA3_TESTS", "ETAP_STRICT", "ETAP_CSRC", "ETAP_PATCHES", "ETAP_CACHE_DIR",
    "ETAP_BENCH_DIR", "ETAP_FA3", "ETAP_FLASHINFER", "ETAP_ENABLE", "ETAP_MAX_ROWS", "ETAP_SHADOW",
    "ETAP_SHADOW_RECORD", "ETAP_SHADOW_SERVE",
))  # fmt: skip
"""Environment variables that some part of the project reads; any other ETAP_* is reported as unknown."""


def packages() -> dict[str, str]:
    """Version of each distribution of interest that is installed."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def driver() -> str | None:
    """The NVIDIA driver's version, None without `nvidia-smi`."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def nvcc() -> str | None:
    """The version of nvcc, None where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    path = shutil.which("nvcc") or shutil.which(str(Path(home) / "bin/nvcc"))
    if path is None:
        return None
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", text)
    return found[1] if found else "unknown"


def gpus() -> list[dict[str, Any]]:
    """Every CUDA device torch sees: name, compute capability, SMs, memory in GiB."""
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        gib = round(p.total_memory / 2**30, 1)
        found.append({"name": p.name, "capability": f"{p.major}.{p.minor}", "sms": p.multi_processor_count, "gib": gib})
    return found


def upstreams(timeout_s: float = 300) -> dict[str, dict[str, Any]]:
    """Each dispatch target: whether its package is there, and whether it could be patched, tried in its own process."""
    found = {}
    for name in dispatch.TARGETS:
        if importlib.util.find_spec(name.split(".")[0]) is None:
            found[name] = {"installed": False, **_unpatchable("not installed")}
            continue
        command = [sys.executable, "-m", "etap_integration.cli.probe", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
            answer = json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            answer = _unpatchable(f"importing took over {timeout_s:.0f} s")
        except (IndexError, ValueError):
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            answer = _unpatchable(f"importing it ends Python: {last[0]}")
        found[name] = {"installed": True, **answer}
    return found


def _unpatchable(note: str) -> dict[str, Any]:
    return {"patchable": False, "bindings": [], "note": note, "file": None}


def patched_build() -> dict[str, Any]:
    """Whether an installed FlashAttention-3 extension was built with ETAP's patches, without importing it."""
    spec = importlib.util.find_spec("flash_attn_3")
    folders = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    for extension in (file for folder in folders for file in folder.glob("_C*.so")):
        return {"installed": True, "patched": b"etap_fa3_set_mode" in extension.read_bytes()}
    return {"installed": False, "patched": False}


def sample_call(heads: int = 16, q_len: int = 1, batch: int = 16, kv_len: int = 65536, **others: Any) -> dispatch.Call:
    """A typical MLA decode call on this machine's first GPU, as shapes alone."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    kv = torch.empty(batch * kv_len // 64, 64, 1, 576, dtype=torch.bfloat16, device="meta")
    q = torch.empty(batch, q_len, heads, 576, dtype=torch.bfloat16, device="meta")
    lengths = torch.empty(batch, dtype=torch.int32, device="meta")
    pages = torch.empty(batch, kv_len // 64, dtype=torch.int32, device="meta")
    from etap_integration.dispatch.calls import machine_of

    return dispatch.Call(
        q[..., 512:], q[..., :512], kv[..., 512:], kv[..., :512], pages, lengths, softmax_scale=576**-0.5, causal=True,
        others=others, machine=machine_of(device),
    )  # fmt: skip


SAMPLES: dict[str, Callable[[], dispatch.Call]] = {
    "16 heads, batch 16, 64K keys": sample_call,
    "16 heads, batch 1, 2K keys": lambda: sample_call(batch=1, kv_len=2048),
    "16 heads, 2 query tokens, 8K keys": lambda: sample_call(q_len=2, kv_len=8192),
    "64 heads, batch 16, 4K keys": lambda: sample_call(heads=64, kv_len=4096),
    "128 heads, batch 16, 4K keys": lambda: sample_call(heads=128, kv_len=4096),
    "a sliding window": lambda: sample_call(window_size=(128, 0)),
}


def dispatched() -> dict[str, dict[str, Any]]:
    """What the dispatcher would do with each of `SAMPLES` here: {"etap": bool, "reason": str}."""
    answers = {}
    for title, make in SAMPLES.items():
        call = make()
        ours, reason = dispatch.supports(call)
        if ours:
            ours, reason = dispatch.choose(call)
        answers[title] = {"etap": ours, "reason": reason}
    return answers


def examine(probe: bool = True) -> dict[str, Any]:
    """Everything `etap doctor` reports. `probe`: import the targets, each in a process of its own."""
    build = _library.build_info()
    found = {
        "etap_integration": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
        "driver": driver(),
        "nvcc": nvcc(),
        "gpus": gpus(),
        "library": build["library"],
        "host_module": build["host"],
        "packages": packages(),
        "targets": upstreams() if probe else {},
        "patched_flash_attention_3": patched_build(),
        "dispatch": dispatched(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("ETAP_")},
    }
    found["problems"] = problems(found)
    return found


def problems(found: dict[str, Any]) -> list[str]:
    """What stands in the way of ETAP here, and what looks like a mistake; empty where all is well."""
    lines = []
    hopper = [g for g in found["gpus"] if g["capability"].startswith("9.")]
    if found["gpus"] and not hopper:
        lines.append(f"no Hopper GPU: {', '.join(g['name'] for g in found['gpus'])}")
    if hopper and not found["library"]["loaded"]:
        lines.append(f"a Hopper GPU is here, but {found['library']['reason']}")
    lines += [
        f"{name} is installed but cannot be patched: {target['note']}"
        for name, target in found["targets"].items()
        if target["installed"] and not target["patchable"]
    ]
    lines += [f"{name} is set, but nothing reads it" for name in found["environment"] if name not in VARIABLES]
    return lines


def _show(found: dict[str, Any]) -> None:
    versions = f"torch {found['torch']['version']} (CUDA {found['torch']['cuda'] or 'none'})"
    line = lambda name, text: out.print(f"{name:20} {text}", markup=False)  # noqa: E731
    line("etap_integration", f"{found['etap_integration']}, Python {found['python']}, {versions}")
    line("driver, nvcc", f"{found['driver'] or 'no driver'}, {found['nvcc'] or 'no nvcc'}")
    for g in found["gpus"] or [{}]:
        text = f"{g['name']}, capability {g['capability']}, {g['sms']} SMs, {g['gib']} GiB" if g else "none"
        line("GPU", text)
    line("operator library", "loaded" if found["library"]["loaded"] else found["library"]["reason"])
    line("host module", found["host_module"].get("reason", "built"))
    line("packages", ", ".join(f"{k} {v}" for k, v in found["packages"].items()) or "no attention library")
    for name, target in found["targets"].items():
        line(name, "can be patched" if target["patchable"] else target["note"])
        for binding in target["bindings"]:
            line("", binding)
    fa3 = found["patched_flash_attention_3"]
    built = "built with ETAP's patches" if fa3["patched"] else "unpatched" if fa3["installed"] else "not installed"
    line("flash_attn_3._C", built)
    for name, value in found["environment"].items():
        line(name, value)
    out.print()
    rows = [[title, "ETAP" if a["etap"] else "upstream", a["reason"]] for title, a in found["dispatch"].items()]
    table("what would run here", ["call", "runs on", "why"], rows, text_columns=3)
    out.print()
    for problem in found["problems"]:
        out.print(f"problem: {problem}", markup=False, style="red")
    if not found["problems"]:
        out.print("no problems found", style="green")


@reported
def doctor(
    probe: Annotated[bool, typer.Option(help="Import the installed engines, each in a process of its own.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Report GPU, versions, upstreams found, what can be patched, and what would be dispatched and why.

    Exit code 1 where something is wrong: each problem is named. A machine without a GPU is no problem.
    """
    found = examine(probe)
    emit(as_json, found, lambda: _show(found))
    if found["problems"]:
        raise typer.Exit(Exit.NEGATIVE)
