"""The benchmark of FlashInfer's wrapper: that it notices when the wrong module ran. No GPU, no FlashInfer."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from etap_integration.flashinfer import switch
from etap_integration.flashinfer.switch import ModuleStatus
from tools.bench import wrapped


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
