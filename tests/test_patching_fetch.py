"""Finding, downloading, checking and unpacking archives."""

from __future__ import annotations

import functools
import http.server
import io
import json
import os
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
from patching_fixtures import ORIGINAL, make_demo, make_tar, read_tree

from etap_integration.patching import archive, fetching, index
from etap_integration.patching.errors import (
    ArchiveHashError,
    DownloadError,
    TreeNotFoundError,
    TreeWriteError,
    UnknownNameError,
    UnsafeArchiveError,
)
from etap_integration.patching.index import DEFAULT_INDEX, IndexSettings, read_settings
from etap_integration.patching.manifest import Manifest, load_manifest


@pytest.fixture
def demo(tmp_path, monkeypatch):
    monkeypatch.setenv("ETAP_CACHE_DIR", str(tmp_path / "cache"))
    return make_demo(tmp_path)


@pytest.fixture
def only(monkeypatch):
    """Use exactly these index settings."""
    return lambda *a, **k: monkeypatch.setattr(index, "read_settings", lambda *_: IndexSettings(*a, **k))


def leftovers(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.name.startswith("."))


# Fetching ------------------------------------------------------------------------------------------------------------


def test_given_archive(demo):
    tree = fetching.fetch(demo.release, archive=demo.archive)
    assert read_tree(tree) == ORIGINAL
    assert tree == fetching.default_tree(demo.release) == fetching.locate_tree(demo.release)
    assert leftovers(demo.folder / "cache") == []


def test_fetched_tree_is_reused_and_chosen_directory_must_be_new(demo):
    fetching.fetch(demo.release, archive=demo.archive)
    assert fetching.fetch(demo.release, archive=Path("/nonexistent")) == fetching.default_tree(demo.release)
    dest = demo.folder / "here"
    assert read_tree(fetching.fetch(demo.release, archive=demo.archive, dest=dest)) == ORIGINAL
    with pytest.raises(TreeWriteError, match=r"dest=.*here: directory is not empty"):
        fetching.fetch(demo.release, archive=demo.archive, dest=dest)


@pytest.mark.parametrize("cut", [1, 100, 10**9])
def test_truncated_archive_is_refused(demo, cut):
    content = demo.archive.read_bytes()
    demo.archive.write_bytes(content[: max(0, len(content) - cut)])
    with pytest.raises(ArchiveHashError, match="truncated archive") as caught:
        fetching.fetch(demo.release, archive=demo.archive)
    assert demo.release.archive.sha256 in str(caught.value) and str(demo.archive) in str(caught.value)
    assert not (demo.folder / "cache" / "trees").exists()


def test_altered_archive_is_refused(demo):
    content = bytearray(demo.archive.read_bytes())
    content[-9] ^= 1
    demo.archive.write_bytes(content)
    with pytest.raises(ArchiveHashError, match="altered archive"):
        fetching.fetch(demo.release, archive=demo.archive)


def test_missing_archive(demo):
    with pytest.raises(TreeNotFoundError, match="archive=/nonexistent: no such file"):
        fetching.fetch(demo.release, archive=Path("/nonexistent"))


def test_failure_while_unpacking_leaves_nothing(demo, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive.shutil, "copyfileobj", full)
    with pytest.raises(TreeWriteError, match="No space left on device"):
        fetching.fetch(demo.release, archive=demo.archive)
    assert list((demo.folder / "cache/trees").iterdir()) == []


def test_cache_directory_that_cannot_be_written(demo, monkeypatch):
    (demo.folder / "file").write_text("")
    monkeypatch.setenv("ETAP_CACHE_DIR", str(demo.folder / "file"))
    with pytest.raises(TreeWriteError, match="file"):
        fetching.fetch(demo.release, archive=demo.archive)


# The index -----------------------------------------------------------------------------------------------------------


