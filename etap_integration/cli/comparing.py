"""`etap ab`: an installed upstream against ETAP, on a grid or a recorded workload."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from etap_integration import ab as comparison
from etap_integration.cli.output import (
    CommandError,
    Exit,
    JsonOption,
    MissingError,
    emit,
    err,
    out,
    plain,
    reported,
    table,
)
from etap_integration.dispatch import TARGETS, TargetError


def choose_target(name: str | None) -> str:
    """The target to compare with: the one named, or the first that is installed. Raises CommandError, MissingError."""
    if name is not None:
        if name not in TARGETS:
            raise CommandError(f"target: {name!r} is unknown; there are {', '.join(TARGETS)}")
        return name
    found = comparison.installed_targets()
    if not found:
        raise MissingError(
            f"none of {', '.join(TARGETS)} is installed; in a checkout, `etap bench` builds unpatched upstream kernels "
            "and compares with them"
        )
    return found[0]


def show(outcomes: list[comparison.Outcome], title: str) -> None:
    """Prints what came out, one line for each case, mode and state of the cache."""
    header = ["case", "mode", "cache", "upstream µs", "ETAP µs", "× floor", "speed-up", "interval", "spread", "verdict"]
    rows = []
    for o in outcomes:
        case = f"{o.case} ×{o.case.count}" if o.case.count > 1 else str(o.case)
        if not o.timings:
            told = f"left to upstream: {o.left}" if o.left else f"WRONG: {o.wrong}"
            rows.append([case, "", "", "", "", "", "", "", "", told])
        for t in o.timings:
            spread = f"{t.spread[0]:.1%} {t.spread[1]:.1%}"
            rows.append([
                case, t.mode, t.cache, f"{t.upstream_us:.1f}", f"{t.etap_us:.1f}", f"{t.etap_us / t.floor_us:.2f}",
                f"{t.ratio:.3f}", f"{t.low:.3f}–{t.high:.3f}", spread, t.verdict,
            ])  # fmt: skip
    table(title, header, rows, text_columns=3)
    for where, entry in comparison.summary(outcomes)["by"].items():
        counts = ", ".join(f"{entry[v]} {v}" for v in ("faster", "slower", "no difference"))
        out.print(f"{where}: {counts}; over all calls {entry['overall']:.3f} × upstream's speed", markup=False)


@reported
def ab(
    target: Annotated[
        str | None, typer.Option(help=f"Upstream: {', '.join(TARGETS)}; default the first installed.")
    ] = None,
    how: Annotated[
        str, typer.Option(help="monkeypatch: routed at run time; patched: an extension rebuilt with ETAP's patches.")
    ] = "monkeypatch",
    grid: Annotated[str, typer.Option(help="Cases: small, decode or shapes.")] = "small",
    workload: Annotated[Path | None, typer.Option(help="Cases recorded by shadow mode, instead of a grid.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="eager, graph. Repeatable; default both.")] = None,
    cache: Annotated[list[str] | None, typer.Option(help="L2: cold, warm. Repeatable; default cold.")] = None,
    max_rows: Annotated[int, typer.Option(help="Most query rows ETAP takes.")] = 32,
    span_ms: Annotated[float, typer.Option(help="Device time on each side of each timing, in ms.")] = 20.0,
    output: Annotated[Path | None, typer.Option(help="Append each outcome as a line of JSON to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare an installed upstream with ETAP: errors against fp64 first, then interleaved times, then a verdict.

    "× floor" is ETAP's time over the time in which the KV bytes can be read. The verdict is "no difference" unless the
    interval of the speed-up lies more than 1% away from 1. Exit code 1 where a result is wrong.
    """
    modes, caches = mode or list(comparison.MODES), cache or ["cold"]
    for name, values, known in (("mode", modes, comparison.MODES), ("cache", caches, comparison.CACHES)):
        if wrong := [v for v in values if v not in known]:
            raise CommandError(f"{name}: {wrong[0]!r}, expected {' or '.join(known)}")
    if how not in comparison.ARMS:
        raise CommandError(f"how: {how!r}, expected {' or '.join(comparison.ARMS)}")
    try:
        cases = comparison.grid(grid) if workload is None else comparison.read_workload(workload)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from None
    if not cases:
        raise CommandError(f"workload: {workload} holds no call")
    if not torch.cuda.is_available():
        raise MissingError("comparing needs a Hopper GPU, and torch sees no GPU at all")
    chosen = choose_target(target)
    outcomes = []
    options = {"max_rows": max_rows} if how == "monkeypatch" else {}
    try:
        with comparison.arms(chosen, how, **options) as sides:
            for case in cases:
                if case.kv_bytes * 4 > torch.cuda.mem_get_info()[0]:
                    err.print(f"{case}: left out, too large for the free device memory", markup=False)
                    continue
                outcomes.append(comparison.compare(case, sides, "cuda", modes=modes, caches=caches, span_ms=span_ms))
                if output is not None:
                    with output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(plain(outcomes[-1])) + "\n")
    except (TargetError, comparison.AbError) as error:
        raise MissingError(str(error)) from None
    title = f"{chosen}, {how}, on {torch.cuda.get_device_name()}"
    data = {"target": chosen, "how": how, "summary": comparison.summary(outcomes), "outcomes": outcomes}
    emit(as_json, data, lambda: show(outcomes, title))
    if any(o.wrong for o in outcomes):
        raise typer.Exit(Exit.NEGATIVE)
