"""Shadow mode: on a sample of a live pipeline's calls, run both implementations on the call's own tensors.

    with etap_integration.shadow("sgl_kernel.flash_attn", fraction=0.01) as session:
        ...                                   # the pipeline
    print(session.summary())

or, without touching the program, `etap run --shadow 0.01 -- COMMAND` (ETAP_SHADOW=0.01 in the environment).

The caller gets the result of one of them, upstream's by default, exactly as it was computed; the other one's goes
into a buffer of its own and is only compared. What the comparison raises is counted and swallowed. Nothing waits for
the GPU: errors and lengths are reduced and copied on the call's stream, and read once they have arrived. Calls inside a
CUDA graph capture are not sampled, and calls that a captured graph replays never come by here: sample a pipeline with
its CUDA graphs off.

Not within its power: an illegal memory access by a kernel ends the process, whoever's kernel it was.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import random
import statistics
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etap_integration import dispatch
from etap_integration.dispatch import routing
from etap_integration.dispatch.calls import Call

log = logging.getLogger("etap_integration.shadowing")

IMPLEMENTATIONS = ("upstream", "etap")
MAX_PENDING = 256  # comparisons whose figures have not arrived; beyond it calls are not sampled
MAX_RECORDS = 100_000  # kept in memory for the summary


@dataclass(frozen=True)
class Record:
    """One compared call: its shape and what was found. Never holds what a tensor contains, lengths aside.

    Attributes:
        function: upstream's function. served, first: which implementation's result the caller got, and which ran first.
        batch, heads, q_len, q_tokens, ragged: the queries; q_len is the longest request's, q_tokens all requests'.
        page_size: keys of a page, 0 without a page table. capacity: keys the cache can hold of a request.
        kv_lens: keys of each request. dtype: of queries and caches; e4m3: the caches are in float8_e4m3fn instead.
        causal, softmax_scale, return_lse: as called. fused: whether both caches are views of one buffer.
        upstream_us, etap_us: device time of each, launch gaps included (on the CPU: wall time).
        late: the device waited for the host in one of them, so that its time holds host time.
        rmse, max_error: of the difference of the outputs; scale: root mean square of upstream's. lse_max_error: of the
            LSE, None where it was not asked for. not_finite: values that are finite in one of the outputs only.
    """

    function: str
    served: str
    first: str
    batch: int
    heads: int
    q_len: int
    q_tokens: int
    ragged: bool
    page_size: int
    capacity: int
    kv_lens: tuple[int, ...]
    dtype: str
    causal: bool
    softmax_scale: float
    return_lse: bool
    fused: bool
    upstream_us: float
    etap_us: float
    rmse: float
    max_error: float
    scale: float
    not_finite: int
    lse_max_error: float | None = None
    late: bool = False
    e4m3: bool = False


@dataclass(frozen=True)
class Summary:
    """What a session found so far. `str()` of it is for people.

    Attributes:
        seen, compared: calls that ETAP supports, and those among them that were compared.
        skipped: reason -> sampled calls that were not compared. failed: error -> comparisons that raised.
        upstream_us, etap_us: median times over the calls in which the implementation ran first, so that neither finds
            the cache warmed by the other; None where there is none.
        speedup: upstream's time over ETAP's, the median over calls; of both orders, whose bias cancels.
        late: calls whose times hold host time; the times above leave them out, unless there are no others.
        worst_relative_rmse: largest RMSE of a call over the root mean square of upstream's output.
        max_error: largest difference. not_finite: values finite in one of the outputs only, over all calls.
    """

    seen: int
    compared: int
    skipped: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    upstream_us: float | None = None
    etap_us: float | None = None
    speedup: float | None = None
    late: int = 0
    worst_relative_rmse: float | None = None
    max_error: float | None = None
    not_finite: int = 0

    def __str__(self) -> str:
        lines = [f"shadow mode: {self.compared} of {self.seen} calls compared"]
        if self.upstream_us and self.etap_us and self.speedup:
            times = f"upstream {self.upstream_us:.1f} us, ETAP {self.etap_us:.1f} us"
            lines.append(f"  median: {times}; upstream's time over ETAP's, call by call: {self.speedup:.2f}")
        if self.late:
            kept = "left out above" if self.late < self.compared else "so the times above hold the host's"
            lines.append(f"  the GPU waited for the host in {self.late} of them, {kept}")
        if self.worst_relative_rmse is not None:
            largest = f"{self.worst_relative_rmse:.1e} (RMS), {self.max_error:.1e} (one value)"
            lines.append(f"  outputs differ by at most {largest}")
        if self.not_finite:
            lines.append(f"  NOT FINITE in one of them only: {self.not_finite} values")
        lines += [f"  not compared: {count}: {reason}" for reason, count in sorted(self.skipped.items())]
        lines += [f"  FAILED: {count}: {reason}" for reason, count in sorted(self.failed.items())]
        return "\n".join(lines)


Span = tuple[Any, Any, bool]
"""The clock before and after a call, and whether the device waited for the host in between."""


@dataclass
class _Pending:
    """A comparison on its way from the device: what is known of the call, its figures, and how to read the times."""

    known: dict[str, Any]
    figures: Tensor
    lengths: Tensor | int
    times: dict[str, Callable[[], float]]
    late: bool
    arrived: Callable[[], bool]


class Session:
    """Compares a fraction of the calls that reach it; `shadow` makes and installs one. Safe between threads.

    Args:
        fraction: of calls to compare, 0 to 1. serve: whose result the caller gets, "upstream" or "etap".
        record: file to which each compared call is appended as one line of JSON; None: none.
        seed: of the sampling, which leaves Python's and torch's own random states alone.

    Raises ValueError for a fraction outside 0 to 1 or an unknown `serve`.
    """

    def __init__(
        self, fraction: float = 0.01, serve: str = "upstream", record: Path | None = None, seed: int | None = None
    ) -> None:
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
            raise ValueError(f"fraction: {fraction!r}, expected a number from 0 to 1")
        if serve not in IMPLEMENTATIONS:
            raise ValueError(f"serve: {serve!r}, expected {' or '.join(IMPLEMENTATIONS)}")
        self.fraction, self.serve, self.record = fraction, serve, record
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._seen = self._compared = self._turn = 0
        self._skipped: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._pending: deque[_Pending] = deque()
        self.records: deque[Record] = deque(maxlen=MAX_RECORDS)

    # -- the calls --------------------------------------------------------------------------------------------------

    def __call__(self, route: Any, engine: Any, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serves one call that ETAP supports, and compares it where the sampling says so."""

        def served() -> Any:
            if self.serve == "etap":
                routing.TALLY.dispatched()
                return engine.run(call)
            return route.original(*args, **kwargs)

        def other() -> Any:
            if self.serve == "etap":
                own_args, own_kwargs = _arguments_apart(engine, args, kwargs, call)
                return route.original(*own_args, **own_kwargs)
            if hasattr(engine, "run_apart"):
                return engine.run_apart(call)
            return engine.run(call if call.out is None else replace(call, out=torch.empty_like(call.out)))

        if not self._sampled(call):
            return served()
        names = (self.serve, "etap" if self.serve == "upstream" else "upstream")
        with self._lock:
            self._turn += 1
            first = self._turn % 2 == 0
        hidden = None
        if first:  # every other time, so that neither always finds the cache as the other left it
            hidden = self._guarded(other, call)
        clock = _clock(call)
        start = clock()
        result = served()  # the host's own: what it raises is the host's
        span = (start, clock(), _waited(start))
        if not first:
            hidden = self._guarded(other, call)
        if hidden is not None:
            outcomes = {names[0]: (result, span), names[1]: hidden}
            self._guarded(lambda: self._compare(route.label, call, names[1] if first else names[0], outcomes), call)
        return result

    def _sampled(self, call: Call) -> bool:
        with self._lock:
            self._seen += 1
            if self._random.random() >= self.fraction:
                return False
            if _capturing(call):
                self._skipped["inside a CUDA graph capture"] += 1
                return False
            if len(self._pending) >= MAX_PENDING:
                self._skipped["too many comparisons under way"] += 1
                return False
            return True

    def _guarded(self, run: Callable[[], Any], call: Call) -> tuple[Any, Span] | None:
        """The value of `run` and the clock around it; None where it raised, which is counted."""
        try:
            clock = _clock(call)
            start = clock()
            value = run()
            return value, (start, clock(), _waited(start))
        except Exception as failure:
            text = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
            with self._lock:
                self._failed[text] += 1
                new = self._failed[text] == 1
            if new:
                log.warning("shadow mode: %s; the caller is not affected", text)
            return None

    def _compare(self, label: str, call: Call, first: str, outcomes: dict[str, tuple[Any, Span]]) -> None:
        """Reduces the differences on the device and leaves them to arrive; collects what has arrived by now."""
        values = {name: value for name, (value, _) in outcomes.items()}
        figures = _figures(_parts(values["upstream"]), _parts(values["etap"]), call.cu_seqlens_q)
        lengths = call.cache_seqlens
        known = {
            "function": label,
            "served": self.serve,
            "first": first,
            "batch": call.batch,
            "heads": call.heads,
            "q_len": call.max_query,
            "q_tokens": call.q_rope.shape[0] * (1 if call.cu_seqlens_q is not None else call.q_rope.shape[1]),
            "ragged": call.cu_seqlens_q is not None,
            "page_size": 0 if call.page_table is None else call.k_cache.shape[1],
            "capacity": call.capacity,
            "dtype": str(call.q_rope.dtype).removeprefix("torch."),
            "e4m3": call.e4m3,
            "causal": bool(call.causal),
            "softmax_scale": float(call.softmax_scale),
            "return_lse": bool(call.return_lse),
            "fused": call.k_cache.untyped_storage().data_ptr() == call.v_cache.untyped_storage().data_ptr(),
        }
        on_host, arrived = _to_host(figures)
        lengths_on_host: Tensor | int = lengths if isinstance(lengths, int) else _to_host(lengths)[0]
        if figures.is_cuda:  # one event behind both copies
            event = torch.cuda.Event()
            event.record()
            arrived = event.query
        times = {name: _elapsed(start, stop) for name, (_, (start, stop, _)) in outcomes.items()}
        late = any(waited for _, (_, _, waited) in outcomes.values())
        with self._lock:
            self._pending.append(_Pending(known, on_host, lengths_on_host, times, late, arrived))
        self.collect()

    def collect(self, wait: bool = False) -> None:
        """Takes in the comparisons that have arrived; `wait`: all of them, synchronising."""
        while True:
            with self._lock:
                if not self._pending or not (wait or self._pending[0].arrived()):
                    return
                pending = self._pending.popleft()
            if wait and torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self._take(pending)

    def _take(self, pending: _Pending) -> None:
        square, scale, largest, not_finite, count, lse = pending.figures.tolist()
        lengths, known = pending.lengths, pending.known
        count = max(count, 1.0)
        found = Record(
            **known,
            kv_lens=(lengths,) * known["batch"] if isinstance(lengths, int) else tuple(lengths.tolist()),
            upstream_us=round(pending.times["upstream"](), 3),
            etap_us=round(pending.times["etap"](), 3),
            rmse=(square / count) ** 0.5,
            max_error=largest,
            scale=(scale / count) ** 0.5,
            not_finite=int(not_finite),
            lse_max_error=lse if known["return_lse"] else None,
            late=pending.late,
        )
        with self._lock:
            self._compared += 1
            self.records.append(found)
            if self.record is not None:
                with self.record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(found)) + "\n")

    # -- the findings -----------------------------------------------------------------------------------------------

    def summary(self) -> Summary:
        """What was found so far; waits for the comparisons under way."""
        try:
            self.collect(wait=True)
        except Exception as failure:  # a lost device, a full disk
            with self._lock:
                self._failed[f"{type(failure).__name__}: {failure}".splitlines()[0][:200]] += 1
        with self._lock:
            records = list(self.records)
            relative = [r.rmse / r.scale for r in records if r.scale > 0]

            timed = [r for r in records if not r.late] or records

            def median(name: str) -> float | None:
                times = [getattr(r, f"{name}_us") for r in timed if r.first == name]
                return statistics.median(times) if times else None

            ratios = {
                name: [r.upstream_us / r.etap_us for r in timed if r.first == name and r.etap_us > 0]
                for name in IMPLEMENTATIONS
            }
            speedup = None
            if all(ratios.values()):
                speedup = statistics.geometric_mean([statistics.median(both) for both in ratios.values()])
            return Summary(
                self._seen, self._compared, dict(self._skipped), dict(self._failed), median("upstream"), median("etap"),
                speedup, sum(r.late for r in records), max(relative, default=None),
                max((r.max_error for r in records), default=None), sum(r.not_finite for r in records),
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Pieces
# ---------------------------------------------------------------------------------------------------------------------


def _arguments_apart(
    engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any], call: Call
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's arguments with an output of their own in place of the caller's."""
    if hasattr(engine, "arguments_apart"):
        return engine.arguments_apart(args, kwargs)
    if call.out is None:
        return args, kwargs
    name, fresh = engine.normalise.interface.roles["out"], torch.empty_like(call.out)
    if name in kwargs:
        return args, {**kwargs, name: fresh}
    at = engine.normalise.positional.index(name)
    return (*args[:at], fresh, *args[at + 1 :]), kwargs


def _parts(result: Any) -> tuple[Tensor, Tensor | None]:
    """(output, LSE or None) of what an implementation returned. Raises TypeError where that is no tensor."""
    out, lse = (result[0], result[1]) if isinstance(result, (tuple, list)) else (result, None)
    if not isinstance(out, Tensor):
        raise TypeError(f"the result is {type(out).__name__}, not a tensor")
    return out, lse


def _figures(
    upstream: tuple[Tensor, Tensor | None], etap: tuple[Tensor, Tensor | None], cu_seqlens_q: Tensor | None
) -> Tensor:
    """float64 (6,) on the outputs' device: sums of squares of the difference and of upstream's output, the largest
    difference, values finite in one only, values compared, and the LSE's largest difference.

    Rows past the last request of a padded ragged batch belong to nobody and do not count. Raises ValueError where the
    shapes differ.
    """
    (a, a_lse), (b, b_lse) = upstream, etap
    if a.shape != b.shape:
        raise ValueError(f"the outputs have shapes {tuple(a.shape)} and {tuple(b.shape)}")
    x, y = a.float(), b.float()
    valid = torch.ones((), dtype=torch.bool, device=x.device)
    if cu_seqlens_q is not None:
        valid = (torch.arange(x.shape[0], device=x.device) < cu_seqlens_q[-1])[:, None, None]
    both = x.isfinite() & y.isfinite()
    one = (x.isfinite() ^ y.isfinite()) & valid
    difference = torch.where(both & valid, x - y, 0.0)
    scale = torch.where(both & valid, x, 0.0)
    lse = x.new_zeros(())
    if a_lse is not None and b_lse is not None and a_lse.shape == b_lse.shape:
        gap = (a_lse.float() - b_lse.float()).abs()  # (batch, heads, sq), (heads, total_q), FlashInfer (total_q, heads)
        ours = valid
        if cu_seqlens_q is not None:
            ours = valid[:, :, 0] if gap.shape == x.shape[:2] and x.shape[0] != x.shape[1] else valid[:, 0, 0]
        lse = torch.where(gap.isfinite() & ours, gap, 0.0).amax() if gap.numel() else lse
    largest = difference.abs().amax() if difference.numel() else lse.new_zeros(())
    counted = (both & valid).sum()
    parts = (difference.double().square().sum(), scale.double().square().sum(), largest, one.sum(), counted, lse)
    return torch.stack([part.double() for part in parts])


def _capturing(call: Call) -> bool:
    return bool(call.q_rope.is_cuda and torch.cuda.is_current_stream_capturing())


def _clock(call: Call) -> Callable[[], Any]:
    """Marks a point in time: an event on the current stream, or the host's clock in microseconds."""
    if not call.q_rope.is_cuda:
        return lambda: time.perf_counter_ns() / 1e3

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return mark


def _waited(start: Any) -> bool:
    """Whether the device has passed `start` by now, when the host has enqueued all that follows it."""
    return not isinstance(start, float) and bool(start.query())


def _elapsed(start: Any, stop: Any) -> Callable[[], float]:
    if isinstance(start, float):
        return lambda: stop - start
    return lambda: 1e3 * start.elapsed_time(stop)


def _to_host(value: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """A copy on the host, made without waiting, and whether it is there."""
    if not value.is_cuda:
        return value.clone(), lambda: True
    copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    copy.copy_(value, non_blocking=True)
    return copy, lambda: False


# ---------------------------------------------------------------------------------------------------------------------
# Starting
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def shadow(
    *targets: str,
    fraction: float = 0.01,
    serve: str = "upstream",
    record: str | Path | None = None,
    seed: int | None = None,
    **options: Any,
) -> Iterator[Session]:
    """Shadow mode for the length of a with block, in this process and all of its threads.

    Args:
        targets, options: as `patched` takes them. fraction, serve, record, seed: as `Session` does.

    Yields the session. Of nested blocks the innermost one's session sees the calls. Raises as both do.
    """
    session = Session(fraction, serve, None if record is None else Path(record), seed)
    with dispatch.patched(*targets, **options):
        before, routing.observer = routing.observer, session
        try:
            yield session
        finally:
            routing.observer = before


def settings_from(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """`Session`'s arguments from ETAP_SHADOW, ETAP_SHADOW_SERVE and ETAP_SHADOW_RECORD; None where it is off.

    Raises ValueError naming the variable.
    """
    text = environment.get("ETAP_SHADOW", "")
    if text in ("", "0"):
        return None
    try:
        fraction = float(text)
    except ValueError:
        fraction = -1.0
    if not 0 <= fraction <= 1:
        raise ValueError(f"ETAP_SHADOW: {text!r}, expected a fraction of calls, 0 to 1")
    serve = environment.get("ETAP_SHADOW_SERVE", "") or "upstream"
    if serve not in IMPLEMENTATIONS:
        raise ValueError(f"ETAP_SHADOW_SERVE: {serve!r}, expected {' or '.join(IMPLEMENTATIONS)}")
    record = environment.get("ETAP_SHADOW_RECORD", "")
    return {"fraction": fraction, "serve": serve, "record": Path(record) if record else None}


def start_from_environment() -> Session | None:
    """Starts the session that the environment asks for, once a process; its summary goes to stderr at exit."""
    if isinstance(routing.observer, Session):
        return routing.observer
    settings = settings_from(os.environ)
    if settings is None:
        return None
    routing.observer = session = Session(**settings)

    def tell() -> None:
        summary = session.summary()
        if summary.seen:
            print(f"etap: process {os.getpid()}: {summary}", file=sys.stderr)

    atexit.register(tell)
    return session
