"""Changing several files of a tree as one step that survives being killed, and undoing it.

A directory ``.etap-patch`` in the tree's root holds, while files are changed and as long as they stay changed, the
original bytes (``backup/``) and a journal (``state.json``). Order of an apply:

    1. backup/ and staged/ are written and synced       no journal yet: a leftover directory is garbage
    2. journal, phase "applying"                        from here on, recovery restores the originals
    3. os.replace of every file from staged/
    4. journal, phase "applied"                         from here on, the change is complete

An undo sets phase "reverting", restores from backup/, then deletes the journal first. `recover` brings a tree whose
writer died back to an unchanged or a complete state; every command that writes starts with it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from .errors import FileMismatchError, JournalError, TreeLockedError, TreeNotFoundError, TreeWriteError

STATE_DIR = ".etap-patch"
JOURNAL = "state.json"
PHASES = ("applying", "applied", "reverting")


@dataclass(frozen=True)
class Change:
    """What one file was and becomes; `before` is None for a file that the change creates."""

    path: str
    before: str | None
    after: str


@dataclass(frozen=True)
class Journal:
    """The record of one change of a tree."""

    phase: str
    upstream: str
    release: str
    series_sha256: str
    fuzz: bool
    changes: tuple[Change, ...]


def sha256(content: bytes) -> str:
    """SHA-256 as hex."""
    return hashlib.sha256(content).hexdigest()


def read_file(root: Path, path: str) -> bytes | None:
    """A touched file's content, None when it does not exist.

    Raises:
        TreeNotFoundError: it is not a regular file inside the tree (a link would be replaced, not followed).
    """
    file = root / path
    if file.is_symlink() or not file.resolve().is_relative_to(root.resolve()):
        raise TreeNotFoundError(f"{file}: is a symbolic link or leads out of {root}; only regular files are patched")
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError as error:
        raise TreeNotFoundError(f"{file}: is a directory, expected a regular file") from error


def file_hash(root: Path, path: str) -> str | None:
    """SHA-256 of a touched file, None when it does not exist."""
    content = read_file(root, path)
    return None if content is None else sha256(content)


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the tree for one writer (a lock on the directory itself: nothing is left behind).

    Raises:
        TreeLockedError: another process holds it.
        TreeNotFoundError: `root` is not a directory.
    """
    try:
        handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise TreeNotFoundError(f"{root}: not a directory: {error}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise TreeLockedError(f"{root}: another process is patching or reverting this tree") from error
        yield
    finally:
        os.close(handle)


def read_journal(root: Path) -> Journal | None:
    """The tree's journal, None when no change is in effect or under way.

    Raises:
        JournalError: it is damaged.
    """
    file = root / STATE_DIR / JOURNAL
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        journal = Journal(**{**data, "changes": tuple(Change(**change) for change in data["changes"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise JournalError(f"{file}: damaged journal: {error}") from error
    if journal.phase not in PHASES:
        raise JournalError(f"{file}: phase is {journal.phase!r}, allowed: {', '.join(PHASES)}")
    return journal


def recover(root: Path) -> str | None:
    """Undo what an interrupted command left, if anything; the caller holds the lock.

    Returns:
        The interrupted phase, or None when there was nothing to do.

    Raises:
        FileMismatchError: a file was edited meanwhile; nothing is written then.
        JournalError: the journal or a needed backup is damaged.
        TreeWriteError: the tree cannot be written.
    """
    journal = read_journal(root)
    if journal is None:
        with _as_tree_error(root):
            _discard(root)  # leftovers from before a journal was written, or from after it was deleted
        return None
    if journal.phase == "applied":
        return None
    undo(root, journal)
    return journal.phase


def change(root: Path, journal: Journal, contents: Mapping[str, bytes]) -> None:
    """Give every file of `journal` its new content, all or none; the caller holds the lock and has recovered.

    Args:
        root: the tree.
        journal: what is changed; its `before` hashes must be the files' present ones.
        contents: new content by path.

    Raises:
        TreeWriteError: the tree cannot be written; it is unchanged.
    """
    state = root / STATE_DIR
    with _as_tree_error(root):
        try:
            for item in journal.changes:
                old = read_file(root, item.path)
                if old is not None:
                    _store(state / "backup" / item.path, old, root / item.path)
                _store(state / "staged" / item.path, contents[item.path], root / item.path)
        except OSError:
            _discard(root)
            raise
        try:
            _write_journal(root, journal, "applying")
            for item in journal.changes:
                (root / item.path).parent.mkdir(parents=True, exist_ok=True)
                _replace(state / "staged" / item.path, root / item.path)
            _write_journal(root, journal, "applied")
        except OSError:
            # Backups exist and nothing else writes: restoring is safe now, and `recover` repeats it if it fails too.
            undo(root, journal)
            raise
        shutil.rmtree(state / "staged", ignore_errors=True)


def adopt(root: Path, journal: Journal, originals: Mapping[str, bytes]) -> None:
    """Record a change that was made by other means, so that `undo` can take it back; the caller holds the lock.

    Args:
        root: the tree.
        journal: what the files were and are.
        originals: content before the change, by path; none for files that the change created.

    Raises:
        TreeWriteError: the tree cannot be written; it is unchanged.
    """
    with _as_tree_error(root):
        try:
            for path, content in originals.items():
                _store(root / STATE_DIR / "backup" / path, content, root / path)
            _write_journal(root, journal, "applied")
        except OSError:
            _discard(root)
            raise


def undo(root: Path, journal: Journal, *, force: bool = False) -> None:
    """Restore every file of `journal` and forget it; the caller holds the lock.

    Args:
        root: the tree.
        journal: what was changed.
        force: also overwrite files that were edited after the change.

    Raises:
        FileMismatchError: a file was edited after the change and `force` is not set; nothing is written then.
        JournalError: a needed backup is missing or damaged; nothing is written then.
        TreeWriteError: the tree cannot be written; calling again continues.
    """
    restore: list[tuple[Change, bytes | None]] = []
    for item in journal.changes:
        present = file_hash(root, item.path)
        if present == item.before:
            continue
        if present not in (item.after, None) and not force:
            raise FileMismatchError(item.path, item.after, present, "edited since; revert --force discards the edit")
        restore.append((item, _backup(root, item) if item.before is not None else None))
    with _as_tree_error(root):
        if not (root / STATE_DIR / JOURNAL).exists() and not restore:
            return _discard(root)
        _write_journal(root, journal, "reverting")
        for item, content in restore:
            file = root / item.path
            if content is None:
                file.unlink(missing_ok=True)
                _sync_directory(file.parent)
            else:
                source = root / STATE_DIR / "restored" / item.path
                _store(source, content, root / STATE_DIR / "backup" / item.path)
                file.parent.mkdir(parents=True, exist_ok=True)
                _replace(source, file)
        (root / STATE_DIR / JOURNAL).unlink()
        _sync_directory(root / STATE_DIR)
        _discard(root)


def _backup(root: Path, item: Change) -> bytes:
    file = root / STATE_DIR / "backup" / item.path
    try:
        content = file.read_bytes()
    except OSError as error:
        raise JournalError(f"{file}: the original of {item.path} cannot be read: {error}") from error
    if sha256(content) != item.before:
        raise JournalError(f"{file}: SHA-256 is {sha256(content)}, the original of {item.path} has {item.before}")
    return content


def _replace(source: Path, target: Path) -> None:
    """The one place where a file of the tree changes: atomically, with a new modification time (builds notice)."""
    os.replace(source, target)
    _sync_directory(target.parent)


def _store(file: Path, content: bytes, like: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    if like.exists():
        shutil.copymode(like, file)


def _write_journal(root: Path, journal: Journal, phase: str) -> None:
    state = root / STATE_DIR
    data = {**asdict(journal), "phase": phase}
    _store(state / (JOURNAL + ".new"), json.dumps(data, indent=1).encode(), state)
    os.replace(state / (JOURNAL + ".new"), state / JOURNAL)
    _sync_directory(state)


def _discard(root: Path) -> None:
    if (root / STATE_DIR).exists():
        shutil.rmtree(root / STATE_DIR)


def _sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _as_tree_error(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        state = read_journal(root)
        left = "it is unchanged" if state is None else f"it is in phase {state.phase!r}: repeat or revert to clean up"
        raise TreeWriteError(f"{root}: cannot be written: {error}; {left}") from error
