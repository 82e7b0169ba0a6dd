"""check, apply, verify and revert on a small made-up upstream: refusals, interruptions, failures."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from patching_fixtures import ORIGINAL, PATCHED, killed_before_step, make_demo, read_tree, sha

from etap_integration.patching import series, transaction
from etap_integration.patching.errors import (
    FileMismatchError,
    HunkError,
    JournalError,
    ManifestError,
    TreeLockedError,
    TreeNotFoundError,
    TreeWriteError,
    VerifyError,
)
from etap_integration.patching.manifest import read_manifest
from etap_integration.patching.series import TreeState
from etap_integration.patching.transaction import STATE_DIR

TOUCHED = sorted(p for p in PATCHED if PATCHED[p] != ORIGINAL.get(p))


@pytest.fixture
def demo(tmp_path):
    return make_demo(tmp_path)


def visible(root: Path) -> dict[str, bytes]:
    return {p: c for p, c in read_tree(root).items() if not p.startswith(STATE_DIR)}


def test_round_trip(demo):
    root = demo.tree()
    assert series.check(demo.release, root).state is TreeState.PRISTINE
    assert sorted(series.apply(demo.release, root).changed) == TOUCHED
    assert visible(root) == PATCHED
    assert series.verify(demo.release, root).state is TreeState.PATCHED
    assert series.check(demo.release, root).problems == ()
    assert sorted(series.revert(demo.release, root).changed) == TOUCHED
    assert read_tree(root) == ORIGINAL  # no leftovers either


def test_apply_and_revert_are_idempotent(demo):
    root = demo.tree()
    series.apply(demo.release, root)
    stamps = {p: (root / p).stat().st_mtime_ns for p in TOUCHED}
    assert series.apply(demo.release, root).changed == ()
    assert {p: (root / p).stat().st_mtime_ns for p in TOUCHED} == stamps
    series.revert(demo.release, root)
    assert series.revert(demo.release, root).changed == ()
    assert read_tree(root) == ORIGINAL


def test_file_mode_is_kept(demo):
    root = demo.tree()
    (root / "setup.py").chmod(0o755)
    series.apply(demo.release, root)
    assert (root / "setup.py").stat().st_mode & 0o777 == 0o755
    series.revert(demo.release, root)
    assert (root / "setup.py").stat().st_mode & 0o777 == 0o755


def test_hard_linked_copy_is_left_alone(demo):
    """Installers share files between environments by hard links; patching one must not change the others."""
    root = demo.tree()
    os.link(root / "setup.py", demo.folder / "linked")
    series.apply(demo.release, root)
    assert (demo.folder / "linked").read_bytes() == ORIGINAL["setup.py"]


def test_altered_file_is_refused_with_name_and_both_hashes(demo):
    root = demo.tree()
    altered = b"// mine\n" + ORIGINAL["src/api.cpp"]
    (root / "src/api.cpp").write_bytes(altered)
    before = read_tree(root)
    with pytest.raises(FileMismatchError) as caught:
        series.apply(demo.release, root)
    for part in ("src/api.cpp", sha(altered), sha(ORIGINAL["src/api.cpp"]), "--fuzz"):
        assert part in str(caught.value)
    assert read_tree(root) == before
    report = series.check(demo.release, root)
    assert report.state is TreeState.DIFFERENT and "src/api.cpp" in report.problems[0]


def test_missing_file_is_refused(demo):
    root = demo.tree()
    (root / "setup.py").unlink()
    with pytest.raises(FileMismatchError, match="file missing"):
        series.apply(demo.release, root)


def test_fuzz_only_when_asked_for_and_revert_restores_the_altered_bytes(demo):
    root = demo.tree()
    (root / "src/api.cpp").write_bytes(b"// mine\n" + ORIGINAL["src/api.cpp"])
    before = read_tree(root)
    assert series.check(demo.release, root, fuzz=True).problems == ()
    series.apply(demo.release, root, fuzz=True)
    assert (root / "src/api.cpp").read_bytes() == b"// mine\n" + PATCHED["src/api.cpp"]
    assert series.verify(demo.release, root).state is TreeState.PATCHED_WITH_FUZZ
    assert series.apply(demo.release, root).changed == ()
    series.revert(demo.release, root)
    assert read_tree(root) == before


def test_fuzz_refuses_what_fits_nowhere(demo):
    root = demo.tree()
    (root / "src/api.cpp").write_bytes(b"something else\n")
    before = read_tree(root)
    with pytest.raises(HunkError, match=r"src/api\.cpp: hunk .* does not apply anywhere"):
        series.apply(demo.release, root, fuzz=True)
    assert read_tree(root) == before


def test_half_patched_tree_is_refused_and_can_be_reverted(demo):
    root = demo.tree()
    (root / "setup.py").write_bytes(PATCHED["setup.py"])
    assert series.check(demo.release, root).state is TreeState.MIXED
    with pytest.raises(FileMismatchError, match=r"setup\.py.*revert first"):
        series.apply(demo.release, root)
    assert series.revert(demo.release, root).changed == ("setup.py",)
    assert read_tree(root) == ORIGINAL


def test_revert_without_a_record(demo):
    """Patched by other means, or the record was deleted: the series is reversed."""
    root = demo.tree()
    series.apply(demo.release, root)
    shutil.rmtree(root / STATE_DIR)
    assert series.verify(demo.release, root).state is TreeState.PATCHED
    series.revert(demo.release, root)
    assert read_tree(root) == ORIGINAL


def test_edit_after_apply_is_not_lost_unless_forced(demo):
    root = demo.tree()
    series.apply(demo.release, root)
    (root / "src/api.cpp").write_bytes(b"edited\n")
    before = read_tree(root)
    with pytest.raises(FileMismatchError, match=rf"src/api\.cpp.*{sha(b'edited' + bytes([10]))}.*--force"):
        series.revert(demo.release, root)
    with pytest.raises(FileMismatchError, match="edited after the patch"):
        series.apply(demo.release, root)
    with pytest.raises(VerifyError, match=r"src/api\.cpp"):
        series.verify(demo.release, root)
    assert read_tree(root) == before
    series.revert(demo.release, root, force=True)
    assert read_tree(root) == ORIGINAL


def test_deleted_patched_file_is_restored(demo):
    root = demo.tree()
    series.apply(demo.release, root)
    shutil.rmtree(root / "src")
    (root / "src").mkdir()
    (root / "src/untouched.cpp").write_bytes(ORIGINAL["src/untouched.cpp"])
    series.revert(demo.release, root)
    assert read_tree(root) == ORIGINAL


def test_verify_lists_every_file_that_is_not_patched(demo):
    with pytest.raises(VerifyError) as caught:
        series.verify(demo.release, demo.tree())
    assert len(caught.value.problems) == len(TOUCHED)
    for path in TOUCHED:
        assert path in str(caught.value)


def test_another_series_must_be_reverted_first(demo):
    root = demo.tree()
    series.apply(demo.release, root)
    patches = demo.folder / "patches/demo"
    (patches / "0002-second.patch").write_bytes(b"A new header.\n" + (patches / "0002-second.patch").read_bytes())
    with pytest.raises(JournalError, match=r"another series .* revert first"):
        series.apply(demo.release, root)
    assert series.check(demo.release, root).state is TreeState.OTHER_SERIES
    with pytest.raises(VerifyError, match="another series"):
        series.verify(demo.release, root)
    series.revert(demo.release, root)
    assert read_tree(root) == ORIGINAL


def test_symbolic_links_are_not_patched(demo):
    root = demo.tree()
    (demo.folder / "elsewhere.py").write_bytes(ORIGINAL["setup.py"])
    (root / "setup.py").unlink()
    (root / "setup.py").symlink_to(demo.folder / "elsewhere.py")
    with pytest.raises(TreeNotFoundError, match="symbolic link"):
        series.apply(demo.release, root)


def test_killed_at_every_step_of_apply(demo):
    """After kill -9 anywhere in apply no file is torn, and both apply and revert finish the job."""
    step, states = 0, set()
    while True:
        step += 1
        root = demo.tree(f"tree{step}")
        if not killed_before_step(step, lambda root=root: series.apply(demo.release, root)):
            break
        now = visible(root)
        for path in TOUCHED:
            assert now.get(path) in (ORIGINAL.get(path), PATCHED[path]), (step, path)
        states.add(series.check(demo.release, root).state)
        copy = demo.folder / f"copy{step}"
        shutil.copytree(root, copy)
        series.apply(demo.release, copy)
        assert visible(copy) == PATCHED, step
        series.revert(demo.release, copy)
        assert read_tree(copy) == ORIGINAL, step
        series.revert(demo.release, root)
        assert read_tree(root) == ORIGINAL, step
    assert step > 20
    assert {TreeState.PRISTINE, TreeState.INTERRUPTED, TreeState.PATCHED} <= states


@pytest.mark.parametrize("record", [True, False])
def test_killed_at_every_step_of_revert(demo, record):
    step = 0
    while True:
        step += 1 if record else 3
        root = demo.tree(f"tree{step}")
        series.apply(demo.release, root)
        if not record:
            shutil.rmtree(root / STATE_DIR)
        if not killed_before_step(step, lambda root=root: series.revert(demo.release, root)):
            assert read_tree(root) == ORIGINAL
            break
        copy = demo.folder / f"copy{step}"
        shutil.copytree(root, copy)
        series.revert(demo.release, root)
        assert read_tree(root) == ORIGINAL, step
        series.apply(demo.release, copy)
        assert visible(copy) == PATCHED, step
    assert step > 10


def test_killed_again_while_recovering(demo):
    for first in (14, 18, 22):
        step = 0
        while True:
            step += 1
            root = demo.tree(f"tree{first}-{step}")
            assert killed_before_step(first, lambda root=root: series.apply(demo.release, root))
            again = killed_before_step(step, lambda root=root: series.revert(demo.release, root))
            series.revert(demo.release, root)
            assert read_tree(root) == ORIGINAL, (first, step)
            if not again:
                break


def test_edit_between_interruption_and_recovery_is_not_lost(demo):
    root = demo.tree()
    step = 1
    while series.check(demo.release, root).state is not TreeState.INTERRUPTED:
        shutil.rmtree(root)
        demo.tree()
        assert killed_before_step(step, lambda: series.apply(demo.release, root))
        step += 1
    (root / "setup.py").write_bytes(b"mine\n")
    with pytest.raises(FileMismatchError, match=r"setup\.py"):
        series.apply(demo.release, root)
    assert (root / "setup.py").read_bytes() == b"mine\n"
    series.revert(demo.release, root, force=True)
    assert read_tree(root) == ORIGINAL


@pytest.mark.parametrize("error", [errno.EROFS, errno.ENOSPC])
def test_failing_write_leaves_the_tree_as_it_was(demo, monkeypatch, error):
    real, failures = os.replace, 0
    for nth in range(1, 20):
        root, count = demo.tree(f"tree{nth}"), 0

        def failing(source, target, nth=nth):
            nonlocal count
            count += 1
            if count == nth:
                raise OSError(error, os.strerror(error), str(target))
            return real(source, target)

        monkeypatch.setattr(os, "replace", failing)
        try:
            series.apply(demo.release, root)
            break
        except TreeWriteError as caught:
            failures += 1
            assert os.strerror(error) in str(caught) and "it is unchanged" in str(caught)
            assert read_tree(root) == ORIGINAL
        finally:
            monkeypatch.setattr(os, "replace", real)
    assert failures == len(TOUCHED) + 2  # every file, and the journal twice


def test_read_only_tree():
    """Real permissions: as root the attempt is made by a child without privileges."""
    folder = Path(tempfile.mkdtemp())
    try:
        demo = make_demo(folder)
        root = demo.tree()
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                if os.geteuid() == 0:
                    os.setgroups([])
                    os.setgid(65534)
                    os.setuid(65534)
                series.apply(demo.release, root)
                os.write(writer, b"applied")
            except BaseException as caught:
                os.write(writer, f"{type(caught).__name__}: {caught}".encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as stream:
            said = stream.read().decode()
        os.waitpid(child, 0)
        assert said.startswith("TreeWriteError") and str(root) in said and "it is unchanged" in said
        assert read_tree(root) == ORIGINAL
    finally:
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(folder)


def test_two_writers(demo):
    root = demo.tree()
    with transaction.locked(root), pytest.raises(TreeLockedError, match="another process"):
        series.apply(demo.release, root)
    series.apply(demo.release, root)


def test_damaged_journal_and_backup_are_reported(demo):
    root = demo.tree()
    series.apply(demo.release, root)
    backup = root / STATE_DIR / "backup/setup.py"
    backup.write_bytes(b"damaged")
    with pytest.raises(JournalError, match=r"backup/setup\.py: SHA-256 is"):
        series.revert(demo.release, root)
    assert visible(root) == PATCHED
    (root / STATE_DIR / "state.json").write_text("{")
    with pytest.raises(JournalError, match="damaged journal"):
        series.revert(demo.release, root)
    shutil.rmtree(root / STATE_DIR)
    series.revert(demo.release, root)
    assert read_tree(root) == ORIGINAL


def test_series_that_does_not_lead_to_the_manifest(demo):
    manifest = demo.folder / "patches/demo/manifest.json"
    data = json.loads(manifest.read_text())
    data["releases"][0]["files"][0]["after"] = "0" * 64
    manifest.write_text(json.dumps(data))
    root = demo.tree()
    with pytest.raises(ManifestError, match=r"gives .* the manifest says 0000"):
        series.apply(read_manifest(manifest).release(), root)
    assert read_tree(root) == ORIGINAL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=2), "schema is 2"),
        (lambda d: d.update(releases=[]), "non-empty list"),
        (lambda d: d["releases"][0]["archive"].update(sha256="xyz"), r"releases\[0\]\.archive\.sha256"),
        (lambda d: d["releases"][0]["archive"].update(filename="../x"), "plain relative path"),
        (lambda d: d["releases"][0]["files"][0].update(path="/etc/passwd"), "plain relative path"),
        (lambda d: d["releases"][0]["files"][0].update(path="a/../../b"), "plain relative path"),
        (lambda d: d["releases"][0].pop("root"), "root: must be str"),
        (lambda d: d["releases"].append(d["releases"][0]), "distinct ids"),
    ],
)
def test_malformed_manifests_are_refused(demo, change, message):
    manifest = demo.folder / "patches/demo/manifest.json"
    data = json.loads(manifest.read_text())
    change(data)
    manifest.write_text(json.dumps(data))
    with pytest.raises(ManifestError, match=message):
        read_manifest(manifest)


def test_patch_for_an_unlisted_file_is_refused(demo):
    extra = demo.folder / "patches/demo/0003-extra.patch"
    extra.write_bytes(b"--- a/src/untouched.cpp\n+++ b/src/untouched.cpp\n@@ -1 +1 @@\n-nobody changes this\n+x\n")
    with (extra.parent / "series").open("a") as stream:
        stream.write(f"{extra.name}\n")
    with pytest.raises(ManifestError, match=r"touches src/untouched\.cpp"):
        series.apply(demo.release, demo.tree())
