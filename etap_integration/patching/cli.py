"""Command line of the patch tooling: fetch, check, apply, build, verify, revert. A thin layer over the functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from etap_integration.cli.output import Exit, JsonOption, emit, err, out, plain, reported

from . import building, fetching, locations, series
from .manifest import Release, load_manifest, upstream_names
from .refresh import refresh

app = typer.Typer(no_args_is_help=True, help="Patch an upstream attention library with ETAP, and undo it.")

Upstream = Annotated[str, typer.Argument(help="flash-attention-3 or flashinfer.")]
ReleaseOption = Annotated[
    str | None, typer.Option("--release", help="Release in the manifest (default: the tree's, or the first).")
]
SourceOption = Annotated[
    Path | None, typer.Option("--source", help="Your own checkout or installation (default: the fetched tree).")
]


def _resolve(upstream: str, release: str | None, source: Path | None) -> tuple[Release, Path]:
    manifest = load_manifest(upstream)
    if release is None and source is not None:
        chosen = fetching.detect_release(manifest, source)
    else:
        chosen = manifest.release(release)
    return chosen, fetching.locate_tree(chosen, source)


@contextlib.contextmanager
def _bar(*columns: Any) -> Iterator[Callable[[int, int, str], None]]:
    text = TextColumn("{task.description}")
    with Progress(text, BarColumn(), *columns, TimeElapsedColumn(), console=err, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


@app.command("list")
@reported
def list_command(as_json: JsonOption = False) -> None:
    """List the upstreams and releases that there are patches for."""
    found = [
        {
            "upstream": name,
            "release": release.id,
            "requirement": f"{release.archive.project}=={release.archive.version}",
            "patches": release.patch_names,
        }
        for name in upstream_names()
        for release in load_manifest(name).releases
    ]

    def show() -> None:
        for one in found:
            out.print("{upstream}  {release}  ({requirement}, {0} patches)".format(len(one["patches"]), **one))

    emit(as_json, found, show)


@app.command("fetch")
@reported
def fetch_command(
    upstream: Upstream,
    release: ReleaseOption = None,
    dest: Annotated[Path | None, typer.Option(help="New directory for the tree (default: in the cache).")] = None,
    archive: Annotated[Path | None, typer.Option(help="Use this archive instead of the package index.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Download the pinned archive, check its hash, and unpack the upstream tree."""
    chosen = load_manifest(upstream).release(release)
    with _bar(DownloadColumn()) as show:
        tree = fetching.fetch(
            chosen, dest=dest, archive=archive, progress=lambda done, total: show(done, total, chosen.archive.filename)
        )
    data = {"upstream": upstream, "release": chosen.id, "tree": tree}
    emit(as_json, data, lambda: out.print(str(tree), markup=False))


@app.command("check")
@reported
def check_command(
    upstream: Upstream,
    release: ReleaseOption = None,
    source: SourceOption = None,
    fuzz: Annotated[bool, typer.Option("--fuzz", help="Try it on files that differ from the release's.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say which state a tree is in and whether the series applies; changes nothing."""
    chosen, tree = _resolve(upstream, release, source)
    report = series.check(chosen, tree, fuzz=fuzz)

    def show() -> None:
        out.print(f"{tree}: {report.state.value} ({upstream} {chosen.id})", markup=False)
        for file in report.files:
            out.print(f"  {file.state.value:9} {file.path}  {(file.actual or '-')[:16]}", markup=False)
        for problem in report.problems:
            err.print(f"problem: {problem}", markup=False, style="red")

    emit(as_json, {"upstream": upstream, **plain(report)}, show)
    if report.problems:
        raise typer.Exit(Exit.NEGATIVE)


@app.command("apply")
@reported
def apply_command(
    upstream: Upstream,
    release: ReleaseOption = None,
    source: SourceOption = None,
    fuzz: Annotated[bool, typer.Option("--fuzz", help="Accept files that differ from the release's.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Apply the series: all files or none; nothing on a patched tree."""
    chosen, tree = _resolve(upstream, release, source)
    _tell(as_json, series.apply(chosen, tree, fuzz=fuzz), tree, "patched", "already patched")


@app.command("verify")
@reported
def verify_command(
    upstream: Upstream, release: ReleaseOption = None, source: SourceOption = None, as_json: JsonOption = False
) -> None:
    """Make sure that every touched file is the patched one."""
    chosen, tree = _resolve(upstream, release, source)
    report = series.verify(chosen, tree)
    line = f"{tree}: {report.state.value} ({upstream} {chosen.id})"
    emit(as_json, {"upstream": upstream, **plain(report)}, lambda: out.print(line, markup=False))


@app.command("revert")
@reported
def revert_command(
    upstream: Upstream,
    release: ReleaseOption = None,
    source: SourceOption = None,
    force: Annotated[bool, typer.Option("--force", help="Discard edits made to patched files since.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Restore every touched file byte for byte, from any state, also after an interrupted apply."""
    chosen, tree = _resolve(upstream, release, source)
    _tell(as_json, series.revert(chosen, tree, force=force), tree, "restored", "nothing to restore")


@app.command("refresh", hidden=True)
@reported
def refresh_command(upstream: Upstream, release: ReleaseOption = None, source: SourceOption = None) -> None:
    """For maintainers: record in the manifest the hashes that the series leads to on a pristine tree."""
    chosen, tree = _resolve(upstream, release, source)
    for file in refresh(locations.patches_root() / upstream / "manifest.json", chosen.id, tree):
        out.print(f"{file.path}  {file.after}", markup=False)


@app.command("build")
@reported
def build_command(
    upstream: Upstream,
    release: ReleaseOption = None,
    source: SourceOption = None,
    kernels: Annotated[str, typer.Option(help=f"One of: {', '.join(building.KERNEL_SETS)}.")] = "mla-decode",
    csrc: Annotated[Path | None, typer.Option(help="ETAP's device library (default: the project's).")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory for wheel and log (default: in the cache).")] = None,
    jobs: Annotated[int | None, typer.Option(help="Compile jobs in parallel.")] = None,
    python: Annotated[str | None, typer.Option(help="Interpreter to build for (default: this one).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Build a wheel of the patched tree with upstream's own setup.py."""
    chosen, tree = _resolve(upstream, release, source)
    options = {} if python is None else {"python": python}
    with _bar(MofNCompleteColumn()) as show:
        result = building.build(
            chosen, tree, kernels=kernels, csrc=csrc, output=output, jobs=jobs, progress=show, **options
        )
    err.print(f"log: {result.log}", markup=False)
    emit(as_json, result, lambda: out.print(str(result.wheel), markup=False))


def _tell(as_json: bool, outcome: series.Outcome, tree: Path, did: str, nothing: str) -> None:
    if outcome.recovered:
        err.print(f"cleaned up after an interrupted command (phase {outcome.recovered!r})", markup=False)

    def show() -> None:
        if not outcome.changed:
            out.print(f"{tree}: {nothing}", markup=False)
        for path in outcome.changed:
            out.print(f"{did} {path}", markup=False)

    emit(as_json, {"tree": tree, **plain(outcome)}, show)
