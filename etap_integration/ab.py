"""A/B: an installed upstream function against the same function on ETAP, on the same tensors, in one process.

    cases(...)     problems of a grid, or of a recorded workload (see `etap_integration.shadowing`)
    arms(...)      the two callables: "monkeypatch" routes the function at run time, "patched" uses a rebuilt extension
    compare(...)   correctness against fp64 first, then interleaved times, then a verdict

The verdict goes by the ratio of medians, round by round: it says "no difference" unless the interval that holds the
true median ratio with 97.9% (with ten rounds, the second to the ninth) lies more than 1% to one side of 1.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from etap_integration import costmodel, dispatch, numerics
from etap_integration.dispatch.targets import TARGETS
from etap_integration.timing import Budget, HostTimer, Timer, captured

K = 1024
ARMS = ("monkeypatch", "patched")
MODES, CACHES = ("eager", "graph"), ("cold", "warm")
ROUNDS = 10
MARGIN = 0.01  # a difference below this is none
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class AbError(RuntimeError):
    """A comparison that cannot be made here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One call to compare on: shapes and lengths, no contents. `count`: how often it stands in a workload.

    Attributes:
        kv_lens: keys of each request. heads, q_len, q_tokens: query heads, tokens of the longest request and of all.
        ragged: whether queries come as (total_q, heads, width). page_size: keys of a page.
        dtype: a key of `DTYPES`. fused: both caches as views of one buffer.
    """

    kv_lens: tuple[int, ...]
    heads: int = 16
    q_len: int = 1
    q_tokens: int = 0
    ragged: bool = False
    page_size: int = 64
    dtype: str = "bfloat16"
    causal: bool = True
    softmax_scale: float = 576**-0.5
    return_lse: bool = True
    fused: bool = True
    count: int = 1

    @property
    def batch(self) -> int:
        """Requests."""
        return len(self.kv_lens)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache that have to be read."""
        return sum(self.kv_lens) * 576 * 2

    def query_lengths(self) -> list[int]:
        """Query tokens of each request: the longest first, until all tokens are dealt."""
        left, dealt = self.q_tokens or self.batch * self.q_len, []
        for _ in range(self.batch):
            dealt.append(min(self.q_len, left))
            left -= dealt[-1]
        return dealt if self.ragged else [self.q_len] * self.batch

    def __str__(self) -> str:
        low, high = min(self.kv_lens, default=0), max(self.kv_lens, default=0)
        keys = f"{low}" if low == high else f"{low}–{high}"
        return f"b={self.batch} kv={keys} h={self.heads} q={self.q_len} page={self.page_size} {self.dtype}"


def grid(name: str) -> list[Case]:
    """The cases of a grid: `small` (4), `decode` (24) or `shapes` (heads, query tokens and pages varied, 18).

    Raises ValueError naming those there are.
    """
    if name == "small":
        return [Case((n,) * b) for b, n in ((1, 8 * K), (16, K), (16, 8 * K), (16, 64 * K))]
    if name == "decode":
        return [Case((n,) * b) for b in (1, 16, 64) for n in (512, K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K)]
    if name == "shapes":
        combinations = itertools.product(((8, 1), (16, 1), (32, 1), (16, 2), (64, 1), (128, 1)), (1, 16, 64))
        return [Case((4 * K,) * 16, heads=h, q_len=q, page_size=page) for (h, q), page in combinations]
    raise ValueError(f"grid: {name!r} is unknown; there are small, decode, shapes")


