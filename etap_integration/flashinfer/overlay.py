"""A patched copy of the few files that FlashInfer's module generator reads, in the user's cache.

The installed package is read, never written. An overlay appears complete or not at all, is checked at every use, and
is made anew where it is damaged.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from etap_integration.patching import locations, series
from etap_integration.patching.errors import PatchingError, TreeNotFoundError, TreeWriteError
from etap_integration.patching.manifest import Manifest, Release, load_manifest
from etap_integration.patching.series import TreeState

UPSTREAM = "flashinfer"
SOURCES = "data/csrc"  # what the generator reads beside the patched files: linked into the overlay


class UnsupportedFlashInferError(PatchingError):
    """FlashInfer is not installed, or its files are those of no release that there are patches for."""

    def __init__(self, problem: str, manifest: Manifest) -> None:
        self.supported = [release.id for release in manifest.releases]
        super().__init__(f"{problem}; supported: flashinfer-python {', '.join(self.supported)}")


def installed_root() -> Path:
    """The installed package's directory, found without importing it.

    Raises:
        UnsupportedFlashInferError: there is none.
    """
    found = importlib.util.find_spec("flashinfer")
    if found is None or not found.submodule_search_locations:
        raise UnsupportedFlashInferError("flashinfer is not installed", load_manifest(UPSTREAM))
    return Path(next(iter(found.submodule_search_locations))).resolve()


def installed_version(root: Path) -> str:
    """The version that the package at `root` says it has, "unknown" where it says none."""
    meta = root / "_build_meta.py"
    if meta.is_file():
        for line in meta.read_text(encoding="utf-8").splitlines():
            if line.startswith("__version__"):
                return line.partition("=")[2].strip().strip("\"'")
    try:
        return importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def supported_release(root: Path) -> Release:
    """The release whose files, patched or not, are those under `root`.

    Raises:
        UnsupportedFlashInferError: there is none: FlashInfer is older or newer than the patches, or was edited.
    """
    manifest = load_manifest(UPSTREAM)
    for release in manifest.releases:
        if series.matches(release, root):
            return release
    version = installed_version(root)
    known = version in (release.id for release in manifest.releases)
    problem = "its files were edited" if known else "there are no patches for it"
    raise UnsupportedFlashInferError(f"flashinfer {version} at {root}: {problem}", manifest)


def is_patched_in_place(root: Path) -> bool:
    """Whether the installed package itself is patched."""
    return series.check(supported_release(root), root).state is TreeState.PATCHED


def overlay_path(release: Release, root: Path) -> Path:
    """Where the overlay of the package at `root` lies. Another series, release or installation has another."""
    place = hashlib.sha256(str(root).encode()).hexdigest()[:8]
    return locations.cache_root() / "overlays" / f"{UPSTREAM}-{release.id}-{release.series_sha256()[:12]}-{place}"


def make_overlay(release: Release, root: Path) -> Path:
    """The overlay of the unpatched package at `root`, made if it is not there or not whole.

    Returns:
        A directory with the patched files and links to the package's other sources, laid out as the package is.

    Raises:
        TreeWriteError: the cache directory cannot be written, or is full; nothing half-made is left.
        FileMismatchError: a file of the package is not the release's.
    """
    target = overlay_path(release, root)
    if target.is_dir():
        if _is_whole(release, target):
            return target
        shutil.rmtree(target, ignore_errors=True)
    staging: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        _fill(release, root, staging)
        series.apply(release, staging)
        series.verify(release, staging)
        try:
            os.replace(staging, target)
        except OSError:
            if not (target.is_dir() and _is_whole(release, target)):  # else: another process published it first
                raise
    except OSError as error:
        raise TreeWriteError(f"{target}: the overlay could not be made there: {error}") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def remove_overlays() -> list[Path]:
    """Deletes every overlay of this user; returns what was deleted. Compiled modules stay in FlashInfer's own cache."""
    folder = locations.cache_root() / "overlays"
    found = sorted(folder.glob(f"{UPSTREAM}-*")) if folder.is_dir() else []
    for overlay in found:
        shutil.rmtree(overlay)
    return found


def _fill(release: Release, root: Path, staging: Path) -> None:
    for file in release.files:
        copy = staging / file.path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / file.path, copy)
    for entry in (root / SOURCES).iterdir():
        link = staging / SOURCES / entry.name
        if not link.exists():
            link.symlink_to(entry)


def _is_whole(release: Release, overlay: Path) -> bool:
    try:
        series.verify(release, overlay)
    except (PatchingError, TreeNotFoundError):
        return False
    return all(entry.exists() for entry in (overlay / SOURCES).iterdir())  # no dangling link
