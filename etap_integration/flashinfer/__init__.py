"""FlashInfer's `BatchMLAPagedAttentionWrapper(backend="fa3")` with ETAP's kernels in its JIT module.

    activate(), deactivate()                 patched modules in this process, from an overlay; the package is untouched
    patch_in_place(), revert_in_place()      the installed package itself
    compile_module("bfloat16", "e4m3")       ahead of the first plan; needs no GPU
    set_mode("never"), status()              the switch and the counts of the patched modules

`etap_integration.enable()` needs none of it: it routes the calls of an unpatched FlashInfer to the standalone operator.
"""

from __future__ import annotations

from typing import Any

_HOME = {
    "activate": "activation",
    "compile_module": "activation",
    "deactivate": "activation",
    "is_active": "activation",
    "patch_in_place": "activation",
    "revert_in_place": "activation",
    "UnsupportedFlashInferError": "overlay",
    "make_overlay": "overlay",
    "remove_overlays": "overlay",
    "reset_counts": "switch",
    "set_max_rows": "switch",
    "set_mode": "switch",
    "set_p_parts": "switch",
    "status": "switch",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    # Lazily: the module generator of a FlashInfer that is patched in place imports `jit` alone.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
