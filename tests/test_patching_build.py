"""Driving upstream's build: switches, preconditions, log, progress, the failing command."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import pytest
from patching_fixtures import make_demo, write_tree

from etap_integration.patching import building, series
from etap_integration.patching.errors import BuildError, UnknownNameError, VerifyError

FAKE_SETUP = b"""
import os, sys, pathlib
assert open("../README.md").read()
pathlib.Path("build/product").write_text("")
pathlib.Path("demo.egg-info").write_text("")
print("[1/3] c++ -c a.cpp -o a.o")
print("[2/3] nvcc -c b.cu -o b.o")
if os.environ.get("DEMO_FAIL"):
    print("FAILED: [code=1] b.o")
    print("nvcc -c b.cu -o b.o")
    print("b.cu(3): error: demo went wrong")
    print("[3/3] c++ -c c.cpp -o c.o")
    print("ninja: build stopped")
    print("Traceback (most recent call last):")
    for i in range(100):
        print("  File torch", i)
    sys.exit(1)
dist = pathlib.Path(sys.argv[sys.argv.index("--dist-dir") + 1])
(dist / "demo-1.0.whl").write_text(os.environ["ETAP_CSRC"])
"""


@pytest.fixture
def patched(tmp_path, monkeypatch):
    """A patched made-up upstream that calls itself flash-attention-3 and has a fake setup.py."""
    demo = make_demo(tmp_path)
    root = demo.tree()
    write_tree(root, {"hopper/setup.py": FAKE_SETUP})
    series.apply(demo.release, root)
    monkeypatch.setenv("ETAP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(building, "preflight", lambda *_: None)
    (tmp_path / "csrc").mkdir()
    return replace(demo.release, upstream="flash-attention-3"), root, tmp_path / "csrc"


def test_build(patched):
    release, root, csrc = patched
    seen = []
    before = sorted(root.rglob("*"))
    result = building.build(release, root, csrc=csrc, progress=lambda *a: seen.append(a))
    assert result.wheel.read_text() == str(csrc)
    assert seen == [(1, 3, "a"), (2, 3, "b")]
    assert "nvcc -c b.cu" in result.log.read_text()
    assert sorted(root.rglob("*")) == before  # nothing is built inside the tree


def test_failing_build_shows_the_command_and_the_log(patched, monkeypatch):
    release, root, csrc = patched
    monkeypatch.setenv("DEMO_FAIL", "1")
    with pytest.raises(BuildError) as caught:
        building.build(release, root, csrc=csrc)
    assert caught.value.command == "nvcc -c b.cu -o b.o"
    assert caught.value.tail == ["b.cu(3): error: demo went wrong"]
    assert caught.value.log.is_file() and str(caught.value.log) in str(caught.value)


def test_unpatched_tree_is_not_built(patched):
    release, root, csrc = patched
    series.revert(release, root)
    with pytest.raises(VerifyError):
        building.build(release, root, csrc=csrc)


def test_only_flash_attention_is_built(tmp_path):
    demo = make_demo(tmp_path)
    with pytest.raises(BuildError, match="upstream=demo: has no build step"):
        building.build(demo.release, demo.tree())


def test_upstream_script_runs_in_the_farm(patched):
    """A second build has a fresh farm but the old products; products of the user's own builds stay out of it."""
    release, root, csrc = patched
    write_tree(root, {"hopper/build/mine": b"", "hopper/my.egg-info/mine": b""})
    (root / "README.md").write_text("theirs")
    hopper = building.build(release, root, csrc=csrc).log.parent / "src/hopper"
    assert (hopper.parent / "README.md").read_text() == "theirs"
    assert (hopper / "setup.py").is_symlink() and not (hopper / "my.egg-info").exists()
    assert [p.name for p in (hopper / "build").iterdir()] == ["product"]
    building.build(release, root, csrc=csrc)
    assert [p.name for p in (root / "hopper/build").iterdir()] == ["mine"]


