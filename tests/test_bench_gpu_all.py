"""The time of a run: which cells still begin; and the steps of gpu-all. With clocks and processes of the tests'."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_bench_cli import ROW
from typer.testing import CliRunner

from tools.bench import __main__ as cli
from tools.bench import gpu_all, records, runner
from tools.bench.gpu_all import GRACE_S, LEAST_S, SHARE, STARTUP_S, Step
from tools.bench.grid import Cell, Grid
from tools.bench.problem import Problem
from tools.bench.records import Stamp
from tools.bench.runner import Allowance, Settings

STAMP = Stamp(run="r", gpu="g", driver="d", torch="t", commit=None, sources="s", command="c")


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_cell_begins_only_where_the_slowest_so_far_would_still_end_in_time():
    clock = Clock()
    allowance = Allowance(10.0, clock)
    for seconds in (1.0, 3.0, 0.5, 2.0):
        assert allowance.begins()
        clock.now += seconds
        allowance.ended()
    assert clock.now == 106.5 and allowance.begins()
    clock.now += 0.5
    allowance.ended()
    assert not allowance.begins(), "3 s are left, which is what the slowest took"


def test_without_a_limit_every_cell_begins():
    clock = Clock()
    allowance = Allowance(None, clock)
    for _ in range(3):
        assert allowance.begins()
        clock.now += 1e9
        allowance.ended()
    assert not Allowance(0.0, clock).begins()


@pytest.fixture
def measured(monkeypatch):
    """runner.run without a GPU: each cell takes 3 s of the clock, and one of a batch of 2 fails."""
    clock = Clock()

    class CellRun:
        def __init__(self, cell, inputs, providers):
            self.cell = cell

        def rows(self, *_):
            clock.now += 3.0
            if self.cell.problem.batch == 2:
                raise RuntimeError("went wrong")
            return [ROW]

    for name, value in {
        "get_device_properties": lambda _: SimpleNamespace(multi_processor_count=132),
        "current_device": lambda: 0,
        "mem_get_info": lambda: (1 << 40, 1 << 40),
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(runner, "Timer", lambda *_: None)
    monkeypatch.setattr(runner, "_Pools", lambda *_: SimpleNamespace(inputs=lambda _: None))
    monkeypatch.setattr(runner, "_CellRun", CellRun)
    return clock


def test_a_run_stops_between_cells_and_keeps_what_it_has(measured, tmp_path):
    cells = Grid("g", tuple(Cell(Problem(batch, 512)) for batch in (1, 2, 3, 4, 5)))
    settings, output, said = Settings((), tmp_path, tmp_path), tmp_path / "g.jsonl", []
    allowance = Allowance(10.0, measured)
    failures = runner.run(cells, settings, STAMP, output, said.append, allowance)
    assert len(failures) == 1 and "went wrong" in failures[0], "a cell that fails takes its time, too"
    assert len(records.read(output)) == 2
    assert said[-1] == "the time is used up: 2 of 5 cells not run"
    assert len(runner.run(cells, settings, STAMP, output, said.append)) == 1
    assert len(records.read(output)) == 2 + 4


def test_steps_are_the_suites_then_the_grids(tmp_path):
    library, rivals = tmp_path / "libetap_mla.so", tmp_path / "rivals"
    steps = gpu_all.steps(library, rivals, tmp_path, ["--commit", "c"])
    kinds = [step.name.split()[0] for step in steps]
    assert kinds == ["tests"] * 5 + ["grid"] * 6
    suites = {part for step in steps for part in step.command(100.0) if part.startswith("tests/")}
    assert suites == {f"tests/gpu/{path.name}" for path in (records.ROOT / "tests/gpu").glob("test_*.py")}
    assert [step.missing for step in steps if step.missing] == ["no libetap_mla.so in etap-h20"]
    (rivals / "etap-h20").mkdir(parents=True)
    (rivals / "etap-h20/libetap_mla.so").touch()
    h20 = next(s for s in gpu_all.steps(library, rivals, tmp_path) if s.name == "grid h20")
    line = h20.command(100.0)
    assert h20.missing is None and f"h20={rivals}/etap-h20/libetap_mla.so" in line
    assert line[line.index("--budget-s") + 1] == f"{100.0 - STARTUP_S:.0f}"


@pytest.mark.parametrize("grid", gpu_all.GRIDS)
def test_a_grids_command_line_is_one_of_run(grid, tmp_path):
    step = next(s for s in gpu_all.steps(tmp_path / "x.so", tmp_path, tmp_path) if s.name == f"grid {grid}")
    arguments = step.command(100.0)[3:]
    if torch.cuda.is_available():
        pytest.skip("not run: it would measure")
    done = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert done.exit_code == 2 and "no GPU" in done.stderr, "everything before that was accepted"


def test_each_step_gets_half_of_what_is_left_and_says_its_last_line(tmp_path):
    clock, limits, said = Clock(), [], []
    outcomes = {"a": (0, 100.0, "3 passed"), "b": (None, None, "..F"), "d": (1, 5.0, "1 failed"), "e": (0, 5.0, "")}

    def start(command, log, limit):
        code, seconds, line = outcomes[command[0]]
        limits.append(limit)
        clock.now += limit if seconds is None else seconds
        with log.open("a") as sink:
            sink.write(line + "\n\n")
        return code

    steps = [Step(name, lambda _, name=name: [name]) for name in "abde"]
    steps.insert(2, Step("c", lambda _: ["c"], missing="no c"))
    log = tmp_path / "log"
    wanting = gpu_all.run(steps, 1000.0, log, start, said.append, clock)
    assert limits[0] == (1000.0 - GRACE_S) * SHARE
    assert limits[1] == (900.0 - GRACE_S) * SHARE
    assert limits[-1] == 900.0 - limits[1] - 5.0 - GRACE_S, "the last may have the rest"
    assert wanting == ["b", "c", "d"]
    assert said == [
        "a: ended after 100 s: 3 passed",
        f"b: STOPPED after {limits[1]:.0f} s: ..F",
        "c: not run: no c",
        "d: FAILED with 1 after 5 s: 1 failed",
        "e: ended after 5 s: no output",
    ]
    assert log.read_text().count("== ") == 4
    assert gpu_all.run(steps[:2], LEAST_S + GRACE_S - 1, log, start, said.append, clock) == ["a", "b"]
    assert said[-1] == "b: not run: no time left"


def test_a_process_that_runs_out_of_its_time_is_interrupted(tmp_path):
    """And may still say something, as pytest does; what it has started ends with it."""
    log = tmp_path / "log"
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs inherit: ignored
        "code = 'import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(100)'\n"
        "child = subprocess.Popen([sys.executable, '-c', code])\n"
        "print(child.pid)\n"
        "try:\n    time.sleep(100)\nexcept KeyboardInterrupt:\n    print('interrupted')\n"
    )
    start = gpu_all.start(tmp_path / "mine.so")
    begun = time.monotonic()
    assert start([sys.executable, "-c", code], log, 3.0) is None
    assert time.monotonic() - begun < 60
    pid, said = log.read_text().splitlines()[0], log.read_text()
    assert "interrupted" in said
    ended = time.monotonic() + 30  # a process that was killed is still seen for a moment
    while _alive(int(pid)) and time.monotonic() < ended:
        time.sleep(0.05)
    assert not _alive(int(pid))
    assert start([sys.executable, "-c", "import os; print(os.environ['ETAP_LIBRARY'])"], log, 60.0) == 0
    assert log.read_text().splitlines()[-1] == str(tmp_path / "mine.so")
    assert start([sys.executable, "-c", "raise SystemExit(3)"], log, 60.0) == 3


def _alive(pid):
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks what happens without a GPU")
def test_gpu_all_without_a_gpu_says_so():
    done = CliRunner().invoke(cli.app, ["gpu-all"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert done.exit_code == 2 and "Hopper GPU" in done.stderr
