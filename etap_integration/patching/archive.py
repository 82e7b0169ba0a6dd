"""Hash-checked, safe unpacking of a pinned archive."""

from __future__ import annotations

import hashlib
import os
import posixpath
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from .errors import ArchiveHashError, UnsafeArchiveError
from .manifest import Archive

MAX_UNPACKED_BYTES = 4 << 30


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify_archive(path: Path, pinned: Archive) -> None:
    """Compare an archive with its pin.

    Raises:
        ArchiveHashError: size or SHA-256 differ.
    """
    actual, size = file_sha256(path), path.stat().st_size
    if actual != pinned.sha256 or size != pinned.size:
        raise ArchiveHashError(path, pinned.sha256, actual, pinned.size, size)


@dataclass(frozen=True)
class _Member:
    name: str  # as stored
    kind: str  # file, dir, symlink, hardlink or other
    size: int
    executable: bool
    target: str  # of a link
    source: tarfile.TarInfo | zipfile.ZipInfo


def unpack(archive: Path, into: Path, root: str) -> None:
    """Unpack the folder `root` of an archive so that its content lies directly in `into`.

    Every member of the archive, also those outside `root`, is checked before the first file is written.

    Args:
        archive: a ``.tar.*`` sdist or a ``.whl``/``.zip``.
        into: an existing empty directory.
        root: folder inside the archive.

    Raises:
        UnsafeArchiveError: a member has an absolute or climbing path, is a device, links outside `root`, or the
            archive unpacks to more than 4 GiB; also when `root` is not in it.
    """
    opener = _open_zip if zipfile.is_zipfile(archive) else _open_tar
    with opener(archive) as reader:
        members = list(reader.members())
        wanted = _validate(archive, members, root)
        if not wanted:
            raise UnsafeArchiveError(archive, root, "no such folder in the archive")
        for relative, member in wanted:
            _write(reader, member, into.joinpath(*relative.parts))


def _validate(archive: Path, members: list[_Member], root: str) -> list[tuple[PurePosixPath, _Member]]:
    prefix = PurePosixPath(root)
    if sum(m.size for m in members) > MAX_UNPACKED_BYTES:
        raise UnsafeArchiveError(archive, root, f"unpacks to more than {MAX_UNPACKED_BYTES} bytes")
    wanted, seen = [], set()
    links = {PurePosixPath(m.name) for m in members if m.kind == "symlink"}
    for member in members:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
            raise UnsafeArchiveError(archive, member.name, "absolute path or path that leaves the archive")
        if links.intersection(path.parents):
            raise UnsafeArchiveError(archive, member.name, "lies below a symbolic link")
        if member.kind == "other":
            raise UnsafeArchiveError(archive, member.name, "neither a file nor a directory nor a link")
        if member.kind in ("symlink", "hardlink"):
            base = posixpath.dirname(member.name) if member.kind == "symlink" else ""
            target = posixpath.normpath(posixpath.join(base, member.target))
            if member.target.startswith("/") or not PurePosixPath(target).is_relative_to(path.parts[0]):
                raise UnsafeArchiveError(archive, member.name, f"link to {member.target!r}, outside the archive")
        if not path.is_relative_to(prefix) or path == prefix:
            continue
        if member.kind in ("symlink", "hardlink") and not PurePosixPath(target).is_relative_to(prefix):
            raise UnsafeArchiveError(archive, member.name, f"link to {member.target!r}, outside {root}")
        if member.kind != "dir" and path in seen:
            raise UnsafeArchiveError(archive, member.name, "is in the archive twice")
        seen.add(path)
        wanted.append((path.relative_to(prefix), member))
    return wanted


def _write(reader: _Tar | _Zip, member: _Member, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if member.kind == "dir":
        path.mkdir(exist_ok=True)
    elif member.kind == "symlink":
        path.symlink_to(member.target)
    else:
        with reader.open(member) as source, path.open("xb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        path.chmod(0o755 if member.executable else 0o644)


class _Tar:
    def __init__(self, path: Path) -> None:
        self.path, self.file = path, tarfile.open(path)  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> _Tar:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def members(self) -> Iterator[_Member]:
        for m in self.file:
            kind = (
                "file" if m.isreg() else "dir" if m.isdir() else "symlink" if m.issym()
                else "hardlink" if m.islnk() else "other"
            )  # fmt: skip
            yield _Member(m.name, kind, m.size, bool(m.mode & stat.S_IXUSR), m.linkname, m)

    def open(self, member: _Member) -> IO[bytes]:
        stream = self.file.extractfile(member.source)  # type: ignore[arg-type]
        assert stream is not None  # regular files and (already checked) hard links only
        return stream


class _Zip:
    def __init__(self, path: Path) -> None:
        self.path, self.file = path, zipfile.ZipFile(path)

    def __enter__(self) -> _Zip:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def members(self) -> Iterator[_Member]:
        for m in self.file.infolist():
            mode = m.external_attr >> 16
            kind, target = ("dir" if m.is_dir() else "file"), ""
            if stat.S_ISLNK(mode):
                kind, target = "symlink", os.fsdecode(self.file.read(m))
            elif stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                kind = "other"
            # ZipFile normalises separators and cuts names at NUL; judge the stored name.
            yield _Member(m.orig_filename, kind, m.file_size, bool(mode & stat.S_IXUSR), target, m)

    def open(self, member: _Member) -> IO[bytes]:
        return self.file.open(member.source)  # type: ignore[arg-type]


def _open_tar(path: Path) -> _Tar:
    try:
        return _Tar(path)
    except tarfile.TarError as error:
        raise UnsafeArchiveError(path, "", f"not a readable archive: {error}") from error


def _open_zip(path: Path) -> _Zip:
    return _Zip(path)
