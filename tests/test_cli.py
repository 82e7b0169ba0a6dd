"""The `etap` command: help, exit codes, --json of every subcommand, and what they find here without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dispatch_fixtures import SGL, SIGNATURES
from typer.main import get_command
from typer.testing import CliRunner

from etap_integration import costmodel
from etap_integration.cli import doctor, overview
from etap_integration.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    (name, inner) if hasattr(command, "commands") else (name,): nested
    for name, command in get_command(app).commands.items()  # type: ignore[attr-defined]
    for inner, nested in getattr(command, "commands", {name: command}).items()
}
NAMES = sorted(COMMANDS)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="not run: this is what happens without a GPU")


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "etap_integration", *arguments]
    env = {k: v for k, v in os.environ.items() if not k.startswith("ETAP_")} | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", NAMES, ids=" ".join)
def test_every_command_has_help_and_json(name: tuple[str, ...]) -> None:
    done = invoke(*name, "--help")
    assert done.exit_code == 0 and len(done.output.splitlines()) > 5
    command = COMMANDS[name]
    assert any("--json" in getattr(p, "opts", ()) for p in command.params) or command.hidden, name
    undocumented = [p.name for p in command.params if not getattr(p, "help", None) and p.name != "help"]
    assert not undocumented, undocumented


def test_what_the_issue_asks_for_is_there() -> None:
    wanted = {"doctor", "fetch", "check", "apply", "build", "verify", "revert", "ab", "bench", "model", "report", "run"}
    assert {(name,) for name in wanted} <= set(NAMES)


def test_no_arguments_and_version() -> None:
    assert "Usage" in invoke().output
    assert invoke("--version").output.strip().startswith("etap ")
    assert invoke("nonsense").exit_code == 2


def test_model_table_and_json() -> None:
    done = invoke("model", "--gpu", "h20", "--kv-len", "65536")
    assert done.exit_code == 0 and "H20: predicted" in done.output and "65,536" in done.output
    (one,) = json.loads(invoke("model", "--gpu", "h20", "--kv-len", "65536", "--json").stdout)
    expected = costmodel.compare(costmodel.Problem(16, 65536), costmodel.GPUS["h20"])
    assert one["winner"] == "etap" and one["speedup"] == expected.speedup
    assert one["estimates"]["fa3"]["total_us"] == expected.estimates["fa3"].total_us


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_model_draws_the_roofline(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"roofline.{suffix}"
    assert invoke("model", "--plot", str(path), "--json").exit_code == 0
    start = path.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if suffix == "png" else b"<?xml" in start


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--gpu", "h300"), 1, "there are h20"),
        (("--batch", "0"), 1, "batch: 0"),
        (("--kv-dtype", "int4"), 1, "kv_dtype: 'int4'"),
        (("--plot", "/nonexistent/x.png"), 1, "/nonexistent/x.png"),
        pytest.param(("--gpu", "this"), 3, "torch sees none", marks=no_gpu),
    ],
)
def test_model_refuses(arguments: tuple[str, ...], code: int, message: str) -> None:
    done = invoke("model", *arguments)
    assert done.exit_code == code and message in done.stderr
    said = json.loads(invoke("model", *arguments, "--json").stdout)
    assert message in said["error"] and said["exit_code"] == code


@no_gpu
def test_doctor_without_a_gpu() -> None:
    done = shell("doctor", "--json")
    found = json.loads(done.stdout)
    assert found["gpus"] == [] and found["library"]["loaded"] is False
    assert set(found["targets"]) == set(SIG_TARGETS)
    assert all(not answer["etap"] for answer in found["dispatch"].values())
    assert found["problems"] == [] and done.returncode == 0


SIG_TARGETS = {module for module, _ in SIGNATURES} | {"flashinfer.mla"}


def test_doctor_names_problems(tmp_path: Path) -> None:
    (tmp_path / "flash_attn_interface.py").write_text("import os; os._exit(9)")  # a broken extension may do this
    folder = tmp_path / "sgl_kernel"
    folder.mkdir()
    (folder / "__init__.py").touch()
    signature = SIGNATURES[SGL, "flash_attn_with_kvcache"]
    (folder / "flash_attn.py").write_text(f"print('noise')\ndef flash_attn_with_kvcache({signature}): ...\n")
    done = shell("doctor", "--json", PYTHONPATH=str(tmp_path), ETAP_MAX_ROW="3")
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert any("flash_attn_interface" in p and "exit status 9" in p for p in found["problems"])
    assert any("ETAP_MAX_ROW is set, but nothing reads it" in p for p in found["problems"])
    target = found["targets"][SGL]
    assert target["patchable"] and target["bindings"] == ["sgl_kernel.flash_attn.flash_attn_with_kvcache"]
    assert "sgl_kernel" in shell("doctor", PYTHONPATH=str(tmp_path)).stdout


def test_doctor_knows_every_variable_that_is_read() -> None:
    """Each ETAP_* name in the Python and C++ sources that looks like a variable is known, and the other way round."""
    import re

    read, sources = set(), ""
    for pattern in ("etap_integration/**/*.py", "tools/**/*.py", "csrc/**/*.h", "csrc/**/*.cuh", "csrc/**/*.cpp",
                    "csrc/**/*.cu", "setup.py", "tests/**/*.py"):  # fmt: skip
        for path in ROOT.glob(pattern):
            text = path.read_text()
            if path not in (Path(__file__), Path(doctor.__file__)):
                sources += text
            read |= set(re.findall(r"""environ(?:ment)?(?:\.get\(|\[)\s*f?["'](ETAP_[A-Z0-9_]+)""", text))
            read |= set(re.findall(r"""getenv\("(ETAP_[A-Z0-9_]+)""", text))
    assert read <= doctor.VARIABLES, read - doctor.VARIABLES
    unread = {name for name in doctor.VARIABLES if not re.search(rf"""["']{name}["']""", sources)}
    assert not unread, unread


def test_a_patched_extension_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "flash_attn_3"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.patched_build() == {"installed": False, "patched": False}
    (folder / "_C.abi3.so").write_bytes(b"\x7fELF...")
    assert doctor.patched_build() == {"installed": True, "patched": False}
    (folder / "_C.abi3.so").write_bytes(b"\x7fELF...etap_fa3_set_mode\0")
    assert doctor.patched_build() == {"installed": True, "patched": True}


@no_gpu
def test_the_main_command_does_real_work_without_a_gpu() -> None:
    done = shell("--offline")
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert text.count("ETAP, P in two 16-bit parts") >= 4  # the numerics models
    assert "36 × m64n16k16" in text and "8,704" in text  # the wgmma and padding counts
    assert "H20: predicted" in text and "H200: predicted" in text
    assert "patch check, flash-attention-3" in text and "compiled kernels" in text
    assert "no timing" in text


@no_gpu
def test_overview_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview.numerics, "survey", lambda: [])  # these two take long, and run in the test above
    monkeypatch.setattr(overview, "compiled_kernels", lambda: {"not_run": "left out"})
    found = json.loads(invoke("overview", "--offline", "--json").stdout)
    assert {"numerics", "instructions", "predicted", "patches", "compiled", "work"} <= set(found)


