"""Runs a grid on the GPU at hand and records its rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

import torch

from etap_integration.timing import Budget, Sample, Timer, captured

from . import records
from .grid import GRAPH, WARM_CALLS, WARM_GRAPH, Cell, Grid
from .problem import Inputs, KvPool
from .providers import (
    Errors,
    Etap,
    FlashAttention3,
    FlashInfer,
    Floor,
    PatchedFlashAttention3,
    Provider,
    Result,
    Target,
    disagreement,
)
from .records import Row, Stamp

VERIFIED_KV_LEN = 4096
"""Longest KV length whose errors are computed unless all are asked for."""

AGREEMENT = 0.05
"""Largest relative difference (RMS) between the outputs of two implementations; rounding alone stays near 0.01."""

LATE = 0.25
"""Share of late samples (see `etap_integration.timing`) above which a run says so."""

_RESERVED_BYTES = 8 << 30  # device memory kept for workspaces, the reference and everything else


class Allowance:
    """The time that a run may take: a cell is begun only where it should end in time.

    Args:
        seconds: from now on; None: as long as it takes.
        clock: seconds from any origin.
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._slowest = clock, 0.0
        self._begun = clock()
        self._end = None if seconds is None else self._begun + seconds

    def begins(self) -> bool:
        """Whether another cell may begin. Any may turn out as slow as the slowest so far, so that much must be left."""
        self._begun = self._clock()
        return self._end is None or self._begun + self._slowest < self._end

    def ended(self) -> None:
        """Notes how long the cell took that `begins` let begin."""
        self._slowest = max(self._slowest, self._clock() - self._begun)


class Check(Enum):
    """What outputs are compared with: nothing, each other, or the fp64 reference."""

    NONE = "none"
    AGREEMENT = "agreement"
    REFERENCE = "reference"


@dataclass(frozen=True)
class Settings:
    """What to run and how.

    Attributes:
        impls: implementations, in the order in which they are prepared.
        library: our kernel.
        rivals: folder with the rivals' libraries.
        verify: `auto`, `all` or `none`: where errors are computed.
        split, num_ctas, p_parts: see `tools.bench.providers.Etap`.
        span_ms: device time spent on each call of each cell, in milliseconds.
    """

    impls: tuple[str, ...]
    library: Path
    rivals: Path
    verify: str = "auto"
    split: bool = False
    num_ctas: int = 0
    p_parts: int = 0
    span_ms: float = 40.0

    def check(self, cell: Cell, emulated: str | None) -> Check:
        """How the outputs of `cell` are checked; throttled kernels are wrong by design, so theirs are not."""
        if self.verify == "none" or emulated:
            return Check.NONE
        if self.verify == "all" or cell.problem.kv_len <= VERIFIED_KV_LEN:
            return Check.REFERENCE
        return Check.AGREEMENT

    def providers(self, target: Target) -> list[Provider]:
        """The implementations asked for."""
        make: dict[str, Callable[[], Provider]] = {
            "floor": lambda: Floor(self.rivals, target),
            "fa3": lambda: FlashAttention3(self.rivals, target),
            "fa3-etap": lambda: PatchedFlashAttention3(self.rivals, target),
            "flashinfer": lambda: FlashInfer(self.rivals, target),
            "flashinfer-etap": lambda: _wrapped(target, patched=True),
            "etap": lambda: Etap(self.library, target, split=self.split, num_ctas=self.num_ctas, p_parts=self.p_parts),
        }
        if "flashinfer-etap" in self.impls:  # both through the wrapper, or host time would be compared with none
            make["flashinfer"] = lambda: _wrapped(target, patched=False)
        return [make[name]() for name in self.impls]


def _wrapped(target: Target, patched: bool) -> Provider:
    from .wrapped import FlashInferWrapper  # needs FlashInfer installed

    return FlashInferWrapper(target, patched)


def stamp(sources: str, commit: str | None, command: str, label: str | None) -> Stamp:
    """The fields that all rows of this process share."""
    return Stamp(
        run=records.new_run_id(label),
        gpu=torch.cuda.get_device_name(),
        driver=records.driver_version(),
        torch=torch.__version__,
        commit=commit,
        sources=sources,
        command=command,
        label=label,
    )


class _Pools:
    """The token pools of a run, one for each cache type, each as large as the run's largest problem needs."""

    def __init__(self, cells: tuple[Cell, ...]) -> None:
        self._tokens: dict[tuple[str, int], int] = {}
        for cell in cells:
            key = (cell.problem.kv_dtype, cell.problem.seed)
            self._tokens[key] = max(self._tokens.get(key, 0), cell.problem.cache_tokens)
        self._pools: dict[tuple[str, int], KvPool] = {}

    def inputs(self, cell: Cell) -> Inputs:
        key = (cell.problem.kv_dtype, cell.problem.seed)
        if key not in self._pools:
            self._pools[key] = KvPool(self._tokens[key], cell.problem.kv_dtype, seed=cell.problem.seed)
        return Inputs(cell.problem, self._pools[key])


