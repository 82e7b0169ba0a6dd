"""check, apply, verify and revert of a release's patch series on a source tree."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from . import transaction
from .errors import FileMismatchError, HunkError, JournalError, ManifestError, VerifyError
from .manifest import Release, TouchedFile
from .transaction import Change, Journal, file_hash, read_file, sha256


class FileState(str, Enum):
    """How a touched file compares with the manifest."""

    PRISTINE = "pristine"
    PATCHED = "patched"
    MISSING = "missing"
    DIFFERENT = "different"


class TreeState(str, Enum):
    """How a whole tree compares with the manifest."""

    PRISTINE = "pristine"  # every file as released
    PATCHED = "patched"  # every file as after the series
    PATCHED_WITH_FUZZ = "patched with fuzz"  # patched by us, but from other bytes than the release's
    INTERRUPTED = "interrupted"  # an apply or revert died; the next apply or revert cleans up
    MIXED = "mixed"  # some files pristine, some patched
    DIFFERENT = "different"  # a file is neither
    OTHER_SERIES = "another series applied"  # by us, of another release or another version of ETAP


@dataclass(frozen=True)
class FileReport:
    """One touched file: its state and hashes."""

    path: str
    state: FileState
    actual: str | None
    before: str | None
    after: str


@dataclass(frozen=True)
class TreeReport:
    """What `check` found; `problems` is empty when apply would succeed or has nothing to do."""

    root: Path
    release: str
    state: TreeState
    files: tuple[FileReport, ...]
    problems: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Outcome:
    """What apply or revert did: the paths it changed, and the interrupted phase it cleaned up first, if any."""

    changed: tuple[str, ...]
    recovered: str | None = None


def matches(release: Release, root: Path) -> bool:
    """Whether every listed file is, byte for byte, the release's or its patched form."""
    return all(file_hash(root, f.path) in (f.before, f.after) for f in release.files)


def check(release: Release, root: Path, *, fuzz: bool = False) -> TreeReport:
    """Compare a tree with the manifest and try the series in memory; writes nothing.

    Args:
        release: the release the tree should be.
        root: the tree.
        fuzz: try the series on files that differ from the release's, too.

    Raises:
        ManifestError: the series is malformed.
        TreeNotFoundError: a touched file is a link or a directory.
        JournalError: the tree's journal is damaged.
    """
    files = tuple(_report(f, file_hash(root, f.path)) for f in release.files)
    journal = transaction.read_journal(root)
    state = _tree_state(release, root, files, journal)
    problems: list[str] = []
    if state is TreeState.OTHER_SERIES:
        problems.append(_other_series(release, root, journal))
    elif state in (TreeState.PRISTINE, TreeState.DIFFERENT, TreeState.MIXED):
        try:
            _plan(release, root, fuzz)
        except (FileMismatchError, HunkError, ManifestError) as error:
            problems.append(str(error))
    elif state is TreeState.INTERRUPTED:
        problems.append("an earlier command was interrupted; apply or revert cleans up")
    return TreeReport(root, release.id, state, files, tuple(problems))


def apply(release: Release, root: Path, *, fuzz: bool = False) -> Outcome:
    """Apply the series: all files or none. On a patched tree nothing is done.

    Args:
        release: the release the tree must be.
        root: the tree.
        fuzz: accept files that differ from the release's, if every hunk fits in exactly one place.

    Raises:
        FileMismatchError: a file differs and `fuzz` is not set; names the file and both hashes.
        HunkError: with `fuzz`, a hunk fits nowhere or in several places.
        JournalError: another series is applied to the tree, or its journal is damaged.
        ManifestError: the series is malformed, empty, or does not lead to the manifest's hashes.
        TreeLockedError: another process changes the tree.
        TreeWriteError: the tree cannot be written; it is unchanged.
    """
    with transaction.locked(root):
        recovered = transaction.recover(root)
        journal = transaction.read_journal(root)
        if journal is not None:
            if journal.series_sha256 != release.series_sha256():
                raise JournalError(_other_series(release, root, journal))
            for item in journal.changes:
                actual = file_hash(root, item.path)
                if actual != item.after:
                    raise FileMismatchError(item.path, item.after, actual, "edited after the patch; revert first")
            return Outcome((), recovered)
        if not release.patch_names:
            raise ManifestError(release.series, f"the series for {release.upstream} {release.id} is empty")
        if all(file_hash(root, f.path) == f.after for f in release.files):
            return Outcome((), recovered)
        contents = _plan(release, root, fuzz)
        changes = tuple(Change(path, file_hash(root, path), sha256(new)) for path, new in contents.items())
        new = Journal("applying", release.upstream, release.id, release.series_sha256(), fuzz, changes)
        transaction.change(root, new, contents)
        return Outcome(tuple(contents), recovered)