class Index(http.server.SimpleHTTPRequestHandler):
    """PEP 503 pages from files; PEP 691 pages below /json."""

    def do_GET(self):
        if self.path == "/json/demo/":
            files = [{"filename": "demo-1.0.tar.gz", "url": "../../files/demo-1.0.tar.gz#sha256=0", "hashes": {}}]
            body = json.dumps({"files": files}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/vnd.pypi.simple.v1+json")
            self.end_headers()
            self.wfile.write(body)
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(demo):
    site = demo.folder / "site"
    for folder in ("files", "simple/demo", "empty/demo"):
        (site / folder).mkdir(parents=True)
    (site / "files/demo-1.0.tar.gz").write_bytes(demo.archive.read_bytes())
    (site / "simple/demo/index.html").write_text('<a href="../../files/demo-1.0.tar.gz#sha256=0">demo-1.0.tar.gz</a>')
    (site / "empty/demo/index.html").write_text("<a href='demo-0.9.tar.gz'>old</a>")
    handler = functools.partial(Index, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", site
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize("kind", ["simple", "json"])
def test_index_pages(demo, server, only, kind):
    only((f"{server[0]}/empty", f"{server[0]}/missing", f"{server[0]}/{kind}"))
    seen = []
    assert read_tree(fetching.fetch(demo.release, progress=lambda *a: seen.append(a))) == ORIGINAL
    assert seen[-1] == (demo.release.archive.size, demo.release.archive.size)
    assert (demo.folder / "cache/archives/demo-1.0.tar.gz").read_bytes() == demo.archive.read_bytes()


def test_local_index_and_find_links(demo, server, only):
    only(((server[1] / "simple").as_uri(),))
    assert fetching.fetch_archive(demo.release.archive).read_bytes() == demo.archive.read_bytes()
    fetching.fetch_archive(demo.release.archive).unlink()
    only((), (str(server[1] / "nowhere"), str(server[1] / "files")))
    assert fetching.fetch_archive(demo.release.archive).read_bytes() == demo.archive.read_bytes()


def test_damaged_cache_entry_is_replaced(demo, server, only):
    only((f"{server[0]}/simple",))
    cached = fetching.fetch_archive(demo.release.archive)
    cached.write_bytes(b"damaged")
    assert fetching.fetch_archive(demo.release.archive).read_bytes() == demo.archive.read_bytes()


@pytest.mark.parametrize("served", [b"", b"something else", b"x" * 10**6])
def test_index_that_serves_another_file(demo, server, only, served):
    (server[1] / "files/demo-1.0.tar.gz").write_bytes(served)
    only((f"{server[0]}/simple",))
    with pytest.raises(ArchiveHashError):
        fetching.fetch(demo.release)
    assert list((demo.folder / "cache/archives").iterdir()) == []


def test_file_that_no_index_offers(demo, server, only):
    address = server[0].replace("http://", "http://user:secret@")
    only((f"{address}/empty", "http://127.0.0.1:9/simple"))
    with pytest.raises(DownloadError, match=r"demo==1\.0") as caught:
        fetching.fetch(demo.release)
    assert "does not offer it" in str(caught.value) and "127.0.0.1:9" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_no_index(demo, only):
    only((), ())
    with pytest.raises(DownloadError, match="PIP_NO_INDEX"):
        fetching.fetch(demo.release)


def test_settings_follow_pip(tmp_path):
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://one.example/simple\nextra-index-url = https://two.example/s\n"
        "    https://three.example/s\ncert = /ca.pem\n"
    )
    base = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PIP_CONFIG_FILE": str(config)}
    found = read_settings(base)
    assert found.indexes == ("https://one.example/simple", "https://two.example/s", "https://three.example/s")
    assert found.cert == "/ca.pem"
    assert read_settings({**base, "PIP_INDEX_URL": "https://env.example/s"}).indexes[0] == "https://env.example/s"
    assert read_settings({**base, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"}) == IndexSettings(
        (), ("/wheels",), "/ca.pem"
    )


def test_settings_without_pip(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert read_settings({}) == IndexSettings((DEFAULT_INDEX,))


# Unpacking -----------------------------------------------------------------------------------------------------------


def tar_entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (tar_entry("/etc/evil"), "absolute path"),
        (tar_entry("../evil"), "leaves the archive"),
        (tar_entry("top/../../evil"), "leaves the archive"),
        (tar_entry("other/../evil"), "leaves the archive"),  # harmless, but no honest archive has it
        (tar_entry("top\\..\\evil"), "leaves the archive"),
        (tar_entry("top/link", tarfile.SYMTYPE, "/etc"), "outside the archive"),
        (tar_entry("top/link", tarfile.SYMTYPE, "../../etc"), "outside the archive"),
        (tar_entry("top/in/link", tarfile.SYMTYPE, "../out"), "outside top/in"),
        (tar_entry("top/in/hard", tarfile.LNKTYPE, "../secret"), "outside the archive"),
        (tar_entry("top/in/hard", tarfile.LNKTYPE, "top/out"), "outside top/in"),
        (tar_entry("top/pipe", tarfile.FIFOTYPE), "neither a file"),
        (tar_entry("top/disk", tarfile.BLKTYPE), "neither a file"),
        (tar_entry("top/in/a"), "twice"),
    ],
)
def test_unsafe_tar_members_are_refused_before_anything_is_written(tmp_path, entry, problem):
    file = make_tar(tmp_path / "x.tar.gz", {"top/in/a": b"a", "top/out": b"o"}, [entry])
    into = tmp_path / "into"
    into.mkdir()
    with pytest.raises(UnsafeArchiveError, match=problem):
        archive.unpack(file, into, "top/in")
    assert list(into.iterdir()) == []


def test_file_below_a_link_is_refused(tmp_path):
    link = tar_entry("top/in/d", tarfile.SYMTYPE, "e")
    file = make_tar(tmp_path / "x.tar.gz", {"top/in/a": b"a"}, [link, tar_entry("top/in/d/f")])
    with pytest.raises(UnsafeArchiveError, match="below a symbolic link"):
        archive.unpack(file, tmp_path, "top/in")


@pytest.mark.parametrize("name", ["/evil", "../evil", "top/../../evil", "top\\evil"])
def test_unsafe_zip_members_are_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr("top/in/a", b"a")
        wheel.writestr(name, b"evil")
    (tmp_path / "into").mkdir()
    with pytest.raises(UnsafeArchiveError, match="leaves the archive"):
        archive.unpack(tmp_path / "x.whl", tmp_path / "into", "top/in")
    assert list((tmp_path / "into").iterdir()) == []


def test_zip_with_a_link_outside_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        info = zipfile.ZipInfo("top/in/link")
        info.external_attr = 0o120777 << 16
        wheel.writestr(info, "/etc")
    with pytest.raises(UnsafeArchiveError, match="outside the archive"):
        archive.unpack(tmp_path / "x.whl", tmp_path, "top/in")


def test_good_archives_keep_content_modes_and_inner_links(tmp_path):
    run, data = tarfile.TarInfo("top/in/run"), b"#!/bin/sh\n"
    run.mode, run.size = 0o755, len(data)
    file = tmp_path / "x.tar.gz"
    with tarfile.open(file, "w:gz") as tar:
        tar.addfile(run, io.BytesIO(data))
        tar.addfile(tar_entry("top/in/link", tarfile.SYMTYPE, "run"))
        tar.addfile(tar_entry("top/in/hard", tarfile.LNKTYPE, "top/in/run"))
    (tmp_path / "into").mkdir()
    archive.unpack(file, tmp_path / "into", "top/in")
    assert os.access(tmp_path / "into/run", os.X_OK)
    assert (tmp_path / "into/link").readlink() == Path("run")
    assert (tmp_path / "into/hard").read_bytes() == data


def test_archive_without_the_folder(tmp_path):
    with pytest.raises(UnsafeArchiveError, match="no such folder"):
        archive.unpack(make_tar(tmp_path / "x.tar.gz", {"a/b": b""}), tmp_path, "c")


def test_garbage_is_no_archive(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(b"garbage")
    with pytest.raises(UnsafeArchiveError, match="not a readable archive"):
        archive.unpack(tmp_path / "x.tar.gz", tmp_path, "c")


# Finding the tree ----------------------------------------------------------------------------------------------------


def test_source_may_be_the_tree_or_what_holds_it(demo):
    tree = demo.tree("checkout/vendor/lib")
    for source in (tree, tree.parent, tree.parent.parent):
        assert fetching.locate_tree(demo.release, source) == tree
    with pytest.raises(TreeNotFoundError, match=r"source=.*nowhere: not a source tree of demo"):
        fetching.locate_tree(demo.release, demo.folder / "nowhere")


def test_tree_must_be_fetched_first(demo):
    with pytest.raises(TreeNotFoundError, match=r"run `fetch demo`"):
        fetching.locate_tree(demo.release)


def test_release_is_recognised_by_its_files(demo):
    from dataclasses import replace

    other = replace(demo.release, id="0.9", files=(replace(demo.release.files[0], before="0" * 64, after="1" * 64),))
    manifest = Manifest("demo", "https://example.org", (other, demo.release))
    assert fetching.detect_release(manifest, demo.tree()).id == "1.0"
    (demo.tree("edited") / "src/api.cpp").write_bytes(b"edited")
    assert fetching.detect_release(manifest, demo.folder / "edited").id == "0.9"  # unknown: the default is reported on


def test_unknown_names():
    with pytest.raises(UnknownNameError, match=r"'flash'.*flash-attention-3"):
        load_manifest("flash")
    with pytest.raises(UnknownNameError, match="release: '1' is unknown"):
        load_manifest("flash-attention-3").release("1")
