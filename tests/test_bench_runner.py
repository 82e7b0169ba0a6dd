"""Measuring a cell, with implementations and a clock of the test's own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from etap_integration.timing import Sample
from tools.bench import providers, records, runner
from tools.bench.grid import WARM_CALLS, WARM_GRAPH, Cell
from tools.bench.problem import Inputs, KvPool, Problem
from tools.bench.providers import Errors, Provider, Target, disagreement
from tools.bench.records import Stamp
from tools.bench.runner import Check, Settings

STAMP = Stamp(run="r", gpu="g", driver="d", torch="t", commit=None, sources="s", command="c")
PROBLEM = Problem(2, 100, heads=8, q_len=2)


class Exact(Provider):
    """Gives the reference, off by a constant."""

    upstream = "package==1"

    def __init__(self, name, offset=0.0):
        self.name, self.offset = name, offset

    def unsupported(self, problem):
        return "bf16 only" if problem.kv_dtype != "bf16" else None

    def prepare(self, inputs):
        out, lse = inputs.reference()
        return lambda: (out + self.offset, lse)


class Nothing(Provider):
    """Computes nothing, like the floor."""

    name = "floor"

    def prepare(self, inputs):
        return lambda: None


class Clock:
    """Stands in for `Timer`: every call takes 10 µs."""

    def interleaved(self, calls):
        return {name: Sample.of([9.0, 10.0, 11.0]) for name in calls}

    def with_warm_cache(self):
        return WarmClock()


class WarmClock:
    """Runs each call once: 5 µs of it and 0.5 µs for each that is counted meanwhile."""

    def interleaved(self, calls):
        taken = {}
        for name, call in calls.items():
            before = len(counted)
            call()
            taken[name] = Sample.of([5.0 + 0.5 * (len(counted) - before)])
        return taken


counted: list[str] = []


def test_a_warm_cell_times_calls_back_to_back_and_gives_one(monkeypatch):
    monkeypatch.setattr(runner, "captured", lambda call, calls: lambda: [call() for _ in range(calls)])
    run = _cell_run(PROBLEM, Nothing())
    run.cell = Cell(PROBLEM, WARM_GRAPH)
    run.calls = {"floor": lambda: counted.append("floor")}
    (sample,) = run.times(Clock(), print).values()
    assert len(counted) == WARM_CALLS and sample.median_us == (5.0 + 0.5 * WARM_CALLS) / WARM_CALLS


def _cell_run(problem, *implementations):
    inputs = Inputs(problem, KvPool(problem.cache_tokens, problem.kv_dtype, "cpu"))
    return runner._CellRun(Cell(problem), inputs, list(implementations))


def test_a_cell_becomes_one_row_for_each_implementation():
    run = _cell_run(PROBLEM, Nothing(), Exact("fa3"), Exact("etap", 0.5))
    rows = run.rows(Clock(), Check.REFERENCE, None, STAMP, print)
    assert [row.impl for row in rows] == ["floor", "fa3", "etap"]
    floor, fa3, etap = rows
    assert (floor.rmse, floor.upstream) == (None, None)
    assert (fa3.rmse, fa3.max_error, fa3.lse_max_error, fa3.upstream) == (0.0, 0.0, 0.0, "package==1")
    assert etap.rmse == pytest.approx(0.5)
    assert etap.max_error == pytest.approx(0.5)
    assert etap.lse_rmse == 0.0
    assert (etap.batch, etap.kv_len, etap.heads, etap.q_len, etap.page_size) == (2, 100, 8, 2, 64)
    assert (etap.median_us, etap.p20_us, etap.p80_us) == (10.0, 9.4, 10.6)
    assert (etap.run, etap.sources, etap.emulated, etap.mode) == ("r", "s", None, "eager")


def test_a_host_that_falls_behind_is_reported():
    class LateClock:
        def interleaved(self, calls):
            return {name: Sample.of([10.0], [12.0]) for name in calls}

    lines = []
    _cell_run(PROBLEM, Exact("etap")).rows(LateClock(), Check.NONE, None, STAMP, lines.append)
    assert len(lines) == 1
    assert "50% of the samples of etap" in lines[0]


def test_unsupported_problems_are_left_out():
    run = _cell_run(Problem(2, 100, kv_dtype="fp16"), Nothing(), Exact("fa3"))
    assert list(run.calls) == ["floor"]


def test_outputs_that_disagree_are_not_timed():
    agreeing = _cell_run(PROBLEM, Nothing(), Exact("fa3"), Exact("etap", 1e-4))
    assert len(agreeing.rows(Clock(), Check.AGREEMENT, None, STAMP, print)) == 3
    disagreeing = _cell_run(PROBLEM, Nothing(), Exact("fa3"), Exact("etap", 0.5))
    with pytest.raises(ArithmeticError, match="etap and fa3"):
        disagreeing.rows(Clock(), Check.AGREEMENT, None, STAMP, print)
    nan = _cell_run(PROBLEM, Exact("fa3"), Exact("etap", float("nan")))
    with pytest.raises(ArithmeticError, match="etap and fa3"):
        nan.rows(Clock(), Check.AGREEMENT, None, STAMP, print)
    assert len(disagreeing.rows(Clock(), Check.NONE, "h20", STAMP, print)) == 3


def test_errors_refuse_what_is_not_finite_or_misshapen():
    out, lse = torch.zeros(1, 1, 8, 512), torch.zeros(1, 8, 1)
    assert Errors.between((out, lse), (out, lse)) == Errors(0, 0, 0, 0)
    with pytest.raises(ArithmeticError, match="output"):
        Errors.between((out + torch.nan, lse), (out, lse))
    with pytest.raises(ArithmeticError, match="LSE"):
        Errors.between((out, lse - torch.inf), (out, lse))
    with pytest.raises(ValueError, match="LSE"):
        Errors.between((out, lse.transpose(1, 2)), (out, lse))


def test_disagreement_is_relative():
    one = torch.full((1, 1, 8, 512), 2.0), torch.zeros(1, 8, 1)
    assert disagreement((one[0] * 1.5, one[1]), one) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("verify", "kv_len", "emulated", "check"),
    [
        ("auto", 4096, None, Check.REFERENCE),
        ("auto", 8192, None, Check.AGREEMENT),
        ("all", 8192, None, Check.REFERENCE),
        ("none", 512, None, Check.NONE),
        ("all", 512, "h20", Check.NONE),
    ],
)
def test_what_is_checked(tmp_path, verify, kv_len, emulated, check):
    settings = Settings(("floor",), tmp_path, tmp_path, verify=verify)
    assert settings.check(Cell(Problem(1, kv_len)), emulated) is check


@pytest.mark.parametrize("impl", ["floor", "fa3", "etap"])
def test_a_missing_library_is_named(tmp_path, impl):
    settings = Settings((impl,), tmp_path / "libetap_mla.so", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"libmb\.so|fa3\.so|libetap_mla\.so"):
        settings.providers(Target(None, 132))


def test_the_emulated_h20_has_78_sms():
    assert Target(None, 132).sms == 132
    assert Target("h20", 132).sms == 78


def test_our_kernel_is_called_as_its_schema_says(monkeypatch):
    """The operator's arguments, in order, against the schema that the package declares."""
    from etap_integration._library import SCHEMA

    parameters = torch._C.parse_schema(f"etap::{SCHEMA}").arguments
    names = [p.name for p in parameters if not p.has_default_value()]
    calls = []

    class Decode:
        default = staticmethod(lambda *args, **more: calls.append(dict(zip(names, args, strict=True)) | more))

    monkeypatch.setattr(providers.torch.ops.etap, "mla_decode", Decode, raising=False)
    monkeypatch.setattr(providers.torch.ops, "load_library", lambda path: None)
    inputs = Inputs(PROBLEM, KvPool(PROBLEM.cache_tokens, "bf16", "cpu"))
    etap = providers.Etap(Path(__file__), Target("h20", 132))  # any file will do: nothing loads it
    out, lse = etap.prepare(inputs)()
    (call,) = calls
    assert call["out"] is out
    assert call["lse"] is lse
    assert (out.shape, lse.shape) == ((2, 2, 8, 512), (2, 8, 2))
    assert (call["num_ctas"], call["p_parts"], call["max_seqlen_q"], call["causal"]) == (78, 1, 2, True)
    assert call["ckv_cache"].stride(1) == call["kpe_cache"].stride(1) == 576
    assert call["cu_seqlens_q"] is call["ckv_scale_arr"] is None


def test_the_operator_is_left_to_the_library_under_test():
    """`etap_integration.ops` registers the operator by itself; a process that measures another library could not."""
    code = "import sys, tools.bench.runner; sys.exit('etap_integration.ops' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=records.ROOT, check=True)
