"""The packages of serving engines themselves, where they are installed; nothing of their GPU stack is needed.

    pip install --no-deps vllm sglang

vLLM's plugin loader and its attention module run, the latter with empty modules in place of its compiled ones; both
engines' calls are read from their source.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

from dispatch_fixtures import vllm_call

from etap_integration.dispatch import calls, decision

ROOT = Path(__file__).resolve().parents[1]


def package(name: str) -> Path:
    """Where an engine's package lies, found without importing it."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"not run: {name} is not installed (pip install --no-deps {name})")
    return Path(next(iter(found.submodule_search_locations)))


def python(code: str, **environment: str) -> str:
    """What a program prints that has the tests' helpers and the engines in its path."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def keywords_of_calls(source: Path, function: str, marker: str) -> Iterator[set[str]]:
    """The keywords of each call of a function that names `marker` among them."""
    for node in ast.walk(ast.parse(source.read_text())):
        called = getattr(node, "func", None)
        if getattr(called, "id", getattr(called, "attr", None)) == function:
            names = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
            if marker in names:
                yield names


@pytest.mark.parametrize("listed", ["etap", ""])
def test_vllm_loads_the_plugin(listed: str) -> None:
    """By the name of its entry point, and only where it is asked for."""
    package("vllm")
    code = (
        "import sys, vllm.plugins\nvllm.plugins.load_general_plugins()\n"
        "print(any(type(f).__module__ == 'etap_integration.autostart' for f in sys.meta_path))"
    )
    assert python(code, VLLM_PLUGINS=listed).strip() == str(listed == "etap")


IN_VLLM = """
import inspect, sys
from types import ModuleType
for name in ("_vllm_fa2_C", "_vllm_fa3_C"):
    sys.modules[f"vllm.vllm_flash_attn.{name}"] = ModuleType(name)
from dispatch_fixtures import VLLM, Recorder, hopper, vllm_call
from etap_integration.dispatch import patched
import vllm.vllm_flash_attn as installed
operator, upstream = Recorder(), id(installed.flash_attn_varlen_func)  # a variable that holds it would be routed too
parameters = inspect.signature(installed.flash_attn_varlen_func).parameters.values()
neutral = {p.name: p.default for p in parameters if p.default is not p.empty}
with patched(VLLM, operator=operator, machine=hopper, strict=True):
    assert id(installed.flash_attn_varlen_func) != upstream
    for given in (vllm_call(), neutral | vllm_call()):
        assert installed.flash_attn_varlen_func(**given) == ("out", "lse")
assert id(installed.flash_attn_varlen_func) == upstream
print(len(operator.calls))
"""


def test_vllm_function_is_routed() -> None:
    """The function as it is installed: a call as vLLM makes it, and one that names every parameter there is."""
    package("vllm")
    assert python(IN_VLLM).strip() == "2"


def test_vllm_call_is_the_one_that_is_tested() -> None:
    source = package("vllm") / "v1/attention/backends/mla/flashattn_mla.py"
    assert [*keywords_of_calls(source, "flash_attn_varlen_func", "q_v")] == [set(vllm_call())]


def test_sglang_calls_name_nothing_unknown() -> None:
    """Those of its MLA decode, and of the function between them and sgl_kernel."""
    root = package("sglang")
    backend = root / "srt/layers/attention/flashattention_backend.py"
    between = root / "kernels/ops/attention/flash_attention.py"
    known = {*calls.KVCACHE.roles.values(), *decision.NEUTRAL, *decision.ACCEPTED}
    found = [*keywords_of_calls(backend, "flash_attn_with_kvcache", "qv")]
    assert found and all({"qv", "page_table"} <= names <= known for names in found)
    found = [*keywords_of_calls(between, "fa3_flash_attn_with_kvcache", "qv")]
    assert found and all(names <= known for names in found)