def test_patch_check_reaches_a_verdict() -> None:
    found = overview.check_patches(offline=False)
    assert found["flash-attention-3"]["problems"] == [] and found["flash-attention-3"]["state"] in (
        "pristine",
        "patched",
    )


def test_patch_commands_take_json(tmp_path: Path) -> None:
    upstreams = json.loads(invoke("list", "--json").stdout)
    assert {"upstream", "release", "requirement", "patches"} == set(upstreams[0])
    failed = invoke("check", "flash-attention-3", "--source", str(tmp_path), "--json")
    assert failed.exit_code == 1 and "error" in json.loads(failed.stdout)
    tree = json.loads(invoke("fetch", "flash-attention-3", "--dest", str(tmp_path / "tree"), "--json").stdout)["tree"]
    for command, key in (("check", "state"), ("apply", "changed"), ("verify", "state"), ("revert", "changed")):
        done = invoke(command, "flash-attention-3", "--source", tree, "--json")
        assert done.exit_code == 0 and key in json.loads(done.stdout), done.output
    unpatched = invoke("build", "flash-attention-3", "--source", tree, "--json")
    assert unpatched.exit_code == 1 and "not the patched tree" in json.loads(unpatched.stdout)["error"]


def test_importing_the_package_needs_torch_alone() -> None:
    blocked = ("typer", "rich", "click", "requests", "platformdirs", "packaging", "unidiff", "matplotlib", "numpy")
    code = f"""
import sys
for name in {blocked!r}: sys.modules[name] = None
import etap_integration
for name in etap_integration.__all__: getattr(etap_integration, name)
import etap_integration.costmodel, etap_integration.autostart, etap_integration.plugins
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_missing_package_is_named() -> None:
    code = "import sys; sys.modules['typer'] = None; from etap_integration.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3 and "typer" in done.stderr and "Traceback" not in done.stderr


@no_gpu
def test_bench_without_a_gpu_says_what_is_missing(tmp_path: Path) -> None:
    done = shell("bench", "--emulate", "h20", "--no-build", ETAP_BENCH_DIR=str(tmp_path))
    assert done.returncode == 3
    assert "published, real H20" in done.stdout and "An **emulation**, not an H20" in done.stdout
    assert "not built: libmb.so, libfi_d.so" in done.stderr and "measuring needs a Hopper GPU" in done.stderr
    assert invoke("bench", "--emulate", "h100").exit_code == 1
    assert invoke("bench", "--grid", "odd").exit_code == 1


def test_report_writes_between_markers(tmp_path: Path) -> None:
    document = tmp_path / "R.md"
    document.write_text((ROOT / "README.md").read_text())
    assert invoke("report", "--readme", str(document), "--no-plots").exit_code == 0
    again = invoke("report", "--readme", str(document), "--check", "--json")
    assert again.exit_code == 0 and json.loads(again.stdout)["changed"] is False
    text = document.read_text()
    document.write_text(text.replace("<!-- end of results -->", "more <!-- end of results -->"))
    assert invoke("report", "--readme", str(document), "--check").exit_code == 1
    document.write_text("nothing")
    assert "expected the markers" in invoke("report", "--readme", str(document)).stderr
