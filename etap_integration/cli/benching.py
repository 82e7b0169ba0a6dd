"""`etap bench` and `etap report`: the checkout's benchmark, and the documents generated from its rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from etap_integration._library import on_hopper
from etap_integration.cli import checkout, modelling
from etap_integration.cli.output import CommandError, Exit, JsonOption, emit, err, out, plain, reported


def _say(text: str) -> None:
    err.print(text, markup=False, style="dim")


def _run_grid(folder: Path, arguments: list[str]) -> int:
    """`python -m tools.bench run`, its output on stderr, so that --json keeps standard output for itself."""
    command = [sys.executable, "-m", "tools.bench", "run", *arguments]
    return subprocess.run(command, cwd=folder, check=False, stdout=sys.stderr).returncode


@reported
def bench(
    grid: Annotated[str, typer.Option(help="Cells: a grid of tools/bench; with --emulate, its own.")] = "bars",
    emulate: Annotated[str | None, typer.Option(help="h20: throttled kernels on an H200's 78 SMs.")] = None,
    build: Annotated[bool, typer.Option(help="Build the libraries that are missing (nvcc; minutes, once).")] = True,
    jobs: Annotated[int, typer.Option(min=1, help="Compilers at once.")] = 1,
    output: Annotated[Path | None, typer.Option(help="File to append rows to (default: the recorded results).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time the operator beside unpatched upstream kernels and the memory floor; in a checkout.

    Fetches and compiles the pinned upstreams where they are missing, which needs nvcc and no GPU; then, on a Hopper
    GPU, measures and records. With --emulate h20: prints the emulated H20 beside the published one and the cost model's
    prediction, and says how far an emulation can be trusted. Without a GPU, the last recorded rows are printed, and the
    exit code is 3.
    """
    if emulate not in (None, "h20"):
        raise CommandError(f"emulate: {emulate!r}, expected h20")
    folder = checkout.root()
    emulation, readme, records, rivals = map(checkout.tool, ("emulation", "readme", "records", "rivals"))
    name = "h20" if emulate else grid
    grids = [g for g in checkout.tool("grid").GRIDS if g != "h20"]
    if name not in (*grids, "h20"):
        raise CommandError(f"grid: {grid!r}, expected one of {', '.join(grids)}")
    absent = emulation.missing() if emulate else [
        f for f in map(rivals.library_name, ("floor", "flashinfer", "fa3")) if not (rivals.library_dir() / f).is_file()
    ]  # fmt: skip
    problems = []
    if build and (absent or emulate):
        try:
            _build(emulation if emulate else None, rivals, absent, jobs)
            absent = []
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            problems.append(f"cannot build {', '.join(absent) or 'the throttled operator'}: {error}")
    if absent and not problems:
        problems.append(f"not built: {', '.join(absent)}")
    if not on_hopper():
        problems.append("measuring needs a Hopper GPU")
    code = 0
    if not problems:
        arguments = ["--grid", name]
        if emulate:
            arguments += ["--library", f"h20={emulation.etap_library()}"]
            arguments += [word for impl in emulation.implementations() for word in ("--impl", impl)]
        arguments += ["--output", str(output.absolute())] if output else []
        code = _run_grid(folder, arguments)
    rows = records.read(output) if output and output.exists() else readme.latest(name)
    rows = checkout.tool("report").latest_run(rows)

    def show() -> None:
        if emulate:
            out.print(emulation.tables(rows), markup=False)
        elif rows:
            out.print(checkout.tool("report").run_section(name, rows, _sources(records)), markup=False)
        for problem in problems:
            err.print(f"not run: {problem}", markup=False, style="red")

    emit(as_json, {"grid": name, "emulated": emulate, "not_run": problems, "rows": [plain(r) for r in rows]}, show)
    if problems:
        raise typer.Exit(Exit.MISSING)
    if code:
        raise typer.Exit(Exit.NEGATIVE)


def _build(emulation: Any, rivals: Any, absent: list[str], jobs: int) -> None:
    if emulation is not None:
        emulation.build(jobs, _say)
        return
    builder = rivals.Builder(jobs=jobs, log=_say)
    for kind in ("floor", "flashinfer", "fa3"):
        if rivals.library_name(kind) in absent:
            getattr(builder, kind)()


def _sources(records: Any) -> str | None:
    try:
        return records.sources_hash()
    except RuntimeError as reason:
        _say(f"stale rows cannot be told: {reason}")
        return None


@reported
def report(
    readme_file: Annotated[
        Path | None, typer.Option("--readme", help="Document with the markers (default: the checkout's README.md).")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1 where something would change.")
    ] = False,
    plots: Annotated[bool, typer.Option(help="Draw the plots too (matplotlib).")] = True,
    as_json: JsonOption = False,
) -> None:
    """Write the README's tables and plots anew from the recorded rows; in a checkout.

    Rows measured from other kernel sources than the tree's are marked as stale, not left out.
    """
    root = checkout.root()
    readme, records = checkout.tool("readme"), checkout.tool("records")
    path = readme_file or root / "README.md"
    sources = _sources(records)
    rows = {name: readme.latest(name) for name in checkout.tool("grid").GRIDS}
    drawn = []
    if plots and not check and rows["bars"]:
        drawn = readme.draw(modelling.pyplot(), rows["bars"], readme.PLOTS)
    try:
        before = path.read_text(encoding="utf-8")
        after = readme.replace_sections(before, sources)
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: {error}") from None
    found: dict[str, Any] = {
        "file": path,
        "changed": before != after,
        "runs": {name: {"run": r[0].run, "rows": len(r), "stale": sources is not None and r[0].sources != sources}
                 for name, r in rows.items() if r},
        "plots": drawn,
    }  # fmt: skip
    if not check and before != after:
        path.write_text(after, encoding="utf-8")

    def show() -> None:
        state = "would change" if check else "written anew"
        out.print(f"{path}: {state if found['changed'] else 'up to date'}", markup=False)
        for name, run in found["runs"].items():
            out.print(f"{name}: run {run['run']}, {run['rows']} rows{', STALE' if run['stale'] else ''}", markup=False)
        for plot in found["plots"]:
            out.print(str(plot), markup=False)
        if not found["runs"]:
            out.print("no row is recorded")

    emit(as_json, found, show)
    if check and found["changed"]:
        raise typer.Exit(Exit.NEGATIVE)
