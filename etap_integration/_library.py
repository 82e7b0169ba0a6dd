"""Finds and loads the built parts: the operator library and the host module; and says whether the GPU suits them.

Nothing here raises at import. A part that cannot be loaded leaves a reason, and whoever needs the part raises with it.
"""

from __future__ import annotations

import functools
import json
import os
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

LIBRARY_NAME = "libetap_mla.so"
BUILD_HINT = "build it with `pip install --no-build-isolation -e .` where nvcc, a CUDA build of torch and CUTLASS are"

# Also in the C++ sources, which define it when the library is there; without it this definition serves shape inference.
SCHEMA = (
    "mla_decode(Tensor q_nope, Tensor q_rope, Tensor ckv_cache, Tensor kpe_cache, Tensor? page_table, "
    "Tensor cache_seqlens, Tensor? cu_seqlens_q, int max_seqlen_q, float softmax_scale, bool causal, "
    "Tensor(a!) out, Tensor(b!)? lse, int num_ctas, int p_parts, Tensor? ckv_scale=None, "
    "Tensor? kpe_scale=None, float ckv_scale_value=1., float kpe_scale_value=1., Tensor? cache_batch_idx=None, "
    "Tensor? ckv_scale_arr=None) -> ()"
)


def on_hopper() -> bool:
    """Whether the current CUDA device is a Hopper GPU."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def library_path() -> Path:
    """Where the operator library should be: $ETAP_LIBRARY, or inside this package."""
    given = os.environ.get("ETAP_LIBRARY")
    return Path(given) if given else Path(__file__).parent / "_C" / LIBRARY_NAME


def ptxas_report() -> dict[str, Any] | None:
    """The report beside the library: {"build": ..., "kernels": {mangled name: ...}, "warnings": [...]}, or None."""
    path = library_path().with_name("ptxas.json")
    return json.loads(path.read_text()) if path.exists() else None


@functools.cache
def load() -> str | None:
    """Loads the operator library once a process and defines `torch.ops.etap.mla_decode` either way.

    Returns None, or the reason why the library is not there.
    """
    reason = _load_library()
    if reason is not None:
        _define_schema()
    torch.library.register_fake("etap::mla_decode")(_fake_mla_decode)
    return reason


def _load_library() -> str | None:
    path = library_path()
    if not path.exists():
        return f"the operator library {LIBRARY_NAME} is not built: {BUILD_HINT}"
    built = (ptxas_report() or {}).get("build", {})
    if not built.get("loadable", True):
        return f"the operator library was compiled against a CPU-only torch, for inspection only: {BUILD_HINT}"
    ours, theirs = torch.__version__, built.get("torch")
    if theirs is not None and theirs.split(".")[:2] != ours.split(".")[:2]:
        return f"the operator library was built against torch {theirs}, but torch {ours} is running: {BUILD_HINT}"
    try:
        torch.ops.load_library(str(path))
    except OSError as failure:
        return f"the operator library cannot be loaded ({failure}): {BUILD_HINT}"
    return None


def _define_schema() -> None:
    global _fragment
    _fragment = torch.library.Library("etap", "FRAGMENT")
    _fragment.define(SCHEMA)


_fragment: torch.library.Library | None = None


def _fake_mla_decode(
    q_nope, q_rope, ckv_cache, kpe_cache, page_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, softmax_scale, causal,
    out, lse, num_ctas, p_parts, ckv_scale=None, kpe_scale=None, ckv_scale_value=1.0, kpe_scale_value=1.0,
    cache_batch_idx=None, ckv_scale_arr=None,
) -> None:  # fmt: skip
    """Shape inference: the operator only writes into `out` and `lse`, whose shapes its caller chose."""
    torch._check(out.shape == q_nope.shape, lambda: f"out: shape {tuple(out.shape)}, expected {tuple(q_nope.shape)}")


@functools.cache
def _load_host() -> tuple[ModuleType | None, str | None]:
    try:
        return import_module("etap_integration._C._host"), None
    except ImportError as failure:
        return None, f"the host module is not built for this Python ({failure}): `python setup.py build_ext --inplace`"


def host_module() -> ModuleType:
    """The pybind11 module: work split, kernel configurations. Raises RuntimeError where it is not built."""
    module, reason = _load_host()
    if module is None:
        raise RuntimeError(reason)
    return module


def build_info() -> dict[str, Any]:
    """What is built and what can be loaded here.

    Returns a dict with
      version          of this package
      library          {"loaded": bool, "reason": str or None}, and from the build: torch, nvcc, cutlass, arch, flags,
                       `sources` (SHA-256 over csrc/) and `library` (SHA-256 of the file)
      kernels          {name: {"registers", "stack", "spill_stores", "spill_loads", "smem", "barriers"}}, sizes in bytes
      host             what the host module reports of its own build, or {"reason": str}
    """
    from etap_integration import __version__

    reason = load()
    report = ptxas_report() or {"build": {}, "kernels": {}}
    module, host_reason = _load_host()
    return {
        "version": __version__,
        "library": {"loaded": reason is None, "reason": reason, **report["build"]},
        "kernels": {entry.get("name", mangled): entry for mangled, entry in report["kernels"].items()},
        "host": module.build_info() if module is not None else {"reason": host_reason},
    }