def verify(release: Release, root: Path) -> TreeReport:
    """Make sure that every touched file is the patched one.

    Raises:
        VerifyError: one is not; lists every such file with both hashes.
        TreeNotFoundError: a touched file is a link or a directory.
        JournalError: the tree's journal is damaged.
    """
    report = check(release, root)
    if report.state in (TreeState.PATCHED, TreeState.PATCHED_WITH_FUZZ):
        return report
    journal = transaction.read_journal(root)
    after = {c.path: c.after for c in journal.changes} if journal else {}
    problems = list(report.problems) + [
        str(FileMismatchError(f.path, after.get(f.path, f.after), f.actual, f"is {f.state.value}"))
        for f in report.files
        if f.actual != after.get(f.path, f.after)
    ]
    raise VerifyError(problems)


def revert(release: Release, root: Path, *, force: bool = False) -> Outcome:
    """Bring every touched file back to its bytes before the series, from any state. On a pristine tree nothing is done.

    Without a journal (the tree was patched by other means, or the record was deleted) the series is reversed in memory
    and must lead to the release's hashes.

    Args:
        release: the release that was patched.
        root: the tree.
        force: discard edits made to patched files since.

    Raises:
        FileMismatchError: a file was edited since and `force` is not set, or no original is known for it.
        JournalError: the tree's journal or a backup is damaged.
        TreeLockedError: another process changes the tree.
        TreeWriteError: the tree cannot be written; calling again continues.
    """
    with transaction.locked(root):
        journal = transaction.read_journal(root)
        if journal is not None:
            changed = tuple(c.path for c in journal.changes if file_hash(root, c.path) != c.before)
            transaction.undo(root, journal, force=force)
            return Outcome(changed, None if journal.phase == "applied" else journal.phase)
        transaction.recover(root)
        return Outcome(_revert_without_journal(release, root))


def _revert_without_journal(release: Release, root: Path) -> tuple[str, ...]:
    originals: dict[str, bytes | None] = {}
    for file in release.files:
        content = read_file(root, file.path)
        actual = None if content is None else sha256(content)
        if actual == file.before:
            continue
        if content is None or actual != file.after:
            raise FileMismatchError(file.path, file.after, actual, "edited, and the tree has no record of the original")
        for patch in reversed(release.patches()):
            if patch.path == file.path and content is not None:
                content = patch.revert(content)
        if (None if content is None else sha256(content)) != file.before:
            raise ManifestError(release.series, f"reversing it does not give the original of {file.path}")
        originals[file.path] = content
    if originals:
        changes = tuple(Change(f.path, f.before, f.after) for f in release.files if f.path in originals)
        journal = Journal("applied", release.upstream, release.id, release.series_sha256(), False, changes)
        transaction.adopt(root, journal, {path: old for path, old in originals.items() if old is not None})
        transaction.undo(root, journal)
    return tuple(originals)


def _other_series(release: Release, root: Path, journal: Journal | None) -> str:
    there = f"{journal.upstream} {journal.release}, SHA-256 {journal.series_sha256[:12]}" if journal else "unknown"
    return (
        f"{root}: another series ({there}) is applied, this one is {release.upstream} {release.id}, "
        f"{release.series_sha256()[:12]}; revert first"
    )


def _plan(release: Release, root: Path, fuzz: bool) -> dict[str, bytes]:
    """New content of every touched file, or the reason why not."""
    contents: dict[str, bytes | None] = {}
    for file in release.files:
        content = contents[file.path] = read_file(root, file.path)
        actual = None if content is None else sha256(content)
        if actual != file.before and not fuzz:
            hint = (
                "already patched while others are not; revert first"
                if actual == file.after
                else f"not the file of {release.upstream} {release.id}; --fuzz tries the series on it all the same"
            )
            raise FileMismatchError(file.path, file.before, actual, hint)
    for patch in release.patches():
        contents[patch.path] = patch.apply(contents[patch.path], fuzz=fuzz)
    for file in release.files:
        new = contents[file.path]
        if new is None or (not fuzz and sha256(new) != file.after):
            raise ManifestError(
                release.series,
                f"gives {file.path} the SHA-256 {sha256(new) if new is not None else None}, "
                f"the manifest says {file.after}",
            )
    return {path: content for path, content in contents.items() if content is not None}


def _report(file: TouchedFile, actual: str | None) -> FileReport:
    if actual == file.before:
        state = FileState.PRISTINE
    elif actual == file.after:
        state = FileState.PATCHED
    else:
        state = FileState.MISSING if actual is None else FileState.DIFFERENT
    return FileReport(file.path, state, actual, file.before, file.after)


def _tree_state(release: Release, root: Path, files: tuple[FileReport, ...], journal: Journal | None) -> TreeState:
    if journal is not None and journal.phase != "applied":
        return TreeState.INTERRUPTED
    if journal is not None and journal.series_sha256 != release.series_sha256():
        return TreeState.OTHER_SERIES
    states = {f.state for f in files}
    if states == {FileState.PATCHED}:
        return TreeState.PATCHED
    if journal is not None and all(file_hash(root, c.path) == c.after for c in journal.changes):
        return TreeState.PATCHED_WITH_FUZZ
    if states <= {FileState.PRISTINE}:
        return TreeState.PRISTINE
    return TreeState.MIXED if states <= {FileState.PRISTINE, FileState.PATCHED} else TreeState.DIFFERENT
