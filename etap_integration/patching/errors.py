"""Exceptions of the patch tooling. Every message names the argument or file, its value, and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


class PatchingError(Exception):
    """Base of everything the patch tooling raises on purpose."""


class UnknownNameError(PatchingError):
    """A name given by the caller is not one of the known ones."""

    def __init__(self, what: str, value: str, allowed: Iterable[str]) -> None:
        self.what, self.value, self.allowed = what, value, sorted(allowed)
        super().__init__(f"{what}: {value!r} is unknown; allowed: {', '.join(self.allowed) or '(none)'}")


class ManifestError(PatchingError):
    """A manifest, series or patch file of this project is missing or malformed."""

    def __init__(self, file: Path | str, problem: str) -> None:
        self.file = file
        super().__init__(f"{file}: {problem}")


class DownloadError(PatchingError):
    """The pinned archive could not be obtained from any configured package index."""


class ArchiveHashError(PatchingError):
    """An archive is not, byte for byte, the pinned one."""

    def __init__(self, archive: Path, expected: str, actual: str, expected_size: int, actual_size: int) -> None:
        self.archive, self.expected, self.actual = archive, expected, actual
        state = "truncated" if actual_size < expected_size else "altered"
        super().__init__(
            f"{archive}: {state} archive: SHA-256 is {actual} ({actual_size} bytes), "
            f"the pinned one is {expected} ({expected_size} bytes)"
        )


class UnsafeArchiveError(PatchingError):
    """An archive holds a member that must not be unpacked."""

    def __init__(self, archive: Path, member: str, problem: str) -> None:
        self.archive, self.member = archive, member
        super().__init__(f"{archive}: member {member!r} refused: {problem}; nothing was unpacked")


class TreeNotFoundError(PatchingError):
    """A directory is not the upstream source tree it is said to be."""


class TreeLockedError(PatchingError):
    """Another process is changing the same tree."""


class TreeWriteError(PatchingError):
    """The tree could not be written; it was left as it was unless the message says otherwise."""


class FileMismatchError(PatchingError):
    """A touched file is neither the version the series is for nor its patched form."""

    def __init__(self, file: str, expected: str | None, actual: str | None, hint: str = "") -> None:
        self.file, self.expected, self.actual = file, expected, actual
        super().__init__(
            f"{file}: SHA-256 is {actual or '(file missing)'}, expected {expected or '(no such file)'}"
            + (f"; {hint}" if hint else "")
        )


class HunkError(PatchingError):
    """A hunk does not apply, or would apply in more than one place."""

    def __init__(self, file: str, hunk: str, problem: str) -> None:
        self.file, self.hunk = file, hunk
        super().__init__(f"{file}: hunk {hunk} {problem}")


class JournalError(PatchingError):
    """The record of an earlier apply in a tree is damaged or belongs to another series."""


class VerifyError(PatchingError):
    """A tree is not in the fully patched state."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("not the patched tree:\n" + "\n".join(f"  {p}" for p in problems))


class BuildError(PatchingError):
    """Building the patched library failed, or its preconditions do not hold."""

    def __init__(
        self, problem: str, *, command: str | None = None, log: Path | None = None, tail: Sequence[str] = ()
    ) -> None:
        self.command, self.log, self.tail = command, log, list(tail)
        parts = [problem]
        if command:
            parts.append(f"failing command: {command}")
        parts += [f"  | {line}" for line in tail]
        if log:
            parts.append(f"full log: {log}")
        super().__init__("\n".join(parts))
