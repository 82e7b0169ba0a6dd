"""Where the patches, ETAP's device sources and the user's cache live."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import TreeNotFoundError

_PACKAGE = Path(__file__).resolve().parents[1]


def _project_folder(name: str, variable: str, marker: str) -> Path:
    override = os.environ.get(variable)
    if override:
        folder = Path(override).expanduser().resolve()
        if not (folder / marker).exists():
            raise TreeNotFoundError(f"{variable}={override}: no {marker} in it")
        return folder
    candidates = [_PACKAGE / "_data" / name, _PACKAGE.parent / name]
    for folder in candidates:
        if (folder / marker).exists():
            return folder
    raise TreeNotFoundError(
        f"{name}/ not found (looked for {marker} in {', '.join(map(str, candidates))}); set {variable} to its directory"
    )


def patches_root() -> Path:
    """Directory of the patch series, one folder per upstream; ``ETAP_PATCHES`` overrides it.

    Raises:
        TreeNotFoundError: it is neither beside the package nor where the variable points.
    """
    return _project_folder("patches", "ETAP_PATCHES", "flash-attention-3/manifest.json")


def csrc_root() -> Path:
    """Directory of ETAP's device library (holds ``etap/``); ``ETAP_CSRC`` overrides it.

    Raises:
        TreeNotFoundError: it is neither beside the package nor where the variable points.
    """
    return _project_folder("csrc", "ETAP_CSRC", "etap")


def cache_root() -> Path:
    """Per-user cache directory for archives, trees and build output; ``ETAP_CACHE_DIR`` overrides it."""
    override = os.environ.get("ETAP_CACHE_DIR")
    if override:
        return Path(override).expanduser().resolve()
    import platformdirs  # here: the rest of this module serves processes that have none

    return platformdirs.user_cache_path("etap")
