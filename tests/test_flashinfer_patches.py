"""FlashInfer's series on every pinned release, the overlay, and patching in place. No GPU, no compiler, no torch.

Archives are downloaded once into the user's cache; without a download these tests fail.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from flashinfer_fixtures import MANIFEST, make_package
from patching_fixtures import read_tree
from typer.testing import CliRunner

from etap_integration.flashinfer import activation, jit, overlay, switch
from etap_integration.flashinfer.overlay import UnsupportedFlashInferError
from etap_integration.patching import cli, locations, series
from etap_integration.patching.errors import TreeWriteError, UnknownNameError
from etap_integration.patching.manifest import Release
from etap_integration.patching.series import TreeState

RELEASES = [pytest.param(release, id=release.id) for release in MANIFEST.releases]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The user's cache, for overlays; archives stay where they are."""
    monkeypatch.setattr(locations, "cache_root", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A directory to install into, first on the path."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    for name in [n for n in sys.modules if n.split(".")[0] == "flashinfer"]:
        monkeypatch.delitem(sys.modules, name)
    return folder


# The series -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES)
def test_round_trip(release: Release, tmp_path) -> None:
    """check, apply, verify, revert: identical bytes, only the listed files change, and the hunks stay few and small."""
    root = make_package(release, tmp_path)
    pristine = read_tree(root)
    assert series.check(release, root).state is TreeState.PRISTINE
    series.apply(release, root)
    series.verify(release, root)
    patched = {path: content for path, content in read_tree(root).items() if not path.startswith(".etap-patch/")}
    assert {path for path in patched if patched[path] != pristine.get(path)} == {file.path for file in release.files}
    series.revert(release, root)
    assert read_tree(root) == pristine
    assert sum(patch.changed_lines for patch in release.patches()) <= 40
    for patch in release.patches():
        for hunk in patch.hunks:
            assert hunk.lead <= 1 and hunk.trail <= 1, (patch.path, hunk.header)


def test_releases_are_told_apart(tmp_path) -> None:
    """Each release is found by its files, patched or not, though some share a series."""
    for release in MANIFEST.releases:
        root = make_package(release, tmp_path / release.id)
        assert series.matches(overlay.supported_release(root), root)
        found = overlay.supported_release(root)
        series.apply(found, root)
        assert overlay.supported_release(root).id == found.id
        assert overlay.is_patched_in_place(root)


def test_command_line(tmp_path) -> None:
    """The same commands as for FlashAttention-3, on an installation."""
    release = MANIFEST.release()
    root = make_package(release, tmp_path)

    def run(*args: str) -> str:
        result = CliRunner().invoke(cli.app, [*args, "flashinfer", "--source", str(root)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert "pristine" in run("check")
    assert "patched data/csrc/batch_mla_sm90_run.cu" in run("apply")
    assert "patched" in run("verify")
    assert "restored jit/attention/modules.py" in run("revert")


# Names and sources ----------------------------------------------------------------------------------------------------

URI = (
    "batch_mla_attention_dtype_q_{q}_dtype_kv_{kv}_dtype_o_{o}_dtype_idx_i32_head_dim_ckv_{ckv}_head_dim_kpe_{kpe}_"
    "profiler_False_planabi2_sm90"
)


def uri(q="bf16", kv="bf16", o="bf16", ckv=512, kpe=64) -> str:
    return URI.format(q=q, kv=kv, o=o, ckv=ckv, kpe=kpe)


def test_patched_module_has_a_name_of_its_own() -> None:
    name = jit.module_name(uri(), "fa3")
    assert re.fullmatch(re.escape(uri()) + "_etap_[0-9a-f]{12}", name) and jit.is_patched_name(name)
    assert jit.module_name(uri(), "fa2") == uri() and not jit.is_patched_name(uri())


@pytest.mark.parametrize("changed", ["csrc/etap/producer.cuh", "csrc/ops/launch.cpp", "patches/flashinfer/extra.patch"])
def test_name_changes_with_the_sources(monkeypatch, tmp_path, changed: str) -> None:
    """A module of other sources is never taken for this one's."""
    for folder in ("csrc", "patches"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
        monkeypatch.setenv(f"ETAP_{folder.upper()}", str(tmp_path / folder))
    before = jit.sources_id()
    assert before == jit.sources_id()
    with (tmp_path / changed).open("a") as file:
        file.write("// changed\n")
    assert jit.sources_id() != before


@pytest.mark.parametrize(
    ("dtypes", "kernels"),
    [
        (uri(), "bf16"),
        (uri("f16", "f16", "f16"), "fp16"),
        (uri("bf16", "e4m3", "bf16"), "bf16_e4m3"),
        (uri("f16", "e4m3", "f16"), "fp16_e4m3"),
        (uri("bf16", "e5m2", "bf16"), None),
        (uri("bf16", "bf16", "f16"), None),
        (uri(ckv=256), None),
        (uri(kpe=0), None),
    ],
)
def test_sources_of_a_module(dtypes: str, kernels: str | None) -> None:
    """The kernels of its dtype, stand-ins for the others; every file is there, and no two objects share a name."""
    sources = jit.module_sources(jit.module_name(dtypes, "fa3"))
    names = {f"{file.parent.name}/{file.name}" for file in sources}
    expected = {"flashinfer/adapter.cu", "flashinfer/launch.cu", "flashinfer/workspace.cu"}
    for family in ("bf16", "fp16", "bf16_e4m3", "fp16_e4m3"):
        if family == kernels:
            tiles = (8, 16, 32) if "e4m3" in family else (8, 16, 32, 64)
            expected |= {f"instances/mla_decode_{family}_rows{tile}.cu" for tile in tiles}
        else:
            expected.add(f"flashinfer/without_{family}.cu")
    assert names == expected and all(file.is_file() for file in sources)
    assert len({file.name for file in sources}) == len(sources)


def test_every_launcher_is_in_the_module_once() -> None:
    """What launch.cpp names is defined, by a kernel or by its stand-in: an undefined one would fail at load time."""
    text = (locations.csrc_root() / "ops/launch.cpp").read_text()
    assert "#define ETAP_WITHOUT_GROUPS" in (locations.csrc_root() / "flashinfer/launch.cu").read_text()
    text = re.sub(r"#if !defined\(ETAP_WITHOUT_GROUPS\)\n.*?#endif\n", "", text, flags=re.S)
    named = set(re.findall(r"ETAP_DECLARE\((\w+), (\d+)\)", text))
    assert len(named) >= 6 and not any("groups" in family for family, _ in named)
    for name in (uri(), uri("f16", "f16", "f16"), uri("bf16", "e4m3", "bf16"), uri(ckv=256)):
        defined = []
        for file in jit.module_sources(jit.module_name(name, "fa3")):
            text = file.read_text()
            absent = re.findall(r"ETAP_ABSENT\((\w+)\)", text)
            defined += [(family, tile) for family in absent for tile in ("8", "16", "32")]
            defined += re.findall(r"ETAP_ABSENT_TILE\((\w+), (\d+)\)", text)
            for e4m3, family, tile in re.findall(r"ETAP_INSTANCE(_E4M3)?\((\w+), \w+, (\d+)\)", text):
                defined.append((family + e4m3.lower(), tile))
        assert len(defined) == len(set(defined)) and set(defined) == named, name


def test_sources_of_an_unreadable_name() -> None:
    with pytest.raises(UnknownNameError, match="FlashInfer module"):
        jit.module_sources("something_else_etap_0123456789ab")


class Spec:
    """As much of FlashInfer's specification of a module as is used."""

    def __init__(self, name: str, sources: list, **options: Any) -> None:
        self.name, self.sources, self.options = name, sources, options

    def load(self, path: Path | None = None) -> str:
        return f"module {self.name}"

    def get_library_path(self) -> Path:
        return Path("/library") / self.name


def test_specification(monkeypatch) -> None:
    """Sources, include folder and name are added; what is loaded is known; another module stays as it was."""
    monkeypatch.setattr(jit, "_specs", {})
    monkeypatch.setattr(jit, "_loaded", {})
    monkeypatch.setattr(jit, "_on_load", [])
    plain = jit.jit_spec(Spec, uri(), ["a.cu"], extra_cuda_cflags=["-x"])
    assert (plain.sources, plain.options) == (["a.cu"], {"extra_cuda_cflags": ["-x"]})
    name = jit.module_name(uri(), "fa3")
    spec = jit.jit_spec(Spec, name, ["a.cu"], extra_cuda_cflags=["-x"], post_load_adapter=None)
    assert spec.sources[0] == "a.cu" and len(spec.sources) == 11
    assert spec.options["extra_cuda_cflags"] == ["-x", f"-DETAP_MODULE={name}", "-DETAP_MAX_ROWS=32"]
    assert spec.options["extra_include_paths"] == [locations.csrc_root()]
    heard: list[Path] = []
    jit.on_load(heard.append)
    assert jit.loaded_libraries() == {}
    module = spec.load()
    assert module == f"module {name}" and heard == [Path("/library") / name]
    assert jit.loaded_libraries() == {name: Path("/library") / name}
    assert jit.is_patched_module(module) and not jit.is_patched_module(plain.load())


class Library:
    """A patched module's C interface, as ctypes gives it, with one of its settings."""

    rows: ClassVar[dict[str, int]] = {}

    def __init__(self, path: str) -> None:
        self.name = Path(path).name
        self.rows.setdefault(self.name, jit.default_max_rows(self.name))
        self.etap_flashinfer_reason = self.etap_flashinfer_count = SimpleNamespace()
        self.etap_flashinfer_module = lambda: self.name.encode()
        self.etap_flashinfer_module.restype = None

    def etap_flashinfer_set_max_rows(self, rows: int) -> None:
        self.rows[self.name] = rows


def test_row_limits_of_modules(monkeypatch) -> None:
    """A module for an e4m3 cache takes 64 rows by default, others 32, until told else."""
    for name, empty in (("_specs", {}), ("_loaded", {}), ("_on_load", [])):
        monkeypatch.setattr(jit, name, empty)
    monkeypatch.setattr(switch, "_wanted", {})
    monkeypatch.setattr(Library, "rows", {})
    monkeypatch.setattr("ctypes.CDLL", Library)
    plain, e4m3 = (jit.module_name(uri(kv=kv), "fa3") for kv in ("bf16", "e4m3"))
    spec = jit.jit_spec(Spec, e4m3, [])
    assert "-DETAP_MAX_ROWS=64" in spec.options["extra_cuda_cflags"]
    spec.load()
    switch.lower_max_rows(48)
    jit.jit_spec(Spec, plain, []).load()
    assert Library.rows == {e4m3: 48, plain: 32}
    switch.lower_max_rows(100)
    assert Library.rows == {e4m3: 64, plain: 32}
    switch.set_max_rows(40)
    jit.jit_spec(Spec, e4m3, []).load()
    assert Library.rows == {e4m3: 40, plain: 40}
    with pytest.raises(ValueError, match="rows: -1"):
        switch.lower_max_rows(-1)


def test_generator_hook_needs_no_torch() -> None:
    """FlashInfer patched in place imports it at every plan of a new dtype."""
    script = "import sys; sys.modules['torch'] = None; from etap_integration.flashinfer import jit; jit.sources_id()"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


# The overlay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", RELEASES)
def test_overlay_leaves_the_package_alone(release: Release, site: Path, request) -> None:
    root = make_package(release, site)
    request.getfixturevalue("cache")
    pristine = read_tree(root)
    assert overlay.installed_root() == root.resolve()
    made = overlay.make_overlay(release, root)
    assert read_tree(root) == pristine
    series.verify(release, made)
    for file in release.files:
        assert (made / file.path).read_bytes() != pristine[file.path]
    assert (made / "data/csrc/batch_mla_config.jinja").read_bytes() == pristine["data/csrc/batch_mla_config.jinja"]
    stamp = (made / "data/csrc").stat().st_ino
    assert overlay.make_overlay(release, root) == made and (made / "data/csrc").stat().st_ino == stamp
    assert overlay.remove_overlays() == [made] and not made.exists()


@pytest.fixture
def package(site: Path, request) -> Path:
    """The default release, installed."""
    root = make_package(MANIFEST.release(), site)
    request.getfixturevalue("cache")
    return root


def test_damaged_overlay_is_made_anew(package: Path) -> None:
    release = MANIFEST.release()
    made = overlay.make_overlay(release, package)
    (made / "data/csrc/batch_mla_sm90_run.cu").write_text("edited")
    assert overlay.make_overlay(release, package) == made
    series.verify(release, made)
    (made / "data/csrc/dangling.cu").symlink_to(package / "gone.cu")
    overlay.make_overlay(release, package)
    assert not (made / "data/csrc/dangling.cu").is_symlink()


@pytest.mark.parametrize("step", ["copyfile", "mkdtemp", "replace"])
def test_full_disk_leaves_nothing_half_made(package: Path, cache: Path, monkeypatch, step: str) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    module = {"copyfile": overlay.shutil, "mkdtemp": overlay.tempfile, "replace": overlay.os}[step]
    with monkeypatch.context() as patch:
        patch.setattr(module, step, full)
        with pytest.raises(TreeWriteError, match="overlay"):
            overlay.make_overlay(MANIFEST.release(), package)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert not list((cache / "overlays").iterdir())
    series.verify(MANIFEST.release(), overlay.make_overlay(MANIFEST.release(), package))


def test_unwritable_cache(package: Path, cache: Path) -> None:
    cache.write_text("a file, not a directory")
    with pytest.raises(TreeWriteError, match="could not be made"):
        overlay.make_overlay(MANIFEST.release(), package)


def test_each_installation_has_its_own_overlay(package: Path, tmp_path) -> None:
    release = MANIFEST.release()
    other = make_package(release, tmp_path / "other")
    assert overlay.overlay_path(release, package) != overlay.overlay_path(release, other)


def test_missing_flashinfer_says_what_is_supported(monkeypatch) -> None:
    monkeypatch.setattr(overlay.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedFlashInferError, match="not installed; supported: flashinfer-python 0"):
        activation.activate()


def test_other_release_says_what_is_supported(package: Path) -> None:
    """Newer than the patches, or edited: refused, and nothing is written."""
    (package / "_build_meta.py").write_text('__version__ = "9.9.9"\n')
    run = package / "data/csrc/batch_mla_sm90_run.cu"
    run.write_text(run.read_text().replace("plan_info", "plan_infos"))
    message = r"flashinfer 9\.9\.9 .* no patches for it; supported: .*0\.6\.14"
    with pytest.raises(UnsupportedFlashInferError, match=message):
        activation.activate()
    (package / "_build_meta.py").write_text(f'__version__ = "{MANIFEST.release().id}"\n')
    with pytest.raises(UnsupportedFlashInferError, match="its files were edited"):
        activation.patch_in_place()


# In place -------------------------------------------------------------------------------------------------------------


def test_in_place_and_back(package: Path, cache: Path) -> None:
    pristine = read_tree(package)
    root, outcome = activation.patch_in_place()
    assert root == package.resolve() and len(outcome.changed) == 3
    assert activation.is_active()
    assert activation.activate() == root and not cache.exists()  # no overlay of a patched package
    assert activation.deactivate() == []
    assert "etap.module_name(uri, backend)" in (package / "jit/attention/modules.py").read_text()
    activation.revert_in_place()
    assert read_tree(package) == pristine and not activation.is_active()
