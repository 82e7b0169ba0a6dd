"""Patching an upstream attention library with ETAP: fetch, check, apply, build, verify, revert.

Pure Python, no GPU and no torch needed (building needs torch in the interpreter that is built for). Names are imported
on first use: `locations` and `errors` are for processes that have none of the command line's packages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .building import KERNEL_SETS, BuildResult, build
    from .errors import PatchingError
    from .fetching import detect_release, fetch, locate_tree
    from .manifest import Manifest, Release, load_manifest, upstream_names
    from .series import Outcome, TreeReport, TreeState, apply, check, revert, verify

_HOME = {
    "building": ("KERNEL_SETS", "BuildResult", "build"),
    "errors": ("PatchingError",),
    "fetching": ("detect_release", "fetch", "locate_tree"),
    "manifest": ("Manifest", "Release", "load_manifest", "upstream_names"),
    "series": ("Outcome", "TreeReport", "TreeState", "apply", "check", "revert", "verify"),
}

__all__ = [
    "KERNEL_SETS",
    "BuildResult",
    "Manifest",
    "Outcome",
    "PatchingError",
    "Release",
    "TreeReport",
    "TreeState",
    "apply",
    "build",
    "check",
    "detect_release",
    "fetch",
    "load_manifest",
    "locate_tree",
    "revert",
    "upstream_names",
    "verify",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for home, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
