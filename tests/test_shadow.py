"""Shadow mode: what the caller sees never changes, whatever the other implementation does. Stub engines, on the CPU."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dispatch_fixtures import (
    FA3,
    SGL,
    VLLM,
    Recorder,
    clean_modules,
    e4m3,
    engine,
    hopper,
    kvcache_call,
    sglang_call,
    stub,
    vllm_call,
)
from engine_fixtures import REFUSAL, idle_engine, ones, refusing_engine, sgl_engine, vllm_engine

import etap_integration
from etap_integration import numerics, shadowing
from etap_integration.dispatch import disable, reset_counts, routing, status


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with clean_modules():
        reset_counts()
        yield
        disable()
    assert routing.observer is None


@pytest.mark.parametrize("serve", ["upstream", "etap"])
def test_both_run_and_the_caller_gets_the_one_that_serves(serve: str) -> None:
    vllm, operator = vllm_engine(), Recorder(compute=True)
    one = vllm_call()
    plain = vllm.flash_attn_varlen_func(**one)
    with etap_integration.shadow(VLLM, fraction=1.0, serve=serve, operator=operator, machine=hopper) as session:
        results = [vllm.flash_attn_varlen_func(**one) for _ in range(4)]
        found = session.summary()
    exact = numerics.reference(
        one["q_v"], one["q"], one["v"][:, :, 0], one["k"][:, :, 0], one["block_table"], one["seqused_k"],
        cu_seqlens_q=one["cu_seqlens_q"], softmax_scale=one["softmax_scale"], causal=True,
    )[0].to(one["q"].dtype)  # fmt: skip
    for out, lse in results:
        assert torch.equal(out, plain[0] if serve == "upstream" else exact)
        assert torch.equal(lse, plain[1])
    assert (found.seen, found.compared, found.failed) == (4, 4, {})
    assert found.max_error is not None and 0 < found.max_error < 0.02  # NOISE, rounded to bfloat16
    assert found.worst_relative_rmse is not None and found.worst_relative_rmse > 0
    assert found.upstream_us is not None and found.etap_us is not None and found.not_finite == 0
    assert found.speedup is not None and found.speedup > 0 and found.late == 0
    assert len(operator.calls) == 4
    assert status().etap_calls == (4 if serve == "etap" else 0)
    assert "4 of 4 calls compared" in str(found)


@pytest.mark.parametrize("serve", ["upstream", "etap"])
def test_the_callers_output_buffer_is_written_by_the_server_alone(serve: str) -> None:
    vllm = vllm_engine()
    one = vllm_call()
    one["out"] = torch.empty_like(one["q_v"])
    plain = vllm.flash_attn_varlen_func(**one)[0].clone()
    with etap_integration.shadow(
        VLLM, fraction=1.0, serve=serve, operator=Recorder(compute=True), machine=hopper
    ) as session:
        for _ in range(2):  # either one first
            one["out"].fill_(-1)
            out, _ = vllm.flash_attn_varlen_func(**one)
            assert out is one["out"]
            assert torch.equal(out, plain) == (serve == "upstream")
    assert session.summary().compared == 2


def test_what_the_other_one_raises_is_swallowed_and_counted() -> None:
    sgl, one = idle_engine(), sglang_call()

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no kernel image")

    plain = sgl.flash_attn_with_kvcache(**one)
    with etap_integration.shadow(SGL, fraction=1.0, operator=broken, machine=hopper) as session:
        for _ in range(3):
            assert torch.equal(sgl.flash_attn_with_kvcache(**one), plain)
    found = session.summary()
    assert found.compared == 0 and found.failed == {"RuntimeError: no kernel image": 3}
    assert "FAILED: 3" in str(found)


def test_a_result_of_another_shape_or_kind_is_a_failure_not_a_crash() -> None:
    sgl, one = idle_engine(), sglang_call()
    for answer in ("no tensor", torch.zeros(3)):
        with etap_integration.shadow(
            SGL, fraction=1.0, operator=lambda *a, answer=answer, **k: answer, machine=hopper
        ) as session:
            assert isinstance(sgl.flash_attn_with_kvcache(**one), torch.Tensor)
        assert sum(session.summary().failed.values()) == 1


def test_what_the_server_raises_is_the_callers() -> None:
    fa3 = engine(FA3)
    fa3.flash_attn_with_kvcache.__globals__["calls"] = None  # append raises
    with (
        etap_integration.shadow(FA3, fraction=1.0, operator=Recorder(), machine=hopper),
        pytest.raises(AttributeError),
    ):
        fa3.flash_attn_with_kvcache(**kvcache_call())


def test_the_fraction_is_kept_and_global_random_states_are_not_touched() -> None:
    sgl, one = idle_engine(), sglang_call()
    state = torch.get_rng_state()
    with etap_integration.shadow(SGL, fraction=0.25, seed=1, operator=ones, machine=hopper) as session:
        for _ in range(200):
            sgl.flash_attn_with_kvcache(**one)
    assert torch.equal(torch.get_rng_state(), state)
    found = session.summary()
    assert found.seen == 200 and 25 <= found.compared <= 75 and found.max_error == 1
    with etap_integration.shadow(SGL, fraction=0, operator=ones, machine=hopper) as session:
        sgl.flash_attn_with_kvcache(**one)
    assert session.summary().compared == 0


def test_calls_etap_does_not_support_never_reach_the_session() -> None:
    sgl = sgl_engine()
    with etap_integration.shadow(SGL, fraction=1.0, operator=Recorder(), machine=hopper) as session:
        sgl.flash_attn_with_kvcache(**sglang_call(), window_size=(4, 4))
        assert session.summary().seen == 0
    assert status().fallbacks == {"window_size": 1}


def test_no_sampling_inside_a_graph_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    sgl, operator = sgl_engine(), Recorder(compute=True)
    monkeypatch.setattr(shadowing, "_capturing", lambda call: True)
    with etap_integration.shadow(SGL, fraction=1.0, operator=operator, machine=hopper) as session:
        sgl.flash_attn_with_kvcache(**sglang_call())
    assert session.summary().skipped == {"inside a CUDA graph capture": 1} and operator.calls == []


def test_rows_that_belong_to_no_request_do_not_count() -> None:
    a = torch.zeros(4, 2, 8)
    b = a.clone()
    b[3] = float("nan")  # the batch ends after 3 tokens
    b[0, 0, 0] = 0.5
    square, _, largest, not_finite, count, _ = shadowing._figures(
        (a, None), (b, None), torch.tensor([0, 1, 3])
    ).tolist()
    assert (square, largest, not_finite, count) == (0.25, 0.5, 0, 48)
    _, _, _, not_finite, count, _ = shadowing._figures((a, None), (b, None), None).tolist()
    assert (not_finite, count) == (16, 48)


def test_records_hold_shapes_and_no_contents(tmp_path: Path) -> None:
    sgl, one = sgl_engine(), sglang_call(heads=8, q_lens=(2, 1, 2))
    path = tmp_path / "calls.jsonl"
    with etap_integration.shadow(
        SGL, fraction=1.0, record=path, operator=Recorder(compute=True), machine=hopper
    ) as session:
        sgl.flash_attn_with_kvcache(**one)
        sgl.flash_attn_with_kvcache(**one)
        session.summary()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2
    assert {row["first"] for row in rows} == {"upstream", "etap"}
    shape = {
        "function": "sgl_kernel.flash_attn.flash_attn_with_kvcache", "served": "upstream", "batch": 3, "heads": 8,
        "q_len": 2, "q_tokens": 5, "ragged": True, "page_size": 1, "capacity": 64, "kv_lens": [7, 10, 13],
        "dtype": "bfloat16", "e4m3": False, "causal": True, "return_lse": False, "fused": True, "lse_max_error": None,
    }  # fmt: skip
    assert shape.items() <= rows[0].items()
    text = path.read_text()
    assert len(text) < 2000 and not any(f"{v:.4f}" in text for v in one["q"].float().flatten()[:50].tolist() if v)


def test_threads() -> None:
    sgl, one = idle_engine(), sglang_call()
    with etap_integration.shadow(SGL, fraction=1.0, operator=ones, machine=hopper) as session:
        threads = [
            threading.Thread(target=lambda: [sgl.flash_attn_with_kvcache(**one) for _ in range(5)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = session.summary()
    assert (found.seen, found.compared, found.failed) == (20, 20, {})


def test_nested_sessions() -> None:
    sgl, one = idle_engine(), sglang_call()
    options = {"fraction": 1.0, "operator": ones, "machine": hopper}
    with etap_integration.shadow(SGL, **options) as outer:
        with etap_integration.shadow(SGL, **options) as inner:
            sgl.flash_attn_with_kvcache(**one)
        sgl.flash_attn_with_kvcache(**one)
    assert (outer.summary().seen, inner.summary().seen) == (1, 1)
    assert isinstance(sgl.flash_attn_with_kvcache(**one), torch.Tensor)
    assert outer.summary().seen == 1


def test_settings_from_the_environment() -> None:
    assert shadowing.settings_from({}) is None and shadowing.settings_from({"ETAP_SHADOW": "0"}) is None
    assert shadowing.settings_from({"ETAP_SHADOW": "0.5", "ETAP_SHADOW_SERVE": "etap", "ETAP_SHADOW_RECORD": "f"}) == {
        "fraction": 0.5, "serve": "etap", "record": Path("f"),
    }  # fmt: skip
    with pytest.raises(ValueError, match="ETAP_SHADOW: 'x'"):
        shadowing.settings_from({"ETAP_SHADOW": "x"})
    with pytest.raises(ValueError, match=r"ETAP_SHADOW: '1\.5'"):
        shadowing.settings_from({"ETAP_SHADOW": "1.5"})
    with pytest.raises(ValueError, match="ETAP_SHADOW_SERVE: 'both'"):
        shadowing.settings_from({"ETAP_SHADOW": "1", "ETAP_SHADOW_SERVE": "both"})


def test_bad_arguments() -> None:
    stub(SGL, flash_attn_with_kvcache=engine(SGL).flash_attn_with_kvcache)
    with pytest.raises(ValueError, match=r"fraction: 2"), etap_integration.shadow(SGL, fraction=2):
        pass
    with pytest.raises(ValueError, match="serve: 'x'"), etap_integration.shadow(SGL, serve="x"):
        pass


def record(first: str, upstream_us: float, etap_us: float, late: bool = False) -> shadowing.Record:
    return shadowing.Record(
        "f", "upstream", first, 1, 16, 1, 1, False, 64, 64, (7,), "bfloat16", True, 0.1, False, True, upstream_us,
        etap_us, 0.0, 0.0, 1.0, 0, None, late,
    )  # fmt: skip


def test_the_order_of_the_runs_does_not_bias_the_speed() -> None:
    """Both equally fast, the second one twice as fast for finding the cache warm."""
    session = shadowing.Session(1.0)
    session.records.extend([record("upstream", 20, 10), record("etap", 10, 20)] * 3)
    found = session.summary()
    assert (found.upstream_us, found.etap_us) == (20, 20) and found.speedup == pytest.approx(1)


def test_calls_that_waited_for_the_host_are_left_out_of_the_times() -> None:
    session = shadowing.Session(1.0)
    session.records.extend([record("upstream", 20, 10), record("etap", 20, 10), record("etap", 900, 90, late=True)])
    found = session.summary()
    assert found.late == 1 and found.speedup == pytest.approx(2) and found.etap_us == 10
    session = shadowing.Session(1.0)
    session._compared = 2
    session.records.extend([record("upstream", 900, 90, late=True), record("etap", 900, 90, late=True)])
    assert "so the times above hold the host's" in str(session.summary())


def test_an_e4m3_cache_that_upstream_refuses() -> None:
    """Its error is the program's where it serves, and a comparison that failed where ETAP does."""
    fa3, operator, one = refusing_engine(), Recorder(compute=True), e4m3(kvcache_call())
    options: dict[str, Any] = {"fraction": 1.0, "operator": operator, "machine": hopper}
    with etap_integration.shadow(FA3, **options), pytest.raises(RuntimeError, match=REFUSAL):
        fa3.flash_attn_with_kvcache(**one)
    with etap_integration.shadow(FA3, serve="etap", **options) as session:
        assert fa3.flash_attn_with_kvcache(**one).shape == one["qv"].shape
    assert (session.summary().compared, session.summary().failed) == (0, {f"RuntimeError: {REFUSAL}": 1})
