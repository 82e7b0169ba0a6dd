"""The real series on the real, pinned upstream trees. Archives are downloaded once into the user's cache.

Without a download (and without a cached archive) these tests fail; they never pass by doing nothing.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from patching_fixtures import read_tree, sha
from typer.testing import CliRunner

from etap_integration.patching import building, cli, fetching, locations, series
from etap_integration.patching.errors import TreeNotFoundError
from etap_integration.patching.manifest import load_manifest, upstream_names
from etap_integration.patching.series import TreeState

RELEASES = [(name, release.id) for name in upstream_names() for release in load_manifest(name).releases]
FA3 = load_manifest("flash-attention-3")


@pytest.fixture(scope="session")
def fa3_tree(tmp_path_factory):
    """The pinned FlashAttention-3 tree, unpacked from the checked archive."""
    archive = fetching.fetch_archive(FA3.release().archive)
    return fetching.fetch(FA3.release(), archive=archive, dest=tmp_path_factory.mktemp("fa3") / "tree")


def digests(root: Path) -> dict[str, str | None]:
    return {path: sha(content) for path, content in read_tree(root).items()}


def test_flash_attention_3_round_trip(fa3_tree):
    """fetch, check, apply, verify, revert: identical bytes, and nothing outside the manifest changes meanwhile."""
    release = FA3.release()
    pristine = digests(fa3_tree)
    assert len(pristine) > 1000
    assert series.check(release, fa3_tree).state is TreeState.PRISTINE
    series.apply(release, fa3_tree)
    series.verify(release, fa3_tree)
    patched = {p: d for p, d in digests(fa3_tree).items() if not p.startswith(".etap-patch/")}
    assert {p for p in patched if patched[p] != pristine.get(p)} == {f.path for f in release.files}
    assert patched.keys() == pristine.keys()
    series.revert(release, fa3_tree)
    assert digests(fa3_tree) == pristine


def test_flash_attention_3_series_fits_a_later_tree(fa3_tree, tmp_path):
    """Lines added around the anchors, as upstream's main branch has them: refused as such, applied with fuzz."""
    release = FA3.release()
    for file in release.files:
        target = tmp_path / file.path
        target.parent.mkdir(exist_ok=True)
        text = (fa3_tree / file.path).read_bytes()
        target.write_bytes(b"# new line\n" * 7 + text.replace(b"\n    params.page_size", b"\n\n    params.page_size"))
    assert series.check(release, tmp_path).state is TreeState.DIFFERENT
    assert series.check(release, tmp_path).problems
    before = digests(tmp_path)
    series.apply(release, tmp_path, fuzz=True)
    assert all(b"etap" in (tmp_path / f.path).read_bytes() for f in release.files)
    series.revert(release, tmp_path)
    assert digests(tmp_path) == before


def test_patched_setup_script_names_the_kernels(fa3_tree, tmp_path):
    """The two added statements do what they should, and a build without ETAP_CSRC stops."""
    release = FA3.release()
    for file in release.files:
        (tmp_path / file.path).parent.mkdir(exist_ok=True)
        (tmp_path / file.path).write_bytes((fa3_tree / file.path).read_bytes())
    series.apply(release, tmp_path)
    added = [line for line in (tmp_path / "hopper/setup.py").read_text().splitlines() if "etap_csrc" in line]
    assert [line.strip() for line in added][2] == "etap_csrc,"
    (tmp_path / "csrc/fa3").mkdir(parents=True)
    (tmp_path / "csrc/fa3/b_sm90.cu").touch()
    (tmp_path / "csrc/fa3/a_sm90.cu").touch()
    script = "import os\nfrom pathlib import Path\nsources = []\n" + "\n".join(line.strip() for line in added[:2])
    script += "\nprint(*[Path(s).name for s in sources])"
    run = subprocess.run([sys.executable, "-c", script], env={"ETAP_CSRC": str(tmp_path / "csrc")}, capture_output=True)
    assert run.stdout.split() == [b"a_sm90.cu", b"b_sm90.cu"]
    assert b"ETAP_CSRC" in subprocess.run([sys.executable, "-c", script], env={}, capture_output=True).stderr


def test_flash_attention_3_hunks_stay_small():
    assert sum(patch.changed_lines for patch in FA3.release().patches()) <= 60
    for patch in FA3.release().patches():
        for hunk in patch.hunks:
            assert hunk.lead <= 1 and hunk.trail <= 1, (patch.path, hunk.header)


@pytest.mark.parametrize(("upstream", "release_id"), RELEASES)
def test_every_patch_has_a_header(upstream, release_id):
    release = load_manifest(upstream).release(release_id)
    for name in release.patch_names:
        header = (release.series.parent / name).read_text().split("\n--- ")[0]
        for field in (r"^Description: \S", r"^ What: \S", r"^ Why: \S", r"^Forwarded: \S"):
            assert re.search(field, header, re.MULTILINE), (name, field)


@pytest.mark.parametrize(("upstream", "release_id"), RELEASES)
def test_every_listed_change_comes_from_the_series(upstream, release_id):
    release = load_manifest(upstream).release(release_id)
    changed = {patch.path for patch in release.patches()}
    assert changed == {file.path for file in release.files if file.before != file.after}


def test_importing_needs_no_torch():
    script = "import sys; sys.modules['torch'] = None; import etap_integration.patching.cli"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).resolve().parents[1])


# The command line ----------------------------------------------------------------------------------------------------


