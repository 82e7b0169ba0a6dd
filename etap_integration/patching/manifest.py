"""The manifests under ``patches/``: which upstream releases are patched, from where, and with which result.

``patches/<upstream>/manifest.json`` lists releases. Each has a pinned registry archive, the upstream tree's place in
it, a quilt-style series file (one patch name a line) and the SHA-256 of every touched file before and after.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from . import locations
from .errors import ManifestError, UnknownNameError
from .unified import FilePatch, parse_patch

SCHEMA = 1
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class Archive:
    """A file on the package registry: ``project==version`` as ``filename``, pinned by size and SHA-256."""

    project: str
    version: str
    filename: str
    size: int
    sha256: str


@dataclass(frozen=True)
class TouchedFile:
    """A file the series changes; `before` is None when the series creates it."""

    path: str
    before: str | None
    after: str


@dataclass(frozen=True)
class Release:
    """One upstream release the series is made for."""

    upstream: str
    id: str
    commit: str | None
    archive: Archive
    root: str
    series: Path
    files: tuple[TouchedFile, ...]

    @property
    def patch_names(self) -> list[str]:
        """Names in the series file, in order.

        Raises:
            ManifestError: the series file is missing, or has an entry with options or a path.
        """
        try:
            lines = self.series.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ManifestError(self.series, f"cannot be read: {error}") from error
        names = [line.split("#")[0].strip() for line in lines]
        for name in filter(None, names):
            if not re.fullmatch(r"[0-9]{4}-[A-Za-z0-9._-]+\.patch", name):
                raise ManifestError(self.series, f"entry {name!r} is not of the form NNNN-name.patch")
        return [name for name in names if name]

    def patches(self, *, listed_only: bool = True) -> list[FilePatch]:
        """Every file patch of the series, in order.

        Args:
            listed_only: refuse patches for files that the manifest does not list.

        Raises:
            ManifestError: a patch is missing or malformed, or touches a file the manifest does not list.
        """
        listed = {file.path for file in self.files}
        patches: list[FilePatch] = []
        for name in self.patch_names:
            file = self.series.parent / name
            try:
                parsed = parse_patch(file.read_bytes(), str(file))
            except OSError as error:
                raise ManifestError(file, f"cannot be read: {error}") from error
            for patch in parsed:
                if listed_only and patch.path not in listed:
                    raise ManifestError(file, f"touches {patch.path}, which the manifest does not list")
            patches += parsed
        return patches

    def series_sha256(self) -> str:
        """Digest of the series: its patch names and their bytes."""
        digest = hashlib.sha256()
        for name in self.patch_names:
            digest.update(name.encode() + b"\0" + (self.series.parent / name).read_bytes() + b"\0")
        return digest.hexdigest()


@dataclass(frozen=True)
class Manifest:
    """An upstream and its releases; the first one is the default."""

    upstream: str
    repository: str
    releases: tuple[Release, ...]

    def release(self, release_id: str | None = None) -> Release:
        """The named release, or the default one.

        Raises:
            UnknownNameError: the manifest has no such release.
        """
        if release_id is None:
            return self.releases[0]
        for release in self.releases:
            if release.id == release_id:
                return release
        raise UnknownNameError(f"{self.upstream} release", release_id, [r.id for r in self.releases])


def upstream_names() -> list[str]:
    """Names of the upstreams with a manifest."""
    return sorted(file.parent.name for file in locations.patches_root().glob("*/manifest.json"))


def load_manifest(upstream: str) -> Manifest:
    """Read and validate ``patches/<upstream>/manifest.json``.

    Raises:
        UnknownNameError: there is no such upstream.
        ManifestError: the file is malformed; the message names the field.
    """
    if upstream not in upstream_names():
        raise UnknownNameError("upstream", upstream, upstream_names())
    return read_manifest(locations.patches_root() / upstream / "manifest.json")


def read_manifest(file: Path) -> Manifest:
    """Read and validate one manifest file; its series files lie beside it.

    Raises:
        ManifestError: the file is missing or malformed; the message names the field.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ManifestError(file, f"cannot be read as JSON: {error}") from error
    fields = _Fields(file, data, "")
    if fields.get("schema", int) != SCHEMA:
        raise ManifestError(file, f"schema is {data['schema']!r}, this version reads {SCHEMA}")
    upstream = fields.get("upstream", str)
    releases = tuple(
        _release(_Fields(file, entry, f"releases[{i}]."), upstream)
        for i, entry in enumerate(fields.get("releases", list))
    )
    if not releases or len({r.id for r in releases}) != len(releases):
        raise ManifestError(file, "releases: must be a non-empty list with distinct ids")
    return Manifest(upstream, fields.get("repository", str), releases)


class _Fields:
    """Typed access to one JSON object, with errors that name the field."""

    def __init__(self, file: Path, data: Any, prefix: str) -> None:
        self.file, self.prefix = file, prefix
        if not isinstance(data, dict):
            raise ManifestError(file, f"{prefix or 'top level'}: must be an object, is {type(data).__name__}")
        self.data = data

    def get(self, name: str, kind: type, *, optional: bool = False) -> Any:
        value = self.data.get(name)
        if value is None and optional:
            return None
        if not isinstance(value, kind):
            raise ManifestError(self.file, f"{self.prefix}{name}: must be {kind.__name__}, is {value!r}")
        return value

    def sha256(self, name: str, *, optional: bool = False) -> Any:
        value = self.get(name, str, optional=optional)
        if value is not None and not _SHA256.match(value):
            raise ManifestError(self.file, f"{self.prefix}{name}: must be 64 lower-case hex digits, is {value!r}")
        return value

    def relative(self, name: str) -> str:
        value = self.get(name, str)
        path = PurePosixPath(value)
        if path.is_absolute() or not path.parts or ".." in path.parts or str(path) != value:
            raise ManifestError(self.file, f"{self.prefix}{name}: must be a plain relative path, is {value!r}")
        return value


def _release(fields: _Fields, upstream: str) -> Release:
    pin = _Fields(fields.file, fields.get("archive", dict), f"{fields.prefix}archive.")
    archive = Archive(
        pin.get("project", str),
        pin.get("version", str),
        pin.relative("filename"),
        pin.get("size", int),
        pin.sha256("sha256"),
    )
    files = []
    for i, entry in enumerate(fields.get("files", list)):
        touched = _Fields(fields.file, entry, f"{fields.prefix}files[{i}].")
        files.append(
            TouchedFile(touched.relative("path"), touched.sha256("before", optional=True), touched.sha256("after"))
        )
    if len({f.path for f in files}) != len(files):
        raise ManifestError(fields.file, f"{fields.prefix}files: a path is listed twice")
    return Release(
        upstream,
        fields.get("id", str),
        fields.get("commit", str, optional=True),
        archive,
        fields.relative("root"),
        fields.file.parent / fields.relative("series"),
        tuple(files),
    )
