"""Enabling ETAP in a process from its environment, at the moment an attention library is imported.

`etap run` starts programs with this; the vLLM plugin uses it too. Importing this module imports neither torch nor any
target: a process that never imports one pays nothing.

    ETAP_ENABLE         1: every target; or names of targets, separated by commas. Unset, empty or 0: nothing
    ETAP_MAX_ROWS       as `enable(max_rows=...)`
    ETAP_STRICT=1       as `enable(strict=True)`
    ETAP_SHADOW         fraction of calls to compare, see `etap_integration.shadowing`
    ETAP_SHADOW_SERVE   whose result the caller gets in shadow mode: upstream (default) or etap
    ETAP_SHADOW_RECORD  file that compared calls' shapes are appended to
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

log = logging.getLogger("etap_integration.autostart")

TARGET_NAMES = ("flash_attn_interface", "sgl_kernel.flash_attn", "vllm.vllm_flash_attn", "flashinfer.mla")
"""The dispatch's targets, named here so that nothing has to be imported to know them."""

OFF = ("", "0")


def requested(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The targets that ETAP_ENABLE asks for; shadow mode alone asks for all of them.

    Raises ValueError for a name that is no target.
    """
    value = environment.get("ETAP_ENABLE", "")
    if value in OFF:
        return TARGET_NAMES if environment.get("ETAP_SHADOW", "") not in OFF else ()
    if value == "1":
        return TARGET_NAMES
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    for name in names:
        if name not in TARGET_NAMES:
            raise ValueError(f"ETAP_ENABLE: {name!r} is no target; expected 1, or of {', '.join(TARGET_NAMES)}")
    return names


def options(environment: Mapping[str, str]) -> dict[str, Any]:
    """`enable`'s keyword arguments from the environment. Raises ValueError unless ETAP_MAX_ROWS is a number above 0."""
    rows = environment.get("ETAP_MAX_ROWS", "")
    if not rows:
        return {}
    if not rows.isdecimal() or int(rows) < 1:
        raise ValueError(f"ETAP_MAX_ROWS: {rows!r}, expected a number of at least 1")
    return {"max_rows": int(rows)}


def install(environment: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Enables the targets asked for: those imported already at once, the others when they are imported.

    A target that cannot be patched is logged and left alone, so that no program fails for it, unless ETAP_STRICT=1.

    Args:
        environment: instead of the process's own.

    Returns:
        The targets asked for. Raises ValueError for settings that mean nothing.
    """
    environment = os.environ if environment is None else environment
    names, keywords = requested(environment), options(environment)
    if not names:
        return ()
    strict = environment.get("ETAP_STRICT", "") not in OFF
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(names, keywords, strict))
        atexit.register(_report)
    for name in names:
        if name in sys.modules:
            _enable(name, keywords, strict)
    return names


def remove() -> None:
    """Takes the import hook away again; what is enabled stays enabled."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    atexit.unregister(_report)


def _enable(name: str, keywords: dict[str, Any], strict: bool) -> None:
    try:
        from etap_integration import dispatch, shadowing

        dispatch.enable(name, **keywords)
        shadowing.start_from_environment()
        log.info("enabled in %s", name)
    except Exception as failure:
        if strict:
            raise
        log.warning("not enabled in %s: %s", name, failure)


def _report() -> None:
    """At exit: how many calls ran where, in a process in which any could."""
    dispatch = sys.modules.get("etap_integration.dispatch")
    if dispatch is None:
        return
    status = dispatch.status()
    left = sum(count for reason, count in status.fallbacks.items() if not reason.startswith("qv is not given"))
    if status.etap_calls or left:
        print(f"etap: process {os.getpid()}: {status.etap_calls} calls on ETAP, {left} MLA calls left", file=sys.stderr)


class _Finder(MetaPathFinder):
    """Finds nothing itself; has the targets' loaders tell when they are done."""

    def __init__(self, names: Sequence[str], keywords: dict[str, Any], strict: bool) -> None:
        self._names = frozenset(names)
        self._loaded = functools.partial(_enable, keywords=keywords, strict=strict)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._names:
            return None
        for finder in list(sys.meta_path):
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find is not None and finder is not self else None
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, self._loaded)
                return spec
        return None


class _Loader(Loader):
    """The target's own loader, with a call at the end. It steps aside once the module is there."""

    def __init__(self, loader: Any, loaded: Any) -> None:
        self._loader, self._loaded = loader, loaded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._loaded(module.__name__)