def run(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, [str(a) for a in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def test_command_line_round_trip(fa3_tree):
    where = ("flash-attention-3", "--source", str(fa3_tree))
    assert "pristine" in run("check", *where)
    assert "patched hopper/flash_api.cpp" in run("apply", *where)
    assert "already patched" in run("apply", *where)
    assert "patched" in run("verify", *where)
    assert "restored hopper/setup.py" in run("revert", *where)
    assert "nothing to restore" in run("revert", *where)
    assert "SHA-256" in run("verify", *where, code=1)


def test_command_line_errors(tmp_path):
    assert "upstream: 'flash' is unknown" in run("check", "flash", code=1)
    assert f"source={tmp_path}" in run("apply", "flash-attention-3", "--source", tmp_path, code=1)
    assert "no such file" in run("fetch", "flash-attention-3", "--dest", tmp_path, "--archive", "/nonexistent", code=1)


def test_command_line_list_and_help():
    for upstream, release_id in RELEASES:
        assert f"{upstream}  {release_id}" in run("list")
    folder = Path(__file__).resolve().parents[1]
    shown = subprocess.run(
        [sys.executable, "-m", "etap_integration.patching", "--help"],
        capture_output=True,
        text=True,
        cwd=folder,
        check=True,
    ).stdout
    for command in ("fetch", "check", "apply", "build", "verify", "revert", "list"):
        assert command in shown


def test_patches_directory_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("ETAP_PATCHES", str(tmp_path))
    with pytest.raises(TreeNotFoundError, match="ETAP_PATCHES"):
        locations.patches_root()


def test_refresh_records_what_the_series_gives(fa3_tree, monkeypatch, tmp_path):
    """A stale or missing hash in the manifest is put right; the tree is not written."""
    shutil.copytree(locations.patches_root(), tmp_path / "patches")
    monkeypatch.setenv("ETAP_PATCHES", str(tmp_path / "patches"))
    file = tmp_path / "patches/flash-attention-3/manifest.json"
    right = file.read_text()
    data = json.loads(right)
    data["releases"][0]["files"][1]["after"] = "0" * 64
    del data["releases"][0]["files"][2]
    file.write_text(json.dumps(data))
    release = data["releases"][0]["id"]
    run("refresh", "flash-attention-3", "--release", release, "--source", fa3_tree)
    assert file.read_text() == right
    assert series.check(FA3.release(), fa3_tree).state is TreeState.PRISTINE


STUB_COMPILER = r"""#!/bin/sh
# Stands for nvcc and the C++ compiler: notes what it is asked for and makes empty products.
case "$*" in -V) echo "Cuda compilation tools, release 13.0, V13.0.0"; exit 0;; esac
case "$*" in *-o*) ;; *) exec c++ "$@";; esac
echo "$*" >> "$STUB_CALLS"
while [ $# -gt 0 ]; do
    case "$1" in
        -o) out=$2; : > "$2";;
        --dependency-output | -MF) deps=$2;;
    esac
    shift
done
[ -z "$deps" ] || echo "$out:" > "$deps"
"""


def test_upstream_build_compiles_the_kernel_set_and_etap(fa3_tree, monkeypatch, tmp_path):
    """Upstream's real setup.py, driven by `build`, with stand-ins for the compilers and for a torch with CUDA."""
    pytest.importorskip("torch", reason="upstream's setup.py imports torch")
    stub, csrc, calls = tmp_path / "cuda/bin/nvcc", tmp_path / "csrc", tmp_path / "calls"
    for folder in (stub.parent, csrc / "etap", csrc / "fa3", tmp_path / "site"):
        folder.mkdir(parents=True)
    stub.write_text(STUB_COMPILER)
    stub.chmod(0o755)
    (csrc / "etap/fa3_adapter.h").touch()
    (csrc / "fa3/demo_sm90.cu").touch()
    (tmp_path / "site/sitecustomize.py").write_text(
        "import torch, torch.utils.cpp_extension as e\n"
        f"torch.version.cuda = '13.0'\ne.CUDA_HOME = {str(tmp_path / 'cuda')!r}\n"
    )
    for name, value in {
        "PYTHONPATH": tmp_path / "site",
        "CXX": stub,
        "PYTORCH_NVCC": stub,
        "STUB_CALLS": calls,
    }.items():
        monkeypatch.setenv(name, str(value))
    before = digests(fa3_tree)
    series.apply(FA3.release(), fa3_tree)
    try:
        result = building.build(
            FA3.release(), fa3_tree, kernels="mla-decode-bf16", csrc=csrc, output=tmp_path / "out", jobs=2
        )
    finally:
        series.revert(FA3.release(), fa3_tree)
    compiled = {
        Path(m[1]).name: line for line in calls.read_text().splitlines() if (m := re.search(r"-c (\S+\.\w+)", line))
    }
    heads = ("hdim64", "hdim64_256", "hdim64_512")
    variants = ("", "_paged", "_split", "_paged_split", "_packgqa")
    api = {"flash_api.cpp", "flash_api_stable.cpp"} & compiled.keys()
    assert len(api) == 1
    assert compiled.keys() - api == {
        "demo_sm90.cu",
        "flash_fwd_combine.cu",
        "flash_prepare_scheduler.cu",
        *(f"flash_fwd_{head}_bf16{variant}_sm90.cu" for head in heads for variant in variants),
    }
    assert "sm_90a" in compiled["demo_sm90.cu"] and "sm_80" not in compiled["demo_sm90.cu"]
    assert all(f"-I{csrc}" in compiled[name] for name in ("demo_sm90.cu", *api))
    assert any(name.startswith("flash_attn_3/_C") for name in zipfile.ZipFile(result.wheel).namelist())
    assert digests(fa3_tree) == before  # nothing is left in the tree
