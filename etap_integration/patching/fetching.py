"""Obtaining a pristine upstream tree: download, check, unpack, publish in one step."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import index, locations
from .archive import unpack, verify_archive
from .errors import ArchiveHashError, TreeNotFoundError, TreeWriteError
from .manifest import Archive, Manifest, Release

Progress = Callable[[int, int], None]


def default_tree(release: Release) -> Path:
    """Where `fetch` puts a release's tree unless told otherwise."""
    return locations.cache_root() / "trees" / f"{release.upstream}-{release.id}-{release.archive.sha256[:12]}"


def fetch(
    release: Release, *, dest: Path | None = None, archive: Path | None = None, progress: Progress | None = None
) -> Path:
    """Make a release's source tree available and return its root.

    The tree appears complete or not at all: it is unpacked beside its place and renamed. An existing tree in the cache
    is returned as it is.

    Args:
        release: which release.
        dest: directory to create for the tree (default: `default_tree`); must not exist or be empty.
        archive: use this file instead of the package index.
        progress: called with (bytes so far, bytes in all) while downloading.

    Raises:
        DownloadError: no configured index offers the file.
        ArchiveHashError: the archive is not the pinned one.
        UnsafeArchiveError: the archive holds a member that must not be unpacked.
        TreeWriteError: `dest` is not empty or cannot be written.
    """
    target = (dest or default_tree(release)).absolute()
    if target.is_dir() and any(target.iterdir()):
        if dest is None:
            return target
        raise TreeWriteError(f"dest={dest}: directory is not empty; give a new or empty one")
    file = archive if archive is not None else fetch_archive(release.archive, progress=progress)
    if not file.is_file():
        raise TreeNotFoundError(f"archive={file}: no such file")
    verify_archive(file, release.archive)
    staging: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        unpack(file, staging, release.root)
        staging.chmod(0o755)
        try:
            os.replace(staging, target)
        except OSError:
            if dest is not None or not target.is_dir():  # else: another process published it first
                raise
    except OSError as error:
        raise TreeWriteError(f"{target}: the tree could not be unpacked there: {error}") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def fetch_archive(pinned: Archive, *, progress: Progress | None = None) -> Path:
    """The pinned archive in the cache, downloaded first if it is not there or damaged.

    Raises:
        DownloadError: no configured index offers the file.
        ArchiveHashError: what the index serves is not the pinned file.
        TreeWriteError: the cache directory cannot be written.
    """
    target = locations.cache_root() / "archives" / pinned.filename
    if target.is_file():
        try:
            verify_archive(target, pinned)
            return target
        except ArchiveHashError:
            pass  # a damaged cache entry: replaced below
    part: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{pinned.filename}.", dir=target.parent)
        os.close(handle)
        part = Path(name)
        index.download(pinned, part, index.read_settings(), progress)
        verify_archive(part, pinned)
        os.replace(part, target)
    except OSError as error:
        raise TreeWriteError(f"{target}: the archive could not be stored there: {error}") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    return target


def locate_tree(release: Release, source: Path | None = None) -> Path:
    """The tree to work on: the user's own, or the fetched one.

    Args:
        release: its touched files identify the tree.
        source: the tree's root, or a directory that holds it the way the release's archive does.

    Raises:
        TreeNotFoundError: none of these places holds the touched files; the message lists them.
    """
    if source is None:
        tree = default_tree(release)
        if not tree.is_dir():
            raise TreeNotFoundError(
                f"{tree}: no fetched tree of {release.upstream} {release.id}; run `fetch {release.upstream}` "
                "or give your own checkout with --source"
            )
        return tree
    inner = release.root.split("/")
    candidates = [source.joinpath(*inner[i:]) for i in range(len(inner), -1, -1)]
    probe = [file.path for file in release.files if file.before is not None]
    for candidate in candidates:
        if any((candidate / path).is_file() for path in probe):
            return candidate.absolute()
    raise TreeNotFoundError(
        f"source={source}: not a source tree of {release.upstream}: {probe[0] if probe else '(no file listed)'} "
        f"is in none of {', '.join(map(str, candidates))}"
    )


def detect_release(manifest: Manifest, source: Path) -> Release:
    """The release whose listed files, before or after patching, are those under `source`; else the default one.

    Raises:
        TreeNotFoundError: `source` is no tree of any release.
    """
    from .series import matches  # here, because series builds on this module

    for release in manifest.releases:
        try:
            tree = locate_tree(release, source)
        except TreeNotFoundError:
            continue
        if matches(release, tree):
            return release
    locate_tree(manifest.release(), source)
    return manifest.release()
