"""The benchmark of FlashInfer's wrapper: that it notices when the wrong module ran. No GPU, no FlashInfer."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import pytest

pytest.importorskip("torch")

from etap_integration.flashinfer import switch
from etap_integration.flashinfer.switch import ModuleStatus
from tools.bench import rivals, wrapped
from tools.bench.problem import Inputs, KvPool, Problem

WGMMA = '"wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "\n"{%0};\\n"\n'


@pytest.mark.parametrize(
    ("patched", "counted", "message"),
    [
        (True, True, None),
        (False, False, None),
        (True, False, "the patched module did not run"),
        (False, True, "a patched module ran in the place of the unpatched one"),
    ],
)
def test_wrong_module_is_noticed(monkeypatch, patched: bool, counted: bool, message: str | None) -> None:
    calls = {"taken": 3}
    monkeypatch.setattr(switch, "status", lambda: {"module": ModuleStatus("auto", dict(calls))})
    provider = object.__new__(wrapped.FlashInferWrapper)  # without its device buffers
    provider._patched = patched

    def call() -> None:
        calls["taken"] += counted

    if message is None:
        provider._prove(call)
    else:
        with pytest.raises(RuntimeError, match=message):
            provider._prove(call)


@pytest.mark.parametrize("page_size", [1, 64])
def test_a_module_that_is_not_throttled_is_noticed(page_size: int) -> None:
    problem = Problem(2, 100, heads=3, q_len=2, page_size=page_size)
    inputs = Inputs(problem, KvPool(problem.cache_tokens, "bf16", "cpu"))
    _, lse = inputs.reference()
    with pytest.raises(RuntimeError, match="not throttled"):
        wrapped._prove_throttled(lse.float(), inputs)
    wrapped._prove_throttled(lse.float() * 1.5, inputs)


def test_throttled_modules_have_a_folder_of_their_own(tmp_path, monkeypatch) -> None:
    for name in ("FLASHINFER_WORKSPACE_BASE", "FLASHINFER_EXTRA_CUDAFLAGS"):
        monkeypatch.setenv(name, "as it was")
    monkeypatch.setenv("ETAP_BENCH_DIR", str(tmp_path / "bench"))
    arch = tmp_path / "data/cutlass/include/cute/arch"
    arch.mkdir(parents=True)
    (arch / "mma_sm90_gmma.hpp").write_text(WGMMA)
    monkeypatch.delitem(sys.modules, "flashinfer", raising=False)
    for _ in range(2):  # the second time nothing is left to do
        rivals.throttle_flashinfer_jit(tmp_path / "data")
        assert os.environ["FLASHINFER_WORKSPACE_BASE"] == str(tmp_path / "bench/flashinfer-h20")
        flags = os.environ["FLASHINFER_EXTRA_CUDAFLAGS"]
        assert flags.startswith("as it was -I") and flags.endswith("-include planned_sms.h -DPLANNED_SMS=78")
        monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", "another")
    with pytest.raises(RuntimeError, match="imported already"):
        rivals.throttle_flashinfer_jit(tmp_path / "data")
