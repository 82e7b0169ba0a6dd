"""The function that stands in for upstream's: decides, then calls the operator or the original."""

from __future__ import annotations

import functools
import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from etap_integration.dispatch.calls import Call, Interface, Machine, Normaliser, machine_of
from etap_integration.dispatch.decision import DEFAULT_MAX_ROWS, NOT_MLA, Decider, Limits, neutral

log = logging.getLogger("etap_integration.dispatch")


class FallbackError(RuntimeError):
    """Strict mode: an MLA call that would have been left to upstream. The message has the reason and the call."""


@dataclass(frozen=True)
class Options:
    """What `enable` and `patched` take beside targets. `operator` and `machine` None: the real ones."""

    max_rows: int = DEFAULT_MAX_ROWS
    strict: bool = False
    operator: Callable[..., Any] | None = None
    machine: Callable[[torch.device], Machine] | None = None


class Tally:
    """Counts of calls, by what became of them. Safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._etap = 0
        self._fallbacks: Counter[str] = Counter()
        self._logged: set[tuple[str, str]] = set()

    def dispatched(self) -> None:
        with self._lock:
            self._etap += 1

    def fell_back(self, reason: str) -> None:
        with self._lock:
            self._fallbacks[reason] += 1

    def first(self, where: str, reason: str) -> bool:
        """True the first time only."""
        with self._lock:
            known = (where, reason) in self._logged
            self._logged.add((where, reason))
            return not known

    def read(self) -> tuple[int, dict[str, int]]:
        with self._lock:
            return self._etap, dict(self._fallbacks)

    def clear(self) -> None:
        with self._lock:
            self._etap = 0
            self._fallbacks.clear()
            self._logged.clear()


TALLY = Tally()


class Engine:
    """Options made ready for the calls of one function."""

    def __init__(self, function: Callable[..., Any], interface: Interface, options: Options) -> None:
        operator = options.operator
        if operator is None:
            from etap_integration.ops import mla_decode as operator
        self.options = options
        self.operator: Callable[..., Any] = operator
        self.normalise = Normaliser(function, interface, options.machine or machine_of, neutral)
        self.decide = Decider(Limits(options.max_rows))
        self.strict = options.strict
        self.after_lse = (None,) * interface.after_lse

    def run(self, call: Call) -> Any:
        """The operator on `call`; the result as upstream returns it."""
        ragged = call.cu_seqlens_q is not None
        margin = call.others.get("sm_margin", 0)
        result = self.operator(
            call.q_nope,
            call.q_rope,
            call.v_cache.squeeze(2),  # views: one KV head
            call.k_cache.squeeze(2),
            call.page_table,
            call.cache_seqlens,
            cu_seqlens_q=call.cu_seqlens_q,
            max_seqlen_q=call.max_seqlen_q if ragged else None,
            softmax_scale=call.softmax_scale,
            causal=bool(call.causal),
            out=call.out,
            return_lse=bool(call.return_lse),
            num_ctas=max(1, call.machine.sms - margin) if margin else None,
        )
        return (*result, *self.after_lse) if call.return_lse else result


class Route:
    """One upstream function and its stand-in `wrapper`, which passes everything on while `engine` is None."""

    def __init__(self, label: str, original: Callable[..., Any], interface: Interface) -> None:
        """Raises UnknownSignature where `original` is not the function that `interface` describes."""
        self.label, self.original, self.interface = label, original, interface
        self.engine: Engine | None = None
        shape = Normaliser(original, interface)
        self.make_engine = functools.partial(Engine, original, interface)
        self.wrapper = _wrap(self, shape.qv_name, shape.qv_index)


def _wrap(route: Route, qv_name: str, qv_index: int) -> Callable[..., Any]:
    original, dispatched, fell_back = route.original, TALLY.dispatched, TALLY.fell_back

    @functools.wraps(original)
    def routed(*args: Any, **kwargs: Any) -> Any:
        engine = route.engine
        if engine is None or torch.compiler.is_compiling():
            return original(*args, **kwargs)
        if len(args) <= qv_index and kwargs.get(qv_name) is None:  # the bulk of an engine's other calls
            fell_back(NOT_MLA)
            return original(*args, **kwargs)
        call = engine.normalise(args, kwargs)
        reason = engine.decide(call)
        if reason is None:
            dispatched()
            return engine.run(call)
        fell_back(reason)
        _explain(route.label, reason, call, engine.strict)
        return original(*args, **kwargs)

    routed.__etap_route__ = route  # type: ignore[attr-defined]
    return routed


def _explain(label: str, reason: str, call: Call, strict: bool) -> None:
    if reason == NOT_MLA:
        return
    if strict:
        raise FallbackError(f"{label}: {reason}: {call.describe()}")
    if TALLY.first(label, reason):
        log.info("%s left to upstream (logged once): %s: %s", label, reason, call.describe())
