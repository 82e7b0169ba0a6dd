"""Patching an upstream attention library with ETAP: fetch, check, apply, build, verify, revert.

Pure Python, no GPU and no torch needed (building needs torch in the interpreter that is built for).
"""

from .building import KERNEL_SETS, BuildResult, build
from .errors import PatchingError
from .fetching import detect_release, fetch, locate_tree
from .manifest import Manifest, Release, load_manifest, upstream_names
from .series import Outcome, TreeReport, TreeState, apply, check, revert, verify

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
