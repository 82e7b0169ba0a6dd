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
from etap_integration.flashinfer.overlay import installed_root, is_patched_in_place, make_overlay, supported_release
from etap_integration.patching import series
from etap_integration.patching.series import Outcome

GENERATORS = "flashinfer.jit.attention.modules"
GENERATOR = "gen_batch_mla_module"
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
