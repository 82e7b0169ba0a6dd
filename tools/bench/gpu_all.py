"""All that a Hopper GPU is needed for, in the order of what it matters, within a given time: tests, then grids.

Each step is a process of its own, since a kernel that fails takes its process's device with it. A step gets at most
half of the time that is left, so that one that hangs does not cost all others; the last may have the rest. One that
runs out of its time is interrupted, whereupon pytest still says what it ran; grids end by themselves before. Rows are
on the disk as soon as their cell is measured.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .emulation import etap_library
from .records import ROOT

SUITES = ("mla_decode", "mla_decode_e4m3", "fa3", "flashinfer", "reduced")
GRIDS = ("bars", "full", "h20", "e4m3", "fp8_ds_mla", "ragged")
SHARE = 0.5
STARTUP_S = 25.0  # of a grid's process, until its own clock runs, and of its last cell
LEAST_S = 30.0
GRACE_S = 15.0  # from the interrupt on

Log = Callable[[str], None]
Start = Callable[[list[str], Path, float], int | None]
"""Runs a command with its output appended to a file, for at most so many seconds; None: it was stopped."""


@dataclass(frozen=True)
class Step:
    """A process to run.

    Attributes:
        name: the GPU suite or the grid.
        command: its command line, for so many seconds.
        missing: what is not there to run it, if anything.
    """

    name: str
    command: Callable[[float], list[str]]
    missing: str | None = None


def steps(library: Path, rivals: Path, output: Path, options: Sequence[str] = ()) -> list[Step]:
    """Suites, then grids.

    Args:
        library: the operator library.
        rivals: folder with the rivals' libraries and, in `etap-h20`, the throttled operator library.
        output: folder for the rows.
        options: more options of `tools.bench run`.
    """

    def suite(name: str) -> Step:
        line = [sys.executable, "-m", "pytest", f"tests/gpu/test_{name}_gpu.py", "-q", "--tb=short", "--durations=5"]
        return Step(f"tests {name}", lambda _: line)

    def grid(name: str) -> Step:
        throttled = rivals / "etap-h20" / etap_library().name
        used = f"h20={throttled}" if name == "h20" else str(library)
        line = [sys.executable, "-m", "tools.bench", "run", "--grid", name, "--library", used]
        line += ["--rivals", str(rivals), "--output", str(output / f"{name}.jsonl"), *options]
        absent = name == "h20" and not throttled.is_file()
        missing = f"no {throttled.name} in {throttled.parent.name}" if absent else None
        return Step(f"grid {name}", lambda limit: [*line, "--budget-s", f"{limit - STARTUP_S:.0f}"], missing)

    return [*map(suite, SUITES), *map(grid, GRIDS)]


def start(library: Path) -> Start:
    """What runs the steps' commands, in the repository, with `library` as the operator's."""
    environment = {**os.environ, "ETAP_LIBRARY": str(library), "PYTHONUNBUFFERED": "1"}

    def run(command: list[str], log: Path, limit_s: float) -> int | None:
        with log.open("ab") as sink:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                return process.wait(limit_s)
            except subprocess.TimeoutExpired:
                return None
            finally:  # also where this process is interrupted itself
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGINT)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(GRACE_S)
                # Whatever it has started ends with it, even where the interrupt was ignored or is still being handled.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    return run


def run(
    steps: Sequence[Step],
    budget_s: float,
    log: Path,
    start: Start,
    say: Log,
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Runs the steps, each within its share of the time, and says one line of each: its last.

    Returns:
        The names of those that failed, were stopped or did not run.
    """
    end = clock() + budget_s
    wanting = []
    for number, step in enumerate(steps):
        begun = clock()
        left = end - begun - GRACE_S
        limit = left if number + 1 == len(steps) else left * SHARE
        reason = step.missing or ("no time left" if limit < LEAST_S else None)
        if reason:
            wanting.append(step.name)
            say(f"{step.name}: not run: {reason}")
            continue
        command = step.command(limit)
        with log.open("a") as sink:
            sink.write(f"\n== {step.name}, at most {limit:.0f} s\n")
        written = log.stat().st_size
        code = start(command, log, limit)
        if code != 0:
            wanting.append(step.name)
        with log.open("rb") as file:
            file.seek(written)
            printed = file.read().decode(errors="replace").split("\n")
        last = next((line for line in reversed(printed) if line.strip()), "no output")
        how = {None: "STOPPED", 0: "ended"}.get(code, f"FAILED with {code}")
        say(f"{step.name}: {how} after {clock() - begun:.0f} s: {last.strip()}")
    return wanting
