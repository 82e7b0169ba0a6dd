"""For maintainers of the series: write the hashes that a series leads to into the manifest."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .errors import FileMismatchError
from .manifest import TouchedFile, read_manifest
from .transaction import read_file, sha256


def refresh(manifest_file: Path, release_id: str, tree: Path) -> tuple[TouchedFile, ...]:
    """Apply a release's series to its pristine tree in memory and record every touched file's hashes.

    Args:
        manifest_file: the manifest to rewrite.
        release_id: which release in it.
        tree: that release's pristine tree; nothing is written to it.

    Returns:
        The recorded files.

    Raises:
        FileMismatchError: a file the manifest already lists is not pristine in `tree`.
        HunkError: the series does not apply.
        ManifestError: the manifest or the series is malformed.
    """
    release = read_manifest(manifest_file).release(release_id)
    known = {file.path: file.before for file in release.files}
    before: dict[str, bytes | None] = {}
    after: dict[str, bytes] = {}
    for patch in release.patches(listed_only=False):
        if patch.path not in before:
            content = before[patch.path] = read_file(tree, patch.path)
            actual = None if content is None else sha256(content)
            if patch.path in known and actual != known[patch.path]:
                raise FileMismatchError(patch.path, known[patch.path], actual, f"{tree} is not pristine")
        after[patch.path] = patch.apply(after.get(patch.path, before[patch.path]))
    files = tuple(
        TouchedFile(path, None if (old := before[path]) is None else sha256(old), sha256(new))
        for path, new in after.items()
    )
    data = json.loads(manifest_file.read_text(encoding="utf-8"))
    entry = next(e for e in data["releases"] if e["id"] == release_id)
    entry["files"] = [{"path": f.path, "before": f.before, "after": f.after} for f in files]
    staged = manifest_file.with_suffix(".new")
    staged.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    os.replace(staged, manifest_file)
    return files
