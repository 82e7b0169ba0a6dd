"""Timing of several kernels side by side, with a cold or a warm L2 cache.

A sample is the time between two CUDA events around one call, in microseconds: launch, every kernel of the call and
the gaps between them. Before each call a kernel that overwrites a buffer larger than the L2 cache runs outside the
timed span, so that the call finds none of its inputs cached; this is what `triton.testing.do_bench` does. With a warm
cache that kernel is left out, and the call finds what its own last run left there.

The calls of one problem take turns in rounds, A B C A B C, starting with another one each round: drifting clocks and
memory refresh then touch all of them alike.

The host enqueues ahead of the device. A sample whose span began before the host had enqueued all of its call may hold
time of the host; such late samples are dropped where enough others remain, and their share is reported. Behind each the
device idles for a while, so that the host is ahead again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Sample:
    """Quantiles of the samples of one call, in microseconds.

    Attributes:
        median_us, p20_us, p80_us: the quantiles.
        count: samples that went into them.
        late: share of late samples among all that were taken.
    """

    median_us: float
    p20_us: float
    p80_us: float
    count: int
    late: float = 0.0

    @classmethod
    def of(cls, on_time_us: Sequence[float], late_us: Sequence[float] = ()) -> Sample:
        """Summarises raw samples (microseconds, any order); late ones count only where they are the majority."""
        kept = [*on_time_us, *late_us] if len(late_us) > len(on_time_us) else on_time_us
        ordered = sorted(kept)
        late = len(late_us) / max(1, len(on_time_us) + len(late_us))
        return cls(quantile(ordered, 0.5), quantile(ordered, 0.2), quantile(ordered, 0.8), len(ordered), late)

    def over(self, calls: int) -> Sample:
        """Of one call, where each sample is the time of `calls`."""
        return replace(self, **{name: getattr(self, name) / calls for name in ("median_us", "p20_us", "p80_us")})


def quantile(ordered: Sequence[float], q: float) -> float:
    """The `q` quantile of ascending values, interpolated linearly."""
    if not ordered:
        raise ValueError("no samples")
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Budget:
    """How long to time one call.

    Attributes:
        span_ms: device time to spend on one call of one problem, flushes included, in milliseconds.
        rounds: turns each call gets.
        min_samples, max_samples: bounds of the sample count.
    """

    span_ms: float = 40.0
    rounds: int = 8
    min_samples: int = 16
    max_samples: int = 400

    def samples_per_round(self, cost_us: float) -> int:
        """Calls in one turn, for a call that takes `cost_us` microseconds, its flush included."""
        samples = min(max(1e3 * self.span_ms / cost_us, self.min_samples), self.max_samples)
        return max(1, round(samples / self.rounds))


@dataclass(frozen=True)
class _Span:
    """The events around one call, and whether the device reached the first before the host had enqueued the last."""

    start: torch.cuda.Event
    stop: torch.cuda.Event
    late: bool

    @property
    def us(self) -> float:
        return 1e3 * self.start.elapsed_time(self.stop)


class Timer:
    """Times calls on the current CUDA device and stream.

    Args:
        budget: how long to time each call.
        flush_bytes: size of the buffer that is overwritten before each call; must exceed the L2 cache (H200: 60 MB).
            0: it is not flushed, and calls find a warm cache.
    """

    # The device idles this many clock cycles (about 1 ms) at the start of a round and behind a late sample, so that the
    # host runs ahead of it and no launch delay of the host falls between two events.
    _HEAD_START_CYCLES = 2_000_000

    def __init__(self, budget: Budget | None = None, flush_bytes: int = 256 << 20) -> None:
        self.budget = budget or Budget()
        self._flush_buffer = torch.empty(flush_bytes // 4, dtype=torch.int32, device="cuda")

    def with_warm_cache(self) -> Timer:
        """The same without the flush."""
        return Timer(self.budget, flush_bytes=0)

    def _enqueue(self, call: Call, samples: int, wait_for_host: bool = True) -> list[_Span]:
        spans: list[_Span] = []
        for _ in range(samples):
            if wait_for_host and spans and spans[-1].late:
                torch.cuda._sleep(self._HEAD_START_CYCLES)
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if self._flush_buffer.numel():
                self._flush_buffer.zero_()
            start.record()
            call()
            stop.record()
            spans.append(_Span(start, stop, late=start.query()))
        return spans

    def _cost_us(self, call: Call, calls: int = 3) -> float:
        """Microseconds of one flush and call, after two calls that warm up."""
        self._enqueue(call, 2)
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self._enqueue(call, calls, wait_for_host=False)
        end.record()
        torch.cuda.synchronize()
        return 1e3 * begin.elapsed_time(end) / calls

    def interleaved(self, calls: Mapping[str, Call]) -> dict[str, Sample]:
        """Times every call of `calls` in turns; returns a `Sample` under each name."""
        return {
            name: Sample.of([s.us for r in taken for s in r if not s.late], [s.us for r in taken for s in r if s.late])
            for name, taken in self._rounds(calls).items()
        }

    def rounds(self, calls: Mapping[str, Call]) -> dict[str, list[list[float]]]:
        """Times every call of `calls` in turns; under each name the samples of each round, in microseconds."""
        return {name: [[s.us for s in turn] for turn in taken] for name, taken in self._rounds(calls).items()}

    def _rounds(self, calls: Mapping[str, Call]) -> dict[str, list[list[_Span]]]:
        names = list(calls)
        per_round = {name: self.budget.samples_per_round(self._cost_us(calls[name])) for name in names}
        spans: dict[str, list[list[_Span]]] = {name: [] for name in names}
        for turn in range(self.budget.rounds):
            first = turn % len(names)
            torch.cuda._sleep(self._HEAD_START_CYCLES)
            for name in names[first:] + names[:first]:
                spans[name].append(self._enqueue(calls[name], per_round[name]))
            torch.cuda.synchronize()
        return spans


class HostTimer:
    """Times calls that run on the host, by its clock: no GPU, no cache to flush. As `Timer.rounds`."""

    def __init__(self, rounds: int = 8, samples: int = 3) -> None:
        self._rounds, self._samples = rounds, samples

    def rounds(self, calls: Mapping[str, Call]) -> dict[str, list[list[float]]]:
        """Times every call of `calls` in turns; under each name the samples of each round, in microseconds."""
        names = list(calls)
        found: dict[str, list[list[float]]] = {name: [] for name in names}
        for turn in range(self._rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                taken = []
                for _ in range(self._samples):
                    start = time.perf_counter_ns()
                    calls[name]()
                    taken.append((time.perf_counter_ns() - start) / 1e3)
                found[name].append(taken)
        return found


def captured(call: Call, calls: int = 1) -> Call:
    """Captures one call in a CUDA graph, or several back to back, and returns the graph's replay."""
    side = torch.cuda.Stream()  # the call warms up where it is captured, so that what it allocates once is there
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(calls):
            call()
    return graph.replay
