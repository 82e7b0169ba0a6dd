"""Command line of the benchmark: `python -m tools.bench`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from etap_integration._library import library_path, on_hopper

from . import gpu_all, records, report, rivals, runner, trace
from . import grid as grids
from .problem import Inputs, KvPool, Problem
from .providers import Etap, Target

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

DEFAULT_LIBRARY = records.ROOT / "etap_integration/_C/libetap_mla.so"
IMPLEMENTATIONS = ("floor", "fa3", "flashinfer", "etap")
PATCHED = ("fa3-etap", "flashinfer-etap")


def _labelled(library: str) -> tuple[str | None, Path]:
    """Splits `LABEL=PATH`; a bare path has no label."""
    label, equals, path = library.partition("=")
    return (label, Path(path)) if equals else (None, Path(library))


def _without_libraries(arguments: list[str]) -> list[str]:
    """The command line's arguments less every `--library`, for the processes that take one each."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--library":
            skip = True
        elif not argument.startswith("--library="):
            kept.append(argument)
    return kept


def _need_gpu() -> None:
    if not torch.cuda.is_available():
        raise typer.BadParameter("measuring needs a Hopper GPU, and torch sees no GPU at all")


@app.command()
def run(
    grid: Annotated[str, typer.Option(help=f"What to measure: {', '.join(grids.GRIDS)}.")] = "bars",
    library: Annotated[
        list[str] | None,
        typer.Option(help="Our kernel: PATH or LABEL=PATH. Given twice or more, each runs in a process of its own."),
    ] = None,
    rivals_dir: Annotated[
        Path | None, typer.Option("--rivals", help="Folder with the rivals' libraries, as `build-rivals` makes them.")
    ] = None,
    impl: Annotated[
        list[str] | None,
        typer.Option(help=f"Only these: {', '.join(IMPLEMENTATIONS)} (the default), {', '.join(PATCHED)}. Repeatable."),
    ] = None,
    match: Annotated[
        list[str] | None,
        typer.Option(help="Only cells whose text holds all of this, e.g. 'b=16 kv=512 h=16'. Repeatable: any of them."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File to append rows to; default tools/bench/results/GRID.jsonl.")
    ] = None,
    verify: Annotated[str, typer.Option(help="Compute errors: auto (KV length up to 4096), all, none.")] = "auto",
    split: Annotated[bool, typer.Option(help="Give our kernel two separate caches, not views of one buffer.")] = False,
    num_ctas: Annotated[int, typer.Option(help="CTAs of our kernel; 0: all SMs, or 78 emulated.")] = 0,
    p_parts: Annotated[int, typer.Option(help="16-bit parts our kernel splits P into; 0: as the GPU has it.")] = 0,
    span_ms: Annotated[float, typer.Option(help="Device time spent on each call of each cell, in ms.")] = 40.0,
    budget_s: Annotated[
        float | None, typer.Option(min=0.0, help="Begin no cell that may end later than this many seconds from now.")
    ] = None,
    sources: Annotated[
        str | None, typer.Option(help="Hash of the kernel sources, where these are not the ones measured.")
    ] = None,
    commit: Annotated[str | None, typer.Option(help="Commit measured, where git is not at hand.")] = None,
) -> None:
    """Measure a grid on this machine's GPU and append one row per implementation and cell."""
    if library and len(library) > 1:
        rest = _without_libraries(sys.argv[1:])
        codes = [subprocess.call([sys.executable, "-m", "tools.bench", *rest, "--library", one]) for one in library]
        raise typer.Exit(max(codes))
    if unknown := sorted(set(impl or ()) - {*IMPLEMENTATIONS, *PATCHED}):
        known = ", ".join((*IMPLEMENTATIONS, *PATCHED))
        raise typer.BadParameter(f"{', '.join(unknown)}: known are {known}", param_hint="--impl")
    if verify not in ("auto", "all", "none"):
        raise typer.BadParameter(f"{verify!r} is none of auto, all, none", param_hint="--verify")
    allowance = runner.Allowance(budget_s)
    try:
        chosen = grids.named(grid).matching(match or ())
        sources = sources or records.sources_hash()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    _need_gpu()

    label, path = _labelled(library[0]) if library else (None, DEFAULT_LIBRARY)
    try:
        if path.is_file() and "etap" in (impl or IMPLEMENTATIONS):
            records.check_library(path, sources)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--library") from error

    settings = runner.Settings(
        impls=tuple(impl or IMPLEMENTATIONS),
        library=path,
        rivals=rivals_dir or rivals.library_dir(),
        verify=verify,
        split=split,
        num_ctas=num_ctas,
        p_parts=p_parts,
        span_ms=span_ms,
    )
    stamp = runner.stamp(sources, commit or records.head_commit(), records.portable_command(sys.argv[1:]), label)
    try:
        target = output or records.RESULTS / f"{grid}.jsonl"
        failures = runner.run(chosen, settings, stamp, target, typer.echo, allowance)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from error
    for failure in failures:
        typer.echo(f"FAILED {failure}", err=True)
    raise typer.Exit(1 if failures else 0)


@app.command("gpu-all")
def run_gpu_all(
    budget_s: Annotated[float, typer.Option(min=0.0, help="Time for all of it, in seconds.")] = 600.0,
    library: Annotated[Path | None, typer.Option(help="Our kernel (default: $ETAP_LIBRARY, or the package's).")] = None,
    rivals_dir: Annotated[
        Path | None, typer.Option("--rivals", help="Folder with the rivals and, in etap-h20, our throttled kernel.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the log and the rows.")] = Path("build/gpu-all"),
    commit: Annotated[str | None, typer.Option(help="Commit measured, where git is not at hand.")] = None,
) -> None:
    """Run the GPU suites, then the grids bars, full, h20 and e4m3, the most important first, within a time.

    FlashAttention-3 and FlashInfer are tested where they are installed. `collect` adds the rows to the recorded ones.
    """
    if not on_hopper():
        raise typer.BadParameter("needs a Hopper GPU")
    library = (library or library_path()).absolute()
    if not library.is_file():
        raise typer.BadParameter(f"{library} does not exist", param_hint="--library")
    folder, output = (rivals_dir or rivals.library_dir()).absolute(), output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    steps = gpu_all.steps(library, folder, output, ["--commit", commit] if commit else [])
    wanting = gpu_all.run(steps, budget_s, output / "gpu-all.log", gpu_all.start(library), typer.echo)
    raise typer.Exit(1 if wanting else 0)


@app.command("report")
def show_report(
    files: Annotated[list[Path] | None, typer.Argument(help="Files of rows; default all recorded ones.")] = None,
    run_id: Annotated[str | None, typer.Option("--run", help="Report this run; default the last of each file.")] = None,
    sources: Annotated[
        str | None, typer.Option(help="Hash of the kernel sources, where these are not the ones measured.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write here instead of to the terminal.")] = None,
) -> None:
    """Print recorded rows as markdown tables; runs measured from other kernel sources are marked stale."""
    current = sources or records.sources_hash()
    reasons_file = records.RESULTS / "reasons.json"
    given = json.loads(reasons_file.read_text()) if reasons_file.exists() else []
    reasons = [report.Reason(**reason) for reason in given]
    sections = []
    for path in files or sorted(records.RESULTS.glob("*.jsonl")):
        rows = records.read(path)
        rows = [row for row in rows if row.run == run_id] if run_id else report.latest_run(rows)
        if rows:
            sections.append(report.run_section(path.stem, rows, current, reasons))
    if not sections:
        typer.echo("no rows to report", err=True)
        raise typer.Exit(1)
    text = "\n".join(sections)
    if output:
        output.write_text(text)
    else:
        typer.echo(text)


@app.command("build-rivals")
def build_rivals(
    which: Annotated[
        list[str] | None, typer.Argument(help="floor, flashinfer, fa3, fa3-etap; default the first three.")
    ] = None,
    throttled: Annotated[bool, typer.Option(help="Build the twins for the emulated H20.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Compilers to run at once.")] = 1,
) -> None:
    """Fetch the pinned upstream sources and build the rivals' libraries (about 12 minutes on 2 cores)."""
    builder = rivals.Builder(throttled=throttled, jobs=jobs, log=typer.echo)
    rivals_only = {"floor": builder.floor, "flashinfer": builder.flashinfer, "fa3": builder.fa3}
    steps = {**rivals_only, "fa3-etap": builder.fa3_etap}
    if unknown := sorted(set(which or ()) - set(steps)):
        raise typer.BadParameter(f"{', '.join(unknown)}: known are {', '.join(steps)}")
    for name in which or rivals_only:
        if not (throttled and name == "floor"):
            steps[name]()
    typer.echo(f"libraries are in {rivals.library_dir()}")


@app.command()
def throttle(
    include: Annotated[Path, typer.Argument(help="A CUTLASS include folder.", exists=True, file_okay=False)],
    destination: Annotated[Path, typer.Argument(help="Folder to write; replaced if it exists.")],
) -> None:
    """Copy CUTLASS headers with every 16-bit wgmma throttled, to build a kernel for the emulated H20."""
    typer.echo(f"{rivals.throttle_cutlass(include, destination)} wgmma instructions throttled in {destination}")


@app.command("trace")
def show_trace(
    library: Annotated[Path, typer.Option(help="Our kernel, built with ETAP_NVCC_FLAGS=-DETAP_TRACE.")],
    batch: Annotated[int, typer.Option(min=1)] = 16,
    kv_len: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable; default 512, 4096, 65536.")] = None,
    heads: Annotated[int, typer.Option(min=1)] = 16,
    page_size: Annotated[int, typer.Option(min=1)] = 64,
    kv_dtype: Annotated[str, typer.Option(help="bf16, fp16, e4m3 or fp8_ds_mla.")] = "bf16",
    num_ctas: Annotated[int, typer.Option(help="CTAs of our kernel; 0: all SMs.")] = 0,
) -> None:
    """Print when the CTAs of a launch come to its stages, L2 cold: what a short launch waits for."""
    try:
        problems = [Problem(batch, n, heads, 1, page_size, kv_dtype) for n in kv_len or (512, 4096, 65536)]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    _need_gpu()
    if not library.is_file():
        raise typer.BadParameter(f"{library} does not exist", param_hint="--library")
    sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    provider = Etap(library, Target(None, sms), num_ctas=num_ctas)
    for problem in problems:
        pool = KvPool(problem.cache_tokens, problem.kv_dtype)
        try:
            lines = trace.measure(library, provider, Inputs(problem, pool))
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--library") from error
        typer.echo(f"{problem}\n{trace.table(lines)}")


@app.command("sources")
def print_sources() -> None:
    """Print the hash of the kernel sources, as rows record it."""
    typer.echo(records.sources_hash())


@app.command()
def collect(
    files: Annotated[list[Path], typer.Argument(help="Files of rows, named after their grid.", exists=True)],
) -> None:
    """Append rows that were written elsewhere to the recorded ones, under the same file names."""
    for path in files:
        rows = records.read(path)
        present = set(records.read(target)) if (target := records.RESULTS / path.name).exists() else set()
        records.append(target, [row for row in rows if row not in present])
        typer.echo(f"{path.name}: {sum(row not in present for row in rows)} rows added")


if __name__ == "__main__":
    app(prog_name="python -m tools.bench")