class _CellRun:
    """One cell: prepares every implementation that can run it, checks them, times them."""

    def __init__(self, cell: Cell, inputs: Inputs, providers: list[Provider]) -> None:
        self.cell, self.inputs = cell, inputs
        self.providers = {p.name: p for p in providers if p.unsupported(cell.problem) is None}
        self.calls = {name: provider.prepare(inputs) for name, provider in self.providers.items()}

    def errors(self) -> dict[str, Errors]:
        """Errors of each implementation's output and LSE against fp64."""
        exact = self.inputs.reference()
        return {name: Errors.between(result, exact) for name, result in self._results().items()}

    def check_agreement(self) -> None:
        """Raises ArithmeticError unless all outputs are about equal; for cells too long for the reference."""
        results = self._results()
        first = next(iter(results), None)
        for name, result in results.items():
            if not (distance := disagreement(result, results[first])) <= AGREEMENT:
                raise ArithmeticError(f"the outputs of {name} and {first} differ by {distance:.1%}")

    def _results(self) -> dict[str, Result]:
        results = {name: call() for name, call in self.calls.items()}
        return {name: result for name, result in results.items() if result is not None}

    def times(self, timer: Timer, log: Callable[[str], None]) -> dict[str, Sample]:
        """Samples of each implementation."""
        calls = self.calls
        if self.cell.mode == GRAPH:
            calls = {name: captured(call) for name, call in calls.items()}
        if self.cell.mode == WARM_GRAPH:
            calls = {name: captured(call, WARM_CALLS) for name, call in calls.items()}
            timer = timer.with_warm_cache()
        samples = timer.interleaved(calls)
        if self.cell.mode == WARM_GRAPH:
            samples = {name: sample.over(WARM_CALLS) for name, sample in samples.items()}
        for name, sample in samples.items():
            if sample.late > LATE:
                log(f"{self.cell}: the host fell behind in {sample.late:.0%} of the samples of {name}")
        return samples

    def rows(
        self, timer: Timer, check: Check, emulated: str | None, stamp: Stamp, log: Callable[[str], None]
    ) -> list[Row]:
        """Checks, then measures the cell."""
        errors = self.errors() if check is Check.REFERENCE else {}
        if check is Check.AGREEMENT:
            self.check_agreement()
        p = self.cell.problem
        return [
            Row(
                impl=name,
                kv_dtype=p.kv_dtype,
                batch=p.batch,
                kv_len=p.kv_len,
                heads=p.heads,
                q_len=p.q_len,
                page_size=p.page_size,
                shortest=p.shortest,
                mode=self.cell.mode,
                emulated=emulated,
                median_us=round(sample.median_us, 3),
                p20_us=round(sample.p20_us, 3),
                p80_us=round(sample.p80_us, 3),
                upstream=self.providers[name].upstream,
                **(asdict(errors[name]) if name in errors else {"rmse": None}),
                **asdict(stamp),
            )
            for name, sample in self.times(timer, log).items()
        ]


def _line(cell: Cell, rows: list[Row]) -> str:
    floor = next((row.median_us for row in rows if row.impl == "floor"), None)
    parts = []
    for row in rows:
        ratio = f" ({row.median_us / floor:.2f}x)" if floor and row.impl != "floor" else ""
        error = f" rmse {row.rmse:.2e}" if row.rmse is not None else ""
        parts.append(f"{row.impl} {row.median_us:.1f}{ratio}{error}")
    return f"{cell}: " + " | ".join(parts)


def run(
    grid: Grid,
    settings: Settings,
    stamp: Stamp,
    output: Path,
    log: Callable[[str], None],
    allowance: Allowance | None = None,
) -> list[str]:
    """Measures every cell that fits this GPU, in the grid's order, and appends its rows as they come.

    Args:
        allowance: ends the run between two cells where the time is used up; the rest is left out, and logged.

    Returns:
        What failed, one text for each cell; a failed cell adds no rows.
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    free, _ = torch.cuda.mem_get_info()
    fitting = grid.fitting(free - _RESERVED_BYTES)
    if left_out := len(grid.cells) - len(fitting.cells):
        log(f"{left_out} cells do not fit in device memory and are left out")
    target = Target(grid.emulated, properties.multi_processor_count)
    providers = settings.providers(target)
    pools, timer, failures = _Pools(fitting.cells), Timer(Budget(span_ms=settings.span_ms)), []
    log(f"run {stamp.run}: {len(fitting.cells)} cells on {stamp.gpu}")
    allowance = allowance or Allowance(None)
    for number, cell in enumerate(fitting.cells):
        if not allowance.begins():
            log(f"the time is used up: {len(fitting.cells) - number} of {len(fitting.cells)} cells not run")
            break
        try:
            cell_run = _CellRun(cell, pools.inputs(cell), providers)
            rows = cell_run.rows(timer, settings.check(cell, grid.emulated), grid.emulated, stamp, log)
        except (RuntimeError, ArithmeticError, ValueError) as error:
            failures.append(f"{cell}: {error}")
            log(f"{cell}: FAILED: {error}")
            torch.cuda.synchronize()  # raises if the device itself is lost: no later cell could run
        else:
            records.append(output, rows)
            log(_line(cell, rows))
        allowance.ended()
    return failures
