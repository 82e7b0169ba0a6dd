"""A/B on the CPU: stub engines that compute, an operator that computes or errs, and a timer that is told the times."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from dispatch_fixtures import FA3, SGL, VLLM, Recorder, clean_modules, engine, hopper, stub
from engine_fixtures import fa3_engine, sgl_engine, vllm_engine
from typer.testing import CliRunner

import etap_integration
from etap_integration import ab
from etap_integration.cli import comparing
from etap_integration.cli.app import app
from etap_integration.dispatch import disable, reset_counts, status

CASE = ab.Case((70, 5, 0, 33), heads=4, q_len=2, page_size=16)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with clean_modules():
        reset_counts()
        yield
        disable()


class Told:
    """A timer that calls each side once and reports the times it was told."""

    def __init__(self, upstream: list[float], etap: list[float]) -> None:
        self.times = {"upstream": upstream, "etap": etap}

    def __call__(self, device: torch.device, cache: str, span_ms: float) -> Told:
        return self

    def rounds(self, calls: Mapping[str, Any]) -> dict[str, list[list[float]]]:
        for call in calls.values():
            call()
        return {name: [[t, t, t] for t in self.times[name]] for name in calls}


STEADY = Told([20.0] * 10, [10.0] * 10)


@pytest.mark.parametrize(("name", "make"), [(SGL, sgl_engine), (VLLM, vllm_engine), (FA3, fa3_engine)])
@pytest.mark.parametrize("ragged", [False, True])
def test_right_results_are_timed(name: str, make: Any, ragged: bool) -> None:
    make()
    case = ab.Case(CASE.kv_lens, 4, 2, q_tokens=6 if ragged else 0, ragged=ragged, page_size=16)
    operator = Recorder(compute=True)
    with ab.arms(name, operator=operator, machine=hopper) as sides:
        outcome = ab.compare(case, sides, "cpu", timer=STEADY, caches=("cold", "warm"))
    assert outcome.wrong is None and outcome.left is None
    assert outcome.upstream is not None and 5e-4 < outcome.upstream.rmse < 2e-2  # the stub's known error
    assert outcome.etap is not None and outcome.etap.rmse < 2e-3 and outcome.etap.lse_max_error < 1e-5
    assert [(t.cache, t.ratio, t.verdict) for t in outcome.timings] == [("cold", 2, "faster"), ("warm", 2, "faster")]
    assert outcome.timings[0].floor == "modelled, H200" and operator.calls


def test_wrong_results_are_not_timed() -> None:
    sgl_engine()
    good = Recorder(compute=True)

    def off(*args: Any, **kwargs: Any) -> Any:
        out, lse = good(*args, **kwargs)
        return out + 0.05, lse

    def nan(*args: Any, **kwargs: Any) -> Any:
        out, lse = good(*args, **kwargs)
        out[0, 0, 0, 0] = float("nan")
        return out, lse

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no kernel image")

    for operator, message in ((off, "RMSE"), (nan, "not finite"), (broken, "no kernel image")):
        with ab.arms(SGL, operator=operator, machine=hopper) as sides:
            outcome = ab.compare(CASE, sides, "cpu", timer=STEADY)
        assert outcome.wrong is not None and message in outcome.wrong and outcome.timings == []


def test_a_wrong_lse_is_seen() -> None:
    exact = (torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1))
    theirs = ab.errors(exact, exact)
    ours = ab.errors((exact[0], exact[1] + 0.5), exact)
    assert "LSE" in (ab.judged(ours, theirs) or "") and ab.judged(theirs, theirs) is None
    unseen = ab.errors((exact[0], torch.full((1, 1, 1), -torch.inf)), (exact[0], torch.full((1, 1, 1), -torch.inf)))
    assert unseen.lse_max_error == 0


def test_cases_left_to_upstream_say_why() -> None:
    fa3_engine()
    with ab.arms(FA3, max_rows=4, operator=Recorder(compute=True), machine=hopper) as sides:
        outcome = ab.compare(CASE, sides, "cpu", timer=STEADY)
    assert outcome.left == "too many query rows" and outcome.timings == []
    assert status().etap_calls == 0


def test_nothing_stays_patched() -> None:
    module = fa3_engine()
    with ab.arms(FA3, operator=Recorder(), machine=hopper):
        assert hasattr(module.flash_attn_with_kvcache, "__etap_route__")
    assert not hasattr(module.flash_attn_with_kvcache, "__etap_route__")


@pytest.mark.parametrize(
    ("upstream", "etap", "expected"),
    [
        ([10.0] * 10, [8.0] * 10, "faster"),
        ([8.0] * 10, [10.0] * 10, "slower"),
        ([10.0] * 10, [9.95] * 10, "no difference"),  # within the margin
        ([10.0, 12.0] * 5, [11.0, 10.5] * 5, "no difference"),  # the spread says so
        ([12.0] * 9 + [1.0], [10.0] * 10, "faster"),  # one wild round does not matter
    ],
)
def test_verdicts(upstream: list[float], etap: list[float], expected: str) -> None:
    ratio, low, high = ab.ratio_interval([[t] for t in upstream], [[t] for t in etap])
    assert low <= ratio <= high and ab.verdict(low, high) == expected


def test_the_host_timer_interleaves() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    rounds = ab.HostTimer(rounds=4, samples=2).rounds(calls)
    assert order == list("aabb" + "bbaa") * 2
    assert all(len(r) == 4 and len(r[0]) == 2 and statistics.median(r[0]) > 0 for r in rounds.values())


@pytest.mark.parametrize(("name", "count"), [("small", 4), ("decode", 24), ("shapes", 18)])
def test_grids(name: str, count: int) -> None:
    cases = ab.grid(name)
    assert len(cases) == count == len(set(cases))
    with pytest.raises(ValueError, match="'x' is unknown; there are small"):
        ab.grid("x")


def test_what_shadow_mode_records_can_be_replayed(tmp_path: Path) -> None:
    from dispatch_fixtures import sglang_call

    sgl, path = sgl_engine(), tmp_path / "calls.jsonl"
    options: dict[str, Any] = {"operator": Recorder(compute=True), "machine": hopper}
    with etap_integration.shadow(SGL, fraction=1.0, record=path, **options) as session:
        for _ in range(3):
            sgl.flash_attn_with_kvcache(**sglang_call())
        sgl.flash_attn_with_kvcache(**sglang_call(heads=8, q_lens=(2, 1)))
        session.summary()
    cases = ab.read_workload(path)
    assert [case.count for case in cases] == [3, 1]
    assert cases[0].kv_lens == (7, 10, 13) and cases[0].page_size == 1 and cases[0].ragged
    assert cases[1].query_lengths() == [2, 1]
    with ab.arms(SGL, **options) as sides:
        outcomes = [ab.compare(case, sides, "cpu", timer=STEADY) for case in cases]
    assert all(o.wrong is None for o in outcomes)
    assert ab.summary(outcomes)["by"]["eager, cold cache"]["upstream_us"] == 80.0  # 3 + 1 calls of 20 µs
    rows = path.read_text()
    path.write_text(rows.replace('"e4m3": false', '"e4m3": true', 1))
    with pytest.raises(ValueError, match=r"calls\.jsonl:1: no recorded call: ValueError: an e4m3 cache"):
        ab.read_workload(path)
    path.write_text(rows + '{"batch": 3}\n')
    with pytest.raises(ValueError, match=r"calls\.jsonl:5: no recorded call"):
        ab.read_workload(path)


def test_padded_requests_have_no_tokens() -> None:
    assert ab.Case((5, 5, 0), q_len=2, q_tokens=3, ragged=True).query_lengths() == [2, 1, 0]
    assert ab.Case((5, 5), q_len=2).query_lengths() == [2, 2]


def test_a_patched_extension_is_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    fa3_engine()
    modes = [0]

    def switch(mode: int) -> int:
        modes.append(mode)
        return modes[-2]

    monkeypatch.setattr(ab, "_switch", lambda: switch)
    with ab.arms(FA3, "patched") as sides:
        outcome = ab.compare(CASE, sides, "cpu", timer=STEADY)
    assert outcome.wrong is None
    assert set(modes) == {0, 1, 2} and modes[-1] == 0  # always put back
    monkeypatch.undo()
    with pytest.raises(ab.AbError, match="no FlashAttention-3 extension"), ab.arms(FA3, "patched"):
        pass
    stub("flash_attn_3._C", __file__=torch.__file__.replace("__init__.py", "lib/libc10.so"))
    with pytest.raises(ab.AbError, match="not built with ETAP's patches"), ab.arms(FA3, "patched"):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["ab", *arguments], catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mode", "lazy"), "mode: 'lazy'"),
        (("--cache", "tepid"), "cache: 'tepid'"),
        (("--how", "magic"), "how: 'magic'"),
        (("--grid", "huge"), "grid: 'huge'"),
        (("--workload", "/nonexistent"), "/nonexistent"),
    ],
)
def test_bad_options(arguments: tuple[str, ...], message: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 1 and message in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="not run: this is what happens without a GPU")
def test_without_a_gpu() -> None:
    done = invoke("--json")
    assert done.exit_code == 3 and "no GPU" in json.loads(done.stdout)["error"]


@pytest.mark.parametrize("wrong", [False, True])
def test_the_command_prints_and_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: bool) -> None:
    """The whole command, its GPU a CPU and its timer told the times."""
    sgl_engine()
    real_arms, real_compare = ab.arms, ab.compare
    good = Recorder(compute=True)

    def operator(*args: Any, **kwargs: Any) -> Any:
        out, lse = good(*args, **kwargs)
        return out + wrong, lse

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Stub GPU")
    monkeypatch.setattr(comparing.comparison, "grid", lambda name: [CASE, ab.Case((9,), heads=64)])
    monkeypatch.setattr(
        comparing.comparison, "arms", lambda t, h, **o: real_arms(t, h, operator=operator, machine=hopper, **o)
    )
    monkeypatch.setattr(
        comparing.comparison, "compare",
        lambda case, sides, device, **o: real_compare(
            case, sides, "cpu", **o, timer=STEADY, floor=lambda c: (5.0, "told")
        ),
    )  # fmt: skip
    path = tmp_path / "out.jsonl"
    done = invoke("--target", SGL, "--mode", "eager", "--output", str(path))
    assert done.exit_code == (1 if wrong else 0)
    assert "left to upstream: too many query rows" in done.stdout and "Stub GPU" in done.stdout
    assert ("WRONG: RMSE" in done.stdout) == wrong
    if not wrong:
        assert "2.000–2.000" in done.stdout and "faster" in done.stdout
        assert "over all calls 2.000 × upstream's speed" in done.stdout
    assert len(path.read_text().splitlines()) == 2
    said = json.loads(invoke("--target", SGL, "--mode", "eager", "--json").stdout)
    assert said["target"] == SGL and len(said["outcomes"]) == 2 and said["summary"]["wrong"] == int(wrong)


def test_which_target() -> None:
    engine(SGL)
    assert comparing.choose_target(None) == SGL and comparing.choose_target(VLLM) == VLLM
    with pytest.raises(comparing.CommandError, match="'x' is unknown"):
        comparing.choose_target("x")


def test_no_target_installed() -> None:
    with pytest.raises(comparing.MissingError, match="etap bench"):
        comparing.choose_target(None)
