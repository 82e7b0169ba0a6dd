"""Unified diffs applied to bytes in memory.

`unidiff` parses. Applying is done here rather than by patch(1) or `git apply` because the result must exist as bytes
before any file of the tree is touched, because both of those accept shifted or ambiguous places silently (and
`git apply` skips paths outside its repository), and because neither has to be installed where only headers are patched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from unidiff import Hunk as ParsedHunk
from unidiff import PatchSet
from unidiff.errors import UnidiffParseError

from .errors import HunkError, ManifestError

MAX_FUZZ = 2  # context lines that may be dropped at each end of a hunk, as in patch(1)


@dataclass(frozen=True)
class Hunk:
    """One hunk: `old` lines at line `start` (1-based) become `new`; `lead`/`trail` count outer context lines."""

    header: str
    start: int
    old: tuple[bytes, ...]
    new: tuple[bytes, ...]
    lead: int
    trail: int
    new_start: int
    changed: int  # lines added plus lines removed

    def reversed(self) -> Hunk:
        """The hunk that undoes this one."""
        return Hunk(self.header, self.new_start, self.new, self.old, self.lead, self.trail, self.start, self.changed)

    def trimmed(self, fuzz: int) -> tuple[int, tuple[bytes, ...], tuple[bytes, ...]]:
        """(lines dropped in front, old, new) with up to `fuzz` context lines dropped at each end."""
        front, back = min(fuzz, self.lead), min(fuzz, self.trail)
        return front, self.old[front : len(self.old) - back], self.new[front : len(self.new) - back]


@dataclass(frozen=True)
class FilePatch:
    """The hunks of one patch for one file; `creates` when the file does not exist before."""

    path: str
    hunks: tuple[Hunk, ...]
    creates: bool

    @property
    def changed_lines(self) -> int:
        """Lines added plus lines removed."""
        return sum(h.changed for h in self.hunks)

    def apply(self, content: bytes | None, *, fuzz: bool = False) -> bytes:
        """The file's new content.

        Args:
            content: the file's present content, or None when it does not exist.
            fuzz: also accept a hunk at another line, or with up to two context lines less, if the place is unique.

        Raises:
            HunkError: a hunk does not fit, or fits in several places.
        """
        if self.creates:
            if content is not None:
                raise HunkError(self.path, self.hunks[0].header, "creates the file, but it exists already")
            return b"".join(self.hunks[0].new)
        if content is None:
            raise HunkError(self.path, self.hunks[0].header, "does not apply: the file does not exist")
        return _apply_hunks(self.path, content, self.hunks, fuzz)

    def revert(self, content: bytes) -> bytes | None:
        """The file's content before the patch, from its patched content; None when the patch creates the file.

        Raises:
            HunkError: the content is not what the patch produces.
        """
        if not self.creates:
            return _apply_hunks(self.path, content, [h.reversed() for h in self.hunks], False)
        if content != b"".join(self.hunks[0].new):
            raise HunkError(self.path, self.hunks[0].header, "cannot be reversed: the created file was changed")
        return None


def split_lines(content: bytes) -> list[bytes]:
    r"""Lines with their ends kept, split at ``\n`` only, as diff(1) does (form feeds and ``\r`` are content)."""
    lines = content.split(b"\n")
    return [line + b"\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def _places(lines: Sequence[bytes], old: tuple[bytes, ...], first: int) -> list[int]:
    return [i for i in range(first, len(lines) - len(old) + 1) if tuple(lines[i : i + len(old)]) == old]


def _apply_hunks(path: str, content: bytes, hunks: Sequence[Hunk], fuzz: bool) -> bytes:
    lines = split_lines(content)
    out: list[bytes] = []
    done = 0  # input lines consumed
    for hunk in hunks:
        at = hunk.start if not hunk.old else hunk.start - 1
        old, new = hunk.old, hunk.new
        if at < done or tuple(lines[at : at + len(old)]) != old or at > len(lines):
            if not fuzz:
                raise HunkError(path, hunk.header, _first_difference(lines, at, old))
            at, old, new = _search(path, lines, hunk, done)
        out += lines[done:at]
        out += new
        done = at + len(old)
    return b"".join(out + lines[done:])


def _search(
    path: str, lines: Sequence[bytes], hunk: Hunk, done: int
) -> tuple[int, tuple[bytes, ...], tuple[bytes, ...]]:
    for level in range(MAX_FUZZ + 1):
        _, old, new = hunk.trimmed(level)
        if not old:
            break
        places = _places(lines, old, done)
        if len(places) == 1:
            return places[0], old, new
        if places:
            shown = ", ".join(str(p + 1) for p in places[:5])
            raise HunkError(path, hunk.header, f"fits at lines {shown}: refused, the place must be unique")
    raise HunkError(path, hunk.header, f"does not apply anywhere, even with {MAX_FUZZ} context lines dropped")


def _first_difference(lines: Sequence[bytes], at: int, old: tuple[bytes, ...]) -> str:
    for i, expected in enumerate(old):
        found = lines[at + i] if 0 <= at + i < len(lines) else None
        if found != expected:
            shown = "end of file" if found is None else repr(found.decode("utf-8", "replace"))
            return f"does not apply: line {at + i + 1} is {shown}, expected {expected.decode('utf-8', 'replace')!r}"
    return f"does not apply at line {at + 1}"


def parse_patch(data: bytes, name: str) -> list[FilePatch]:
    """Parse one ``-p1`` patch, free text before the first file header allowed.

    Args:
        data: the patch file's bytes.
        name: its name, for error messages.

    Raises:
        ManifestError: it is no unified diff, names an unsafe path, or renames or deletes a file.
    """
    text = data.decode("utf-8", "surrogateescape")
    try:
        parsed = PatchSet(line + "\n" for line in text.split("\n")[: None if not text.endswith("\n") else -1])
    except UnidiffParseError as error:
        raise ManifestError(name, f"not a unified diff: {error}") from error
    if not parsed:
        raise ManifestError(name, "holds no hunk")
    patches = []
    for file in parsed:
        source, target = (_strip_first(str(p), name) for p in (file.source_file, file.target_file))
        if target is None or (source is not None and source != target):
            raise ManifestError(name, f"renames or deletes {file.source_file}; only changed and new files are allowed")
        patches.append(FilePatch(target, tuple(_convert(h) for h in file), source is None))
    return patches


def _strip_first(path: str, name: str) -> str | None:
    path = path.split("\t")[0].strip()
    if path == "/dev/null":
        return None
    parts = PurePosixPath(path).parts[1:]
    if path.startswith("/") or not parts or ".." in parts:
        raise ManifestError(name, f"path {path!r} is not of the form a/<relative path>")
    return "/".join(parts)


def _convert(parsed: ParsedHunk) -> Hunk:
    old: list[bytes] = []
    new: list[bytes] = []
    kinds: list[str] = []
    for line in parsed:
        value = line.value.encode("utf-8", "surrogateescape")
        if not line.line_type:  # a blank line between two hunks
            continue
        if line.line_type == "\\":  # "No newline at end of file" belongs to the line before it
            for side, types in ((old, " -"), (new, " +")):
                if kinds and kinds[-1] in types and side:
                    side[-1] = side[-1].rstrip(b"\n")
            continue
        kinds.append(line.line_type)
        if kinds[-1] in " -":
            old.append(value)
        if kinds[-1] in " +":
            new.append(value)
    lead = next((i for i, k in enumerate(kinds) if k != " "), len(kinds))
    trail = next((i for i, k in enumerate(reversed(kinds)) if k != " "), len(kinds))
    changed = sum(k != " " for k in kinds)
    header = f"@@ -{parsed.source_start},{parsed.source_length} +{parsed.target_start},{parsed.target_length} @@"
    return Hunk(header, parsed.source_start, tuple(old), tuple(new), lead, trail, parsed.target_start, changed)