def test_switches(tmp_path):
    base = {"FLASH_ATTENTION_DISABLE_HDIM64": "TRUE", "KEEP": "1"}
    made = building.build_environment("mla-decode", tmp_path, 3, base)
    off = {k.removeprefix("FLASH_ATTENTION_DISABLE_") for k, v in made.items() if "DISABLE" in k and v == "TRUE"}
    assert {"BACKWARD", "FP8", "HDIM128", "HDIM256", "SM80", "LOCAL"} <= off
    assert not off & {"HDIM64", "HDIMDIFF64", "SPLIT", "PAGEDKV", "PACKGQA", "VARLEN", "FP16"}  # MLA decode needs them
    assert made["ETAP_CSRC"] == str(tmp_path) and made["MAX_JOBS"] == "3" and made["KEEP"] == "1"
    assert made["FLASH_ATTENTION_FORCE_BUILD"] == "TRUE"
    assert not any(
        "DISABLE" in k and v == "TRUE" for k, v in building.build_environment("full", tmp_path, None, {}).items()
    )


def test_bad_arguments(tmp_path):
    with pytest.raises(UnknownNameError, match=r"kernels: 'all' is unknown; allowed: .*mla-decode"):
        building.build_environment("all", tmp_path, None, {})
    with pytest.raises(BuildError, match="jobs=0: must be at least 1"):
        building.build_environment("full", tmp_path, 0, {})


def test_preflight_lists_everything_that_is_missing(tmp_path):
    fake = tmp_path / "torch"
    (fake / "utils").mkdir(parents=True)
    (fake / "__init__.py").write_text("__version__ = '2.9'\nclass version:\n    cuda = None\n")
    (fake / "utils/__init__.py").write_text("")
    (fake / "utils/cpp_extension.py").write_text("CUDA_HOME = None\ndef is_ninja_available():\n    return False\n")
    with pytest.raises(BuildError) as caught:
        building.preflight(tmp_path, sys.executable, tmp_path, {"PATH": "", "PYTHONPATH": str(tmp_path)})
    for part in (
        "csrc/cutlass: empty",
        "etap/fa3_adapter.h",
        "fa3/*_sm90.cu",
        "git:",
        "built without CUDA",
        "CUDA toolkit",
        "ninja:",
    ):
        assert part in str(caught.value)


def test_toolkit_behind_a_script(tmp_path):
    """nvcc on PATH is a script that calls the toolkit's, whose headers torch would look for above the script."""
    toolkit, programs = tmp_path / "cuda-13.0", tmp_path / "local/bin"
    for folder in (toolkit / "bin", toolkit / "include", programs):
        folder.mkdir(parents=True)
    script = programs / "nvcc"
    script.write_text(f"#!/bin/sh\necho '#$ TOP={toolkit}/bin/..' >&2\n")
    script.chmod(0o755)
    base = {"PATH": str(programs)}
    assert building.toolkit_setting(base) == {}, "no CUDA header there either"
    (toolkit / "include/cuda_runtime_api.h").touch()
    assert building.toolkit_setting(base) == {"CUDA_HOME": str(toolkit)}
    assert building.toolkit_setting({**base, "CUDA_HOME": "/mine"}) == {}
    assert building.toolkit_setting({"PATH": ""}) == {}
    (tmp_path / "local/include").mkdir()
    (tmp_path / "local/include/cuda_runtime_api.h").touch()
    assert building.toolkit_setting(base) == {}, "torch's guess is right"


def test_preflight_with_an_interpreter_that_does_not_run(tmp_path):
    with pytest.raises(BuildError, match="python=/bin/false: does not run"):
        building.preflight(tmp_path, "/bin/false", tmp_path, dict(os.environ))


def test_command_that_cannot_start(tmp_path):
    with pytest.raises(BuildError, match="cannot start"):
        building.run_logged(["/nonexistent"], cwd=tmp_path, environment={}, log=tmp_path / "log")
