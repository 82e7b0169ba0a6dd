"""The run-time switch and the counts of the patched FlashInfer modules loaded in this process.

Each module (one per dtype) has its own; what is set here holds for all of them, and for those loaded later.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, field
from pathlib import Path

from etap_integration.flashinfer import jit
from etap_integration.patching.errors import UnknownNameError

MODES = ("auto", "always", "never")

_lock = threading.Lock()
_wanted: dict[str, int] = {}  # of the settings that the caller made, in the order of the last time each was
_LOWER_ROWS = "lower_rows"  # max_rows, where that is less than a module's default


@dataclass(frozen=True)
class ModuleStatus:
    """A loaded patched module: its switch, and its calls by reason ("taken": run by ETAP)."""

    mode: str
    calls: dict[str, int] = field(default_factory=dict)

    @property
    def taken(self) -> int:
        """Calls that ran on ETAP."""
        return self.calls.get("taken", 0)


def set_mode(mode: str) -> None:
    """`auto`: ETAP wherever it can. `always`: a call it cannot run raises RuntimeError. `never`: upstream only.

    Raises:
        UnknownNameError: no such mode.
    """
    if mode not in MODES:
        raise UnknownNameError("mode", mode, MODES)
    _set("mode", MODES.index(mode))


def set_max_rows(rows: int) -> None:
    """Calls with more query rows (num_heads x the longest query) are left to upstream; by default those with more than
    32, or 64 with an e4m3 cache. ValueError below 0."""
    _set("max_rows", _checked_rows(rows))


def lower_max_rows(rows: int) -> None:
    """As `set_max_rows`, but a module whose default is less keeps that."""
    _set(_LOWER_ROWS, _checked_rows(rows))


def _checked_rows(rows: int) -> int:
    if type(rows) is not int or rows < 0:
        raise ValueError(f"rows: {rows!r}, expected an int of at least 0")
    return rows


def set_p_parts(parts: int) -> None:
    """2: P in a high and a low 16-bit part; 1: rounded; 0 (default): 2, but 1 on an H20 and for an e4m3 cache.

    Raises ValueError for another number.
    """
    if parts not in (0, 1, 2):
        raise ValueError(f"parts: {parts!r}, expected 0, 1 or 2")
    _set("p_parts", parts)


def status() -> dict[str, ModuleStatus]:
    """The patched modules loaded in this process, by name."""
    found = {}
    for name, path in jit.loaded_libraries().items():
        library = _open(path)
        mode = library.etap_flashinfer_mode()
        reasons = [library.etap_flashinfer_reason(i).decode() for i in range(library.etap_flashinfer_num_reasons())]
        calls = {reason: count for i, reason in enumerate(reasons) if (count := library.etap_flashinfer_count(i))}
        found[name] = ModuleStatus(MODES[mode] if mode >= 0 else "ETAP_FLASHINFER has an unknown value", calls)
    return found


def reset_counts() -> None:
    """Sets the counts of every loaded module to zero."""
    for path in jit.loaded_libraries().values():
        _open(path).etap_flashinfer_reset_counts()


def _open(path: Path) -> ctypes.CDLL:
    """The C interface of a module that is loaded already."""
    library = ctypes.CDLL(str(path))
    for name in ("etap_flashinfer_reason", "etap_flashinfer_module"):
        getattr(library, name).restype = ctypes.c_char_p
    library.etap_flashinfer_count.restype = ctypes.c_uint64
    return library


def _set(setting: str, value: int) -> None:
    with _lock:
        _wanted.pop(setting, None)
        _wanted[setting] = value
        jit.on_load(_apply_all)
        paths = list(jit.loaded_libraries().values())
    for path in paths:
        _apply(_open(path), setting, value)


def _apply_all(path: Path) -> None:
    with _lock:
        wanted = dict(_wanted)
    library = _open(path)
    for setting, value in wanted.items():
        _apply(library, setting, value)


def _apply(library: ctypes.CDLL, setting: str, value: int) -> None:
    if setting == _LOWER_ROWS:
        name = library.etap_flashinfer_module().decode()
        setting, value = "max_rows", min(value, jit.default_max_rows(name))
    getattr(library, f"etap_flashinfer_set_{setting}")(value)
