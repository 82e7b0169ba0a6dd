"""`etap run`, its hook, and the vLLM plugin: real processes, stub engines on disk, no GPU."""

from __future__ import annotations

import inspect
import json
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from dispatch_fixtures import FA3, SGL, SIGNATURES, VLLM, clean_modules, engine

from etap_integration import autostart, dispatch, plugins
from etap_integration.dispatch import disable, status

tomllib = pytest.importorskip("tomllib")  # Python 3.11
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with clean_modules():
        yield
        autostart.remove()
        disable()


def write_engine(folder: Path, name: str) -> None:
    """A package on disk with upstream's functions, each of which says who runs."""
    *parents, last = name.split(".")
    place = folder
    for parent in parents:
        place /= parent
        place.mkdir(exist_ok=True)
        (place / "__init__.py").touch()
    functions = {function: s for (module, function), s in SIGNATURES.items() if module == name}
    code = "".join(f"def {function}({s}):\n    return 'upstream'\n" for function, s in functions.items())
    (place / f"{last}.py").write_text(code)


def etap_run(
    *arguments: str, cwd: Path, options: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "etap_integration", "run", *options, "--", *arguments]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("ETAP_")}
    path = os.pathsep.join([str(cwd), str(ROOT)])
    return subprocess.run(
        command, cwd=cwd, env={**inherited, "PYTHONPATH": path, **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


WHO = "print(flash_attn_with_kvcache.__module__, hasattr(flash_attn_with_kvcache, '__etap_route__'))\n"


def test_run_enables_in_the_program_and_in_its_children(tmp_path: Path) -> None:
    write_engine(tmp_path, SGL)
    (tmp_path / "worker.py").write_text(f"from sgl_kernel.flash_attn import flash_attn_with_kvcache\n{WHO}")
    (tmp_path / "main.py").write_text(
        textwrap.dedent("""
        import multiprocessing, subprocess, sys
        from sgl_kernel.flash_attn import flash_attn_with_kvcache
        print(hasattr(flash_attn_with_kvcache, "__etap_route__"), flush=True)
        subprocess.run([sys.executable, "worker.py"], check=True)
        if __name__ == "__main__":
            process = multiprocessing.get_context("spawn").Process(target=print, args=("spawned",))
            process.start(); process.join(); sys.exit(process.exitcode + 7)
        """)
    )
    done = etap_run("python", "main.py", cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    # the program and its child; the spawned process imports main.py anew, child and all, before its own work
    assert done.stdout.splitlines() == ["True", "sgl_kernel.flash_attn True"] * 2 + ["spawned"], done.stderr
    alone = subprocess.run([sys.executable, "worker.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "False" in alone.stdout


def test_a_program_that_needs_none_of_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text("import sys; print('torch' in sys.modules, sys.argv[1:])")
    done = etap_run("plain.py", "--json", "-x", cwd=tmp_path)  # a script runs with this Python
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "False ['--json', '-x']", "")


def test_the_hidden_sitecustomize_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.site_specific = 5")
    done = etap_run("python", "-c", "print(site_specific, __import__('sitecustomize').__file__)", cwd=tmp_path)
    assert done.stdout.split() == ["5", str(tmp_path / "sitecustomize.py")], done.stderr


def test_a_target_that_cannot_be_patched_does_not_stop_the_program(tmp_path: Path) -> None:
    (tmp_path / f"{FA3}.py").write_text("def flash_attn_with_kvcache(q): return 'odd'\n")
    (tmp_path / "main.py").write_text("import flash_attn_interface as f; print(f.flash_attn_with_kvcache(1))")
    done = etap_run("python", "main.py", cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "odd"), done.stderr
    assert "not enabled in flash_attn_interface" in done.stderr
    strict = etap_run("python", "main.py", cwd=tmp_path, options=("--strict",))
    assert strict.returncode == 1 and "TargetError" in strict.stderr


def test_the_loader_steps_aside(tmp_path: Path) -> None:
    write_engine(tmp_path, FA3)
    program = (
        "import inspect, flash_attn_interface as f\n"
        "print(type(f.__loader__).__name__, f.__spec__.loader is f.__loader__)\ninspect.getsource(f)"
    )
    done = etap_run("python", "-c", program, cwd=tmp_path)
    assert done.stdout.split() == ["SourceFileLoader", "True"], done.stderr


def test_only_the_named_target(tmp_path: Path) -> None:
    for name in (FA3, SGL):
        write_engine(tmp_path, name)
    (tmp_path / "main.py").write_text(
        "import flash_attn_interface as a, sgl_kernel.flash_attn as b\n"
        "print([hasattr(m.flash_attn_with_kvcache, '__etap_route__') for m in (a, b)])"
    )
    done = etap_run("python", "main.py", cwd=tmp_path, options=("--target", SGL))
    assert done.stdout.strip() == "[False, True]", done.stderr


def test_dry_run_and_json(tmp_path: Path) -> None:
    options = ("--shadow", "0.1", "--record", "calls.jsonl", "--max-rows", "16", "--json")
    done = etap_run("python", "-V", cwd=tmp_path, options=options)
    said = json.loads(done.stdout)
    assert said["command"] == ["python", "-V"]
    assert said["environment"]["ETAP_ENABLE"] == "1" and said["environment"]["ETAP_SHADOW"] == "0.1"
    assert said["environment"]["ETAP_SHADOW_RECORD"] == str(tmp_path / "calls.jsonl")
    assert said["environment"]["ETAP_MAX_ROWS"] == "16"
    assert said["environment"]["PYTHONPATH"].split(os.pathsep)[0].endswith("_hook")


@pytest.mark.parametrize(
    ("options", "arguments", "code", "message"),
    [
        (("--shadow", "7"), ("python",), 1, "ETAP_SHADOW: '7.0'"),
        (("--serve", "etap"), ("python",), 1, "--shadow FRACTION"),
        (("--target", "flash"), ("python",), 1, "'flash' is no target"),
        (("--max-rows", "0"), ("python",), 1, "ETAP_MAX_ROWS: '0'"),
        ((), ("no-such-program-here",), 3, "is no program on PATH"),
        ((), (), 2, "Missing argument"),
    ],
)
def test_bad_command_lines(
    tmp_path: Path, options: tuple[str, ...], arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = etap_run(*arguments, cwd=tmp_path, options=options)
    assert done.returncode == code and message in done.stderr, done.stderr


def test_shadow_mode_by_the_environment(tmp_path: Path) -> None:
    """Both implementations fail on the CPU here; the program still gets upstream's answer, and the summary says why."""
    write_engine(tmp_path, SGL)
    (tmp_path / "main.py").write_text(
        textwrap.dedent("""
        import sgl_kernel.flash_attn as sgl
        from dispatch_fixtures import hopper, sglang_call
        route = sgl.flash_attn_with_kvcache.__etap_route__
        route.engine.normalise._machine = hopper
        print(sgl.flash_attn_with_kvcache(**sglang_call()))
        """)
    )
    done = etap_run(
        "python", "main.py", cwd=tmp_path, options=("--shadow", "1"),
        PYTHONPATH=os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "tests"))),
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "upstream"), done.stderr
    assert "shadow mode: 0 of 1 calls compared" in done.stderr and "FAILED: 1: RuntimeError" in done.stderr


def test_sglangs_backend_gets_the_stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As SGLang 0.5.23 does it: imported inside the backend's constructor, kept in the instance, called from there."""
    write_engine(tmp_path, SGL)
    monkeypatch.syspath_prepend(tmp_path)
    assert SGL in autostart.install({"ETAP_ENABLE": "1"})
    assert SGL not in sys.modules

    class FlashAttentionBackend:
        def __init__(self) -> None:
            from sgl_kernel.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

            self.flash_attn_varlen_func = flash_attn_varlen_func
            self.flash_attn_with_kvcache = flash_attn_with_kvcache

    backend = FlashAttentionBackend()
    assert routed(backend, "flash_attn_with_kvcache") and routed(backend, "flash_attn_varlen_func")


def test_the_names_are_the_dispatchs() -> None:
    assert set(autostart.TARGET_NAMES) == set(dispatch.TARGETS)


def test_what_the_environment_asks_for() -> None:
    assert autostart.requested({}) == autostart.requested({"ETAP_ENABLE": "0"}) == ()
    assert autostart.requested({"ETAP_ENABLE": "1"}) == autostart.TARGET_NAMES
    assert autostart.requested({"ETAP_SHADOW": "0.1"}) == autostart.TARGET_NAMES
    assert autostart.requested({"ETAP_ENABLE": f"{FA3}, {SGL}"}) == (FA3, SGL)
    with pytest.raises(ValueError, match="'x' is no target"):
        autostart.requested({"ETAP_ENABLE": "x"})
    assert autostart.install({}) == ()


# ---------------------------------------------------------------------------------------------------------------------
# vLLM
# ---------------------------------------------------------------------------------------------------------------------


def load_general_plugins() -> None:
    """As vLLM does in each process: load the group's entry points that VLLM_PLUGINS lists, or all, and call them."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    allowed = os.environ.get("VLLM_PLUGINS")
    for name, value in declared.items():
        if allowed is None or name in allowed.split(","):
            EntryPoint(name, value, "vllm.general_plugins").load()()


def routed(module: Any, name: str) -> bool:
    return hasattr(getattr(module, name), "__etap_route__")


@pytest.mark.parametrize("imported_first", [True, False])
def test_vllm_plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, imported_first: bool) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver,etap")
    if imported_first:
        vllm = engine(VLLM)
        load_general_plugins()
    else:
        write_engine(tmp_path, VLLM)
        monkeypatch.syspath_prepend(tmp_path)
        load_general_plugins()
        assert VLLM not in sys.modules
        import vllm.vllm_flash_attn as vllm
    load_general_plugins()  # vLLM may call it more than once
    # the backend's own import, after the fact, as in its attention module
    namespace: dict[str, Any] = {}
    exec("from vllm.vllm_flash_attn import flash_attn_varlen_func", namespace)
    assert hasattr(namespace["flash_attn_varlen_func"], "__etap_route__")
    assert routed(vllm, "flash_attn_varlen_func") and status().targets[VLLM].patched


def test_vllm_plugin_does_nothing_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = engine(VLLM)
    for name in ("VLLM_PLUGINS", "ETAP_ENABLE", "ETAP_SHADOW"):
        monkeypatch.delenv(name, raising=False)
    load_general_plugins()
    assert not routed(vllm, "flash_attn_varlen_func")
    monkeypatch.setenv("VLLM_PLUGINS", "etap")
    monkeypatch.setenv("ETAP_ENABLE", "0")
    load_general_plugins()
    assert not routed(vllm, "flash_attn_varlen_func")
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setenv("ETAP_ENABLE", "1")
    load_general_plugins()
    assert routed(vllm, "flash_attn_varlen_func")


def test_vllm_starts_in_spite_of_bad_settings(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ETAP_ENABLE", "vlm")
    with caplog.at_level(logging.WARNING):
        plugins.vllm()
    assert "'vlm' is no target" in caplog.text


def test_the_hook_imports_nothing_heavy() -> None:
    source = inspect.getsource(autostart)
    assert "import torch" not in source
    code = "import sys; import etap_integration.autostart; assert not {'torch', 'typer', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
