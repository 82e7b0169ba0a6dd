"""The command line, as far as it needs no GPU."""

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from tools.bench import __main__ as cli
from tools.bench import records
from tools.bench.records import Row

ROW = Row(
    impl="etap", kv_dtype="bf16", batch=16, kv_len=512, heads=16, q_len=1, page_size=64, mode="eager", emulated=None,
    median_us=16.0, p20_us=15.0, p80_us=17.0, rmse=None, run="run-1", gpu="NVIDIA H200", driver="580.1",
    torch="2.11.0", upstream=None, commit=None, sources="a" * 64, command="python -m tools.bench run",
)  # fmt: skip


@pytest.fixture
def results(tmp_path, monkeypatch):
    folder = tmp_path / "results"
    monkeypatch.setattr(records, "RESULTS", folder)
    return folder


def _call(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_report_of_the_recorded_rows(results, tmp_path):
    records.append(results / "bars.jsonl", [ROW, replace(ROW, impl="fa3", upstream="x==1", median_us=17.0)])
    records.append(results / "h20.jsonl", [replace(ROW, run="run-0"), replace(ROW, run="run-2", emulated="h20")])
    done = _call("report", "--sources", "a" * 64)
    assert done.exit_code == 0
    assert done.stdout.index("## bars") < done.stdout.index("## h20")
    assert "`run-0`" not in done.stdout
    assert "STALE" not in done.stdout
    assert _call("report", "--sources", "b" * 64).stdout.count("STALE") == 2
    (results / "reasons.json").write_text('[{"batch": [1, 16], "kv_len": [512, 512], "reason": "why"}]')
    records.append(results / "bars.jsonl", [replace(ROW, impl="fa3", upstream="x==1", median_us=15.5)])
    assert "0.97×; why" in _call("report", "--sources", "a" * 64).stdout
    done = _call("report", results / "h20.jsonl", "--run", "run-0", "--output", tmp_path / "out.md")
    assert done.exit_code == 0
    assert "`run-0`" in (tmp_path / "out.md").read_text()


def test_report_without_rows_fails(results):
    assert _call("report").exit_code == 1


def test_collect_adds_each_row_once(results, tmp_path):
    elsewhere = tmp_path / "bars.jsonl"
    records.append(elsewhere, [ROW, replace(ROW, impl="floor")])
    assert "2 rows added" in _call("collect", elsewhere).stdout
    assert "0 rows added" in _call("collect", elsewhere).stdout
    assert records.read(results / "bars.jsonl") == records.read(elsewhere)


def test_sources_prints_the_hash(monkeypatch):
    monkeypatch.setattr(records, "sources_hash", lambda: "f" * 64)
    assert _call("sources").stdout.strip() == "f" * 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--grid", "half"), "no grid is called 'half'"),
        (("--impl", "fa2"), "fa2"),
        (("--verify", "some"), "some"),
        (("--match", "b=17"), "no cell of bars matches"),
    ],
)
def test_bad_options_of_run_are_named(arguments, message):
    done = _call("run", "--sources", "0" * 64, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks what happens without a GPU")
def test_run_without_a_gpu_says_so():
    done = _call("run", "--sources", "0" * 64)
    assert done.exit_code == 2
    assert "no GPU" in done.stderr


def test_several_libraries_run_in_processes_of_their_own(monkeypatch):
    commands = []
    monkeypatch.setattr(cli.subprocess, "call", lambda command: commands.append(command[1:]) or len(commands) - 1)
    arguments = ["run", "--library", "a=one.so", "--grid", "bars", "--library=b=two.so"]
    monkeypatch.setattr(cli.sys, "argv", ["bench", *arguments])
    assert _call(*arguments).exit_code == 1, "the worst of the exit codes"
    head = ["-m", "tools.bench", "run", "--grid", "bars", "--library"]
    assert commands == [[*head, "a=one.so"], [*head, "b=two.so"]]


def test_building_an_unknown_rival_is_refused():
    done = _call("build-rivals", "fa2")
    assert done.exit_code == 2
    assert "fa2" in done.stderr
