"""A small made-up upstream for the tests of the patch tooling: sources, archive, series and manifest."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from etap_integration.patching.manifest import Release, read_manifest

ROOT = "demo-1.0/vendor/lib"
ORIGINAL = {
    "src/api.cpp": b"#include <a>\n#include <b>\n\nint f() {\n    int x = 1;\n    return x;\n}\n",
    "src/other.cpp": b"one\r\ntwo\x0cstill two\r\nthree",  # odd line ends, and none at the end
    "src/untouched.cpp": b"nobody changes this\n",
    "setup.py": b"sources = []\nsources += ['a']\n",
}
PATCHED = {
    "src/api.cpp": b"#include <a>\n#include <b>\n#include <etap>\n\nint f() {\n    int x = 2;\n    return x;\n}\n",
    "src/other.cpp": b"one\r\ntwo\x0cstill two\r\n3",
    "src/untouched.cpp": ORIGINAL["src/untouched.cpp"],
    "src/new.h": b"#pragma once\n",
    "setup.py": b"sources = []\nsources += ['a']\nsources += ['etap']\n",
}
PATCH_1 = b"""Description: first
--- a/src/api.cpp
+++ b/src/api.cpp
@@ -2,4 +2,5 @@
 #include <b>
+#include <etap>
\x20
 int f() {
-    int x = 1;
+    int x = 2;
--- a/src/other.cpp
+++ b/src/other.cpp
@@ -2,2 +2,2 @@
 two\x0cstill two\r
-three
\\ No newline at end of file
+3
\\ No newline at end of file
--- /dev/null
+++ b/src/new.h
@@ -0,0 +1,1 @@
+#pragma once
"""
PATCH_2 = b"""Description: second
--- a/setup.py
+++ b/setup.py
@@ -2,1 +2,2 @@
 sources += ['a']
+sources += ['etap']
"""
SERIES = {"0001-first.patch": PATCH_1, "0002-second.patch": PATCH_2}


@dataclass
class Demo:
    """The made-up upstream on disk."""

    release: Release
    archive: Path
    folder: Path

    def tree(self, name: str = "tree") -> Path:
        """A fresh pristine tree."""
        root = self.folder / name
        write_tree(root, ORIGINAL)
        return root


def sha(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()


def write_tree(root: Path, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


def read_tree(root: Path) -> dict[str, bytes]:
    """Every file below `root`, so that a comparison also sees leftovers."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def make_tar(file: Path, members: dict[str, bytes], extra: list[tarfile.TarInfo] | None = None) -> Path:
    with tarfile.open(file, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in extra or []:
            tar.addfile(info)
    return file


def make_demo(folder: Path) -> Demo:
    archive = make_tar(folder / "demo-1.0.tar.gz", {f"{ROOT}/{p}": c for p, c in ORIGINAL.items()})
    patches = folder / "patches" / "demo"
    write_tree(patches, SERIES)
    (patches / "series").write_text("# order matters\n" + "\n".join(SERIES) + "\n")
    files = [
        {"path": p, "before": sha(ORIGINAL.get(p)), "after": sha(PATCHED[p])}
        for p in PATCHED
        if PATCHED[p] != ORIGINAL.get(p)
    ]
    content = archive.read_bytes()
    pin = {"project": "demo", "version": "1.0", "filename": archive.name, "size": len(content), "sha256": sha(content)}
    release = {"id": "1.0", "commit": "abc", "archive": pin, "root": ROOT, "series": "series", "files": files}
    manifest = {"schema": 1, "upstream": "demo", "repository": "https://example.org/demo", "releases": [release]}
    (patches / "manifest.json").write_text(json.dumps(manifest))
    return Demo(read_manifest(patches / "manifest.json").release(), archive, folder)


_STEPS = ("replace", "fsync", "unlink", "mkdir", "rmdir")


def killed_before_step(step: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child that kills itself with SIGKILL before its `step`-th change of the file system.

    Returns:
        False when the child finished because it has fewer steps.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def counting(original: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal count
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return call

        try:
            for name in _STEPS:
                setattr(os, name, counting(getattr(os, name)))
            action()
        except BaseException:
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed instead of being killed"
    return False
