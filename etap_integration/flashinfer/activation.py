"""Pointing FlashInfer's JIT at an overlay, in this process, and back; and patching the installed package instead."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from etap_integration.dispatch.bindings import Replacement
from etap_integration.flashinfer.jit import HEAD_DIMS, library_path
from etap_integration.flashinfer.overlay import installed_root, is_patched_in_place, make_overlay, supported_release
from etap_integration.patching import series
from etap_integration.patching.errors import UnknownNameError
from etap_integration.patching.series import Outcome

GENERATORS = "flashinfer.jit.attention.modules"
GENERATOR = "gen_batch_mla_module"
DTYPES = ("bfloat16", "float16")
CACHES = ("same", "e4m3")
_LOADER = "get_batch_mla_module"  # the wrappers' memory of loaded modules
_PATCHED = "flashinfer.jit.attention._etap_patched_modules"

_lock = threading.RLock()
_active: Replacement | None = None


class _Environment:
    """FlashInfer's `jit.env` with other sources."""

    def __init__(self, original: ModuleType, sources: Path) -> None:
        self._original = original
        self.FLASHINFER_CSRC_DIR = sources

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def activate() -> Path:
    """Lets `BatchMLAPagedAttentionWrapper(backend="fa3")` plan with patched modules from now on, in this process.

    Wrappers planned before keep their module until they are planned again. The patched module is compiled by
    FlashInfer's JIT at the first plan of each dtype (minutes), into FlashInfer's cache, under a name of its own. Again:
    changes nothing.

    Returns:
        The overlay; the installed package where that is patched in place and no overlay is needed.

    Raises:
        UnsupportedFlashInferError: FlashInfer is missing, or of a release that there are no patches for.
        TreeWriteError: the overlay cannot be written.
    """
    global _active
    with _lock:
        root = installed_root()
        if is_patched_in_place(root):
            return root
        overlay = make_overlay(supported_release(root), root)
        if _active is None:
            home = import_module(GENERATORS)
            original = getattr(home, GENERATOR)
            _active = Replacement(home, GENERATOR, original, patched_generator(overlay, original))
            _active.install()
            forget_loaded()
        return overlay


def deactivate() -> list[str]:
    """Takes `activate` back; returns the bindings left alone because somebody else replaced them meanwhile."""
    global _active
    with _lock:
        if _active is None:
            return []
        left_alone = _active.restore()
        _active = None
        forget_loaded()
        return left_alone


def is_active() -> bool:
    """Whether FlashInfer's JIT makes patched modules in this process, by an overlay or in place."""
    with _lock:
        return _active is not None or is_patched_in_place(installed_root())


def patched_generator(overlay: Path, original: Callable[..., Any]) -> Callable[..., Any]:
    """The overlay's own `gen_batch_mla_module`; `original` still makes what is not for FA3."""
    found = importlib.util.spec_from_file_location(_PATCHED, overlay / "jit/attention/modules.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    module.jit_env = _Environment(module.jit_env, overlay / "data/csrc")  # type: ignore[attr-defined]
    generator = getattr(module, GENERATOR)

    def generate(backend: str, *args: Any, **kwargs: Any) -> Any:
        return (generator if backend == "fa3" else original)(backend, *args, **kwargs)

    return generate


def module_specification(dtype: str, cache: str = "same") -> Any:
    """FlashInfer's specification of the patched module for queries and output of one dtype, and a cache.

    Args:
        dtype: "bfloat16" or "float16".
        cache: "same", of that dtype too, or "e4m3".

    Raises:
        UnknownNameError: another dtype or cache.
        UnsupportedFlashInferError, TreeWriteError: as for `activate`.
    """
    import torch

    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    if cache not in CACHES:
        raise UnknownNameError("cache", cache, CACHES)
    root = installed_root()
    generator = getattr(import_module(GENERATORS), GENERATOR)
    if not is_patched_in_place(root):
        generator = patched_generator(make_overlay(supported_release(root), root), generator)
    kind = getattr(torch, dtype)
    cached = kind if cache == "same" else torch.float8_e4m3fn
    return generator("fa3", kind, cached, kind, torch.int32, *HEAD_DIMS, False)


def compile_module(dtype: str = "bfloat16", cache: str = "same") -> Path:
    """Compiles a patched module as the first plan that needs it would, into FlashInfer's cache; returns the library.

    Needs nvcc for sm_90a, and no GPU where FLASHINFER_CUDA_ARCH_LIST=9.0a says what to compile for. Arguments and
    errors as for `module_specification`; a compiler's failure is FlashInfer's own exception.
    """
    specification = module_specification(dtype, cache)
    specification.build(verbose=False)
    return library_path(specification)


def forget_loaded() -> None:
    """Empties the wrappers' memory of loaded modules, or a plan would get one of before."""
    for module in list(sys.modules.values()):
        loader = vars(module).get(_LOADER) if isinstance(module, ModuleType) else None
        if loader is not None and hasattr(loader, "cache_clear"):
            loader.cache_clear()


def patch_in_place() -> tuple[Path, Outcome]:
    """Patches the installed package itself: every process that uses it gets the patched module, without `activate`.

    The installation then needs etap_integration beside it. Undone by `revert_in_place`, or by
    `python -m etap_integration.patching revert flashinfer --source DIR`.

    Raises:
        UnsupportedFlashInferError: as for `activate`.
        TreeWriteError: the package cannot be written; it is unchanged.
    """
    root = installed_root()
    return root, series.apply(supported_release(root), root)


def revert_in_place() -> tuple[Path, Outcome]:
    """Restores the installed package byte for byte. Errors as `patch_in_place`."""
    root = installed_root()
    return root, series.revert(supported_release(root), root)