def read_workload(path: Path) -> list[Case]:
    """The distinct cases of a file that shadow mode recorded, the most frequent first.

    Raises ValueError naming file and line where one is no record of a call.
    """
    names = {f.name for f in fields(Case)} - {"count"}
    counted: Counter[Case] = Counter()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            if values.get("e4m3"):
                raise ValueError("an e4m3 cache, which is not compared here")
            chosen = {name: values[name] for name in names}
            lengths = tuple(int(n) for n in chosen.pop("kv_lens"))
            if chosen["dtype"] not in DTYPES or not lengths or min(lengths) < 0:
                raise ValueError(f"dtype {chosen['dtype']!r} or kv_lens {lengths[:4]}")
            chosen["page_size"] = chosen["page_size"] or 64  # unpaged: compared with pages
            counted[Case(lengths, **chosen)] += 1
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: no recorded call: {type(error).__name__}: {error}") from error
    return [Case(**{**_shallow(case), "count": count}) for case, count in counted.most_common()]


def _shallow(case: Case) -> dict[str, Any]:
    return {f.name: getattr(case, f.name) for f in fields(case)}


# ---------------------------------------------------------------------------------------------------------------------
# Tensors and arms
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Inputs:
    """A case's tensors under `dispatch.Call`'s names, normal values from a seed, pages shuffled."""

    case: Case
    q_rope: Tensor
    q_nope: Tensor
    k_cache: Tensor
    v_cache: Tensor
    page_table: Tensor
    cache_seqlens: Tensor
    cu_seqlens_q: Tensor | None

    @classmethod
    def build(cls, case: Case, device: torch.device | str, seed: int = 0) -> Inputs:
        """Allocates and fills the tensors on `device`."""
        generator = torch.Generator(device).manual_seed(seed)
        dtype, size = DTYPES[case.dtype], case.page_size
        pages = [-(-n // size) for n in case.kv_lens]
        total, width = max(1, sum(pages)), max(1, *pages)
        kv = torch.randn(total, size, 1, 576, generator=generator, device=device).to(dtype)
        order = torch.randperm(total, generator=generator, device=device, dtype=torch.int32)
        table = torch.zeros(case.batch, width, dtype=torch.int32, device=device)
        first = 0
        for i, n in enumerate(pages):
            table[i, :n] = order[first : first + n]
            first += n
        q_lens = case.query_lengths()
        shape = (sum(q_lens), case.heads) if case.ragged else (case.batch, case.q_len, case.heads)
        q = torch.randn(*shape, 576, generator=generator, device=device).to(dtype)
        k, v = kv[..., 512:], kv[..., :512]
        if not case.fused:
            k, v = k.contiguous(), v.contiguous()
        ends = torch.tensor([0, *itertools.accumulate(q_lens)], dtype=torch.int32, device=device)
        lengths = torch.tensor(case.kv_lens, dtype=torch.int32, device=device)
        return cls(case, q[..., 512:], q[..., :512], k, v, table, lengths, ends if case.ragged else None)

    def reference(self) -> tuple[Tensor, Tensor]:
        """Output and LSE in fp64, as `numerics.reference` lays them out."""
        return numerics.reference(
            self.q_nope, self.q_rope, self.v_cache[:, :, 0], self.k_cache[:, :, 0], self.page_table, self.case.kv_lens,
            cu_seqlens_q=self.cu_seqlens_q, softmax_scale=self.case.softmax_scale, causal=self.case.causal,
        )  # fmt: skip


Function = Callable[..., Any]


@dataclass(frozen=True)
class Arms:
    """Both sides: functions with upstream's signature, and how to name a case's tensors for them."""

    name: str
    target: str
    upstream: Function
    etap: Function
    arguments: Callable[[Inputs], dict[str, Any]]


def installed_targets() -> list[str]:
    """The dispatch targets that can be imported here and compared: functions, not FlashInfer's wrapper."""
    found = []
    for name, target in TARGETS.items():
        if not hasattr(target, "functions"):
            continue
        with contextlib.suppress(dispatch.TargetError):
            target.load()
            found.append(name)
    return found


def _arguments(target: str, function: Function) -> Callable[[Inputs], dict[str, Any]]:
    """How `function` of `target` wants its arguments, by the interface that the dispatch knows it by."""
    name = TARGETS[target].required
    roles = TARGETS[target].functions[name].roles
    varlen = "varlen" in name

    def arguments(x: Inputs) -> dict[str, Any]:
        if varlen and x.cu_seqlens_q is None:  # such a function takes ragged queries alone
            q_lens = torch.arange(x.case.batch + 1, dtype=torch.int32, device=x.q_rope.device) * x.case.q_len
            q_rope, q_nope, ends = x.q_rope.flatten(0, 1), x.q_nope.flatten(0, 1), q_lens
        else:
            q_rope, q_nope, ends = x.q_rope, x.q_nope, x.cu_seqlens_q
        values = {
            "q_rope": q_rope, "q_nope": q_nope, "k_cache": x.k_cache, "v_cache": x.v_cache,
            "page_table": x.page_table, "cache_seqlens": x.cache_seqlens, "softmax_scale": x.case.softmax_scale,
            "causal": x.case.causal, "return_lse": x.case.return_lse,
        }  # fmt: skip
        if ends is not None:
            values |= {"cu_seqlens_q": ends, "max_seqlen_q": x.case.q_len}
        named = {roles[role]: value for role, value in values.items() if role in roles}
        if varlen:
            named["max_seqlen_k"] = max(x.case.kv_lens)
        if target.startswith("vllm."):
            named["fa_version"] = 3
        return named

    return arguments


@contextlib.contextmanager
def arms(target: str, how: str = "monkeypatch", **options: Any) -> Iterator[Arms]:
    """Both sides of `target`'s required function.

    Args:
        target: a dispatch target. how: "monkeypatch", or "patched": an extension rebuilt with ETAP's patches, switched
            between upstream's kernels and ETAP's. options: as `dispatch.patched` takes them.

    Raises AbError where the extension is not a patched one, TargetError where the target is not installed, ValueError
    for an unknown `how`.
    """
    if target in TARGETS and not hasattr(TARGETS[target], "functions"):
        raise AbError(f"{target}: a class, which `python -m tools.bench run --impl flashinfer-etap` compares, not A/B")
    name = TARGETS[target].required if target in TARGETS else ""
    if how == "monkeypatch":
        with dispatch.patched(target, strict=True, only_where_faster=False, **options):
            import sys

            routed = getattr(sys.modules[target], name)
            original = routed.__wrapped__
            yield Arms(how, target, original, routed, _arguments(target, original))
    elif how == "patched":
        function = getattr(TARGETS[target].load(), name)
        switch = _switch()

        def switched(mode: int) -> Function:
            def call(**arguments: Any) -> Any:
                before = switch(mode)
                try:
                    return function(**arguments)
                finally:
                    switch(before)

            return call

        yield Arms(how, target, switched(2), switched(1), _arguments(target, function))
    else:
        raise ValueError(f"how: {how!r}, expected {' or '.join(ARMS)}")


def _switch() -> Callable[[int], int]:
    """`etap_fa3_set_mode` of the installed extension: 0 auto, 1 always, 2 never; returns the mode before."""
    try:
        import flash_attn_3._C as extension
    except ImportError as error:
        raise AbError(f"no FlashAttention-3 extension to switch: {error}") from None
    try:
        return ctypes.CDLL(extension.__file__).etap_fa3_set_mode
    except AttributeError:
        raise AbError("the installed FlashAttention-3 extension was not built with ETAP's patches") from None


# ---------------------------------------------------------------------------------------------------------------------
# Comparing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Errors:
    """Of one result against fp64: RMSE and largest error of the output, largest of the LSE (None: not returned)."""

    rmse: float
    max_error: float
    lse_max_error: float | None


@dataclass(frozen=True)
class Timing:
    """One case in one mode, with one state of the cache. Times are medians in µs.

    ratio: upstream's time over ETAP's, with the interval (low, high) that the verdict goes by. spread: distance of the
    20% and 80% quantiles over the median, for each side. floor_us: the memory floor, measured or by the cost model.
    """

    mode: str
    cache: str
    upstream_us: float
    etap_us: float
    ratio: float
    low: float
    high: float
    spread: tuple[float, float]
    floor_us: float
    floor: str
    verdict: str


@dataclass
class Outcome:
    """What became of one case. `left`: why it was not run on ETAP. `wrong`: why ETAP's result is not accepted."""

    case: Case
    left: str | None = None
    wrong: str | None = None
    upstream: Errors | None = None
    etap: Errors | None = None
    timings: list[Timing] = field(default_factory=list)


class Rounds(Protocol):
    """What a timer is to `compare`."""

    def rounds(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, list[list[float]]]: ...


def errors(result: Any, exact: tuple[Tensor, Tensor]) -> Errors:
    """Distance of what a function returned from the fp64 reference; not finite counts as infinitely far.

    Raises TypeError or ValueError where the result is no tensor, or of another shape.
    """
    out, lse = (result[0], result[1]) if isinstance(result, (tuple, list)) else (result, None)
    if not isinstance(out, Tensor):
        raise TypeError(f"the result is {type(out).__name__}, not a tensor")
    if out.numel() != exact[0].numel():
        raise ValueError(f"the output has shape {tuple(out.shape)}, expected {tuple(exact[0].shape)}")
    difference = (out.double().reshape(exact[0].shape) - exact[0]).abs()
    finite = bool(difference.isfinite().all())
    rmse = difference.square().mean().sqrt().item() if finite else math.inf
    worst = None
    if lse is not None:
        ours = lse.double()
        theirs = exact[1] if ours.shape == exact[1].shape else exact[1].transpose(0, 1).reshape(ours.shape)
        gap = torch.where(ours == theirs, 0.0, (ours - theirs).abs())
        worst = gap.amax().item() if bool(gap.isfinite().all()) else math.inf
    return Errors(rmse, difference.amax().item() if finite else math.inf, worst)


def judged(ours: Errors, theirs: Errors) -> str | None:
    """Why ETAP's errors are not acceptable beside upstream's, or None: at most twice its RMSE, 4 times its largest."""
    if not math.isfinite(ours.max_error):
        return "the output is not finite"
    if ours.rmse > 2 * theirs.rmse + 1e-5:
        return f"RMSE {ours.rmse:.2e}, upstream's is {theirs.rmse:.2e}"
    if ours.max_error > 4 * theirs.max_error + 1e-4:
        return f"largest error {ours.max_error:.2e}, upstream's is {theirs.max_error:.2e}"
    if ours.lse_max_error is not None and ours.lse_max_error > 4 * (theirs.lse_max_error or 0) + 1e-3:
        return f"LSE off by {ours.lse_max_error:.2e}"
    return None


def ratio_interval(upstream: Sequence[Sequence[float]], etap: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """(median, low, high) of the rounds' ratios of medians, upstream over ETAP.

    The interval leaves out the smallest and the largest ratio where there are eight rounds or more: by the binomial
    distribution it then holds the true median with 93% (eight rounds) to 97.9% (ten), whatever the noise is like.
    """
    ratios = sorted(statistics.median(a) / statistics.median(b) for a, b in zip(upstream, etap, strict=True))
    cut = 1 if len(ratios) >= 8 else 0
    return statistics.median(ratios), ratios[cut], ratios[-1 - cut]


def verdict(low: float, high: float, margin: float = MARGIN) -> str:
    """ "faster", "slower" or "no difference", of ETAP."""
    if low > 1 + margin:
        return "faster"
    return "slower" if high < 1 - margin else "no difference"


def timer_for(device: torch.device, cache: str, span_ms: float) -> Rounds:
    """The timer of a device; on the CPU the cache's state makes no difference."""
    if device.type != "cuda":
        return HostTimer(ROUNDS)
    return Timer(Budget(span_ms=span_ms, rounds=ROUNDS), flush_bytes=(256 << 20) if cache == "cold" else 0)


def _spread(rounds: Sequence[Sequence[float]]) -> float:
    ordered = sorted(sample for taken in rounds for sample in taken)
    cuts = statistics.quantiles(ordered, n=5, method="inclusive")
    return (cuts[-1] - cuts[0]) / statistics.median(ordered)


def compare(
    case: Case,
    sides: Arms,
    device: torch.device | str,
    *,
    modes: Sequence[str] = ("eager",),
    caches: Sequence[str] = ("cold",),
    span_ms: float = 20.0,
    floor: Callable[[Case], tuple[float, str]] | None = None,
    timer: Callable[[torch.device, str, float], Rounds] = timer_for,
) -> Outcome:
    """Runs one case: both results against fp64, then, if ETAP's is right, every mode and state of the cache.

    Args:
        modes: of `MODES`; "graph" times one replay of a captured CUDA graph, and takes a GPU. caches: of `CACHES`.
        span_ms: device time for each side of each timing, in milliseconds.
        floor: case -> (memory floor in µs, how it is known); by default the cost model's.

    Returns an Outcome; what ETAP left to upstream and what it got wrong is in there, not raised.
    """
    device = torch.device(device)
    outcome, inputs = Outcome(case), Inputs.build(case, device)
    arguments = sides.arguments(inputs)
    upstream, etap = (lambda f=f: f(**arguments) for f in (sides.upstream, sides.etap))
    exact = inputs.reference()
    outcome.upstream = errors(upstream(), exact)
    try:
        outcome.etap = errors(etap(), exact)
    except dispatch.FallbackError as reason:
        outcome.left = str(reason).split(": ")[1]
        return outcome
    except (RuntimeError, TypeError, ValueError) as failure:
        outcome.wrong = f"{type(failure).__name__}: {failure}".splitlines()[0]
        return outcome
    outcome.wrong = judged(outcome.etap, outcome.upstream)
    if outcome.wrong:
        return outcome
    floor_us, known = (floor or modelled_floor)(case)
    for mode, cache in itertools.product(modes, caches):
        calls: dict[str, Callable[[], object]] = {"upstream": upstream, "etap": etap}
        if mode == "graph":
            calls = {name: captured(call) for name, call in calls.items()}
        rounds = timer(device, cache, span_ms).rounds(calls)
        ratio, low, high = ratio_interval(rounds["upstream"], rounds["etap"])
        medians = {name: statistics.median([s for taken in r for s in taken]) for name, r in rounds.items()}
        spread = (_spread(rounds["upstream"]), _spread(rounds["etap"]))
        outcome.timings.append(Timing(
            mode, cache, medians["upstream"], medians["etap"], ratio, low, high, spread, floor_us, known,
            verdict(low, high),
        ))  # fmt: skip
    return outcome


def modelled_floor(case: Case) -> tuple[float, str]:
    """The cost model's memory floor on the first GPU (without one, on an H200), with a cold cache."""
    gpu = costmodel.GPUS["h200"]
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        gpu = costmodel.gpu_of(p.name, p.multi_processor_count)
    mean = round(sum(case.kv_lens) / case.batch)
    return costmodel.floor_us(costmodel.Problem(case.batch, mean), gpu), f"modelled, {gpu.name}"


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts by verdict, and for each mode and state of the cache ETAP's overall speed-up.

    overall: total time of upstream over total time on ETAP, each case counted as often as the workload had it.
    """
    found: dict[str, Any] = {
        "cases": len(outcomes),
        "left_to_upstream": sum(o.left is not None for o in outcomes),
        "wrong": sum(o.wrong is not None for o in outcomes),
        "by": {},
    }
    for o in outcomes:
        for t in o.timings:
            entry = found["by"].setdefault(
                f"{t.mode}, {t.cache} cache", {"faster": 0, "slower": 0, "no difference": 0, "upstream_us": 0.0,
                                               "etap_us": 0.0},
            )  # fmt: skip
            entry[t.verdict] += 1
            entry["upstream_us"] += t.upstream_us * o.case.count
            entry["etap_us"] += t.etap_us * o.case.count
    for entry in found["by"].values():
        entry["overall"] = entry["upstream_us"] / entry["etap_us"]
    return found
