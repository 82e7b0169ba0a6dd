"""The function that stands in for upstream's: decides, then calls the operator or the original."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from etap_integration.dispatch.calls import Call, Interface, Machine, Normaliser, machine_of
from etap_integration.dispatch.decision import (
    DEFAULT_MAX_ROWS,
    GRADIENTS,
    NOT_MLA,
    Limits,
    choose,
    neutral,
    refused_by_query,
    supports,
)
from etap_integration.dispatch.repeats import TENSORS, Facts, Repeats

log = logging.getLogger("etap_integration.dispatch")


class FallbackError(RuntimeError):
    """Strict mode: an MLA call that would have been left to upstream. The message has the reason and the call."""


@dataclass(frozen=True)
class Options:
    """What `enable` and `patched` take beside targets. `operator` and `machine` None: the real ones."""

    max_rows: int = DEFAULT_MAX_ROWS
    only_where_faster: bool = True
    strict: bool = False
    operator: Callable[..., Any] | None = None
    machine: Callable[[torch.device], Machine] | None = None


class Tally:
    """Counts of calls, by what became of them. Safe between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._etap = 0
        self._fallbacks: dict[str, int] = {}
        self._logged: set[tuple[str, str]] = set()

    def dispatched(self) -> None:
        """Counts a call that ran on ETAP."""
        with self._lock:
            self._etap += 1

    def fell_back(self, reason: str) -> None:
        """Counts a call left to upstream."""
        with self._lock:
            self._fallbacks[reason] = self._fallbacks.get(reason, 0) + 1

    def first(self, where: str, reason: str) -> bool:
        """True the first time only."""
        with self._lock:
            known = (where, reason) in self._logged
            self._logged.add((where, reason))
            return not known

    def known(self, where: str, reason: str) -> bool:
        """Whether `first` was asked about it already."""
        return (where, reason) in self._logged

    def read(self) -> tuple[int, dict[str, int]]:
        """Calls on ETAP, and those left to upstream by reason."""
        with self._lock:
            return self._etap, dict(self._fallbacks)

    def clear(self) -> None:
        """Sets everything to zero."""
        with self._lock:
            self._etap = 0
            self._fallbacks.clear()
            self._logged.clear()


TALLY = Tally()

# Takes the calls that would run on ETAP instead: (route, engine, call, args, kwargs) -> result. Shadow mode's session.
observer: Callable[..., Any] | None = None


class Engine:
    """Options made ready for the calls of one function."""

    def __init__(self, function: Callable[..., Any], interface: Interface, options: Options) -> None:
        from etap_integration import ops

        self.options = options
        self.operator: Callable[..., Any] = options.operator or ops.mla_decode
        # The real operator need not check again what it let through; ETAP_CHECK reads contents, so it goes on checking.
        self._checked: Callable[..., Any] | None = None
        if options.operator is None and not ops.checks_contents():
            self._checked = ops.mla_decode_checked
        self.normalise = Normaliser(function, interface, options.machine or machine_of, neutral)
        self.limits = Limits(options.max_rows, options.only_where_faster)
        self.repeats = Repeats(self.normalise)
        self.strict = options.strict
        self.after_lse = (None,) * interface.after_lse

    def run(self, call: Call) -> Any:
        """The operator on `call`; the result as upstream returns it."""
        return self._runner(call)(*(getattr(call, name) for name in TENSORS))

    def facts(self, call: Call, reason: str | None, ran: bool) -> Facts:
        """What holds for every call like `call`. reason: why ETAP cannot compute it; ran: it did, without an error."""
        if reason is not None:
            return Facts(reason)
        run = None
        if ran:
            run = self._runner(call) if self._checked is None else self._checked_runner(call, self._checked)
        return Facts(None, call.rows, call.batch, call.capacity, call.machine.sms, not call.e4m3, run)

    def _runner(self, call: Call) -> Callable[..., Any]:
        """Runs the operator on the tensors (`TENSORS`) of calls like `call`, none of which it keeps."""
        operator, scale, causal, return_lse = (
            self.operator,
            call.softmax_scale,
            bool(call.causal),
            bool(call.return_lse),
        )
        max_q = call.max_seqlen_q if call.cu_seqlens_q is not None else None
        num_ctas, after_lse = _num_ctas(call) or None, self.after_lse
        scaled = call.ckv_scale is not None or call.kpe_scale is not None

        def run(q, qv, k, v, out, ckv_scale, kpe_scale, table, lengths, cu, index):
            if scaled:
                ckv_scale, kpe_scale = _per_request(ckv_scale), _per_request(kpe_scale)
            result = operator(
                qv, q, v.squeeze(2), k.squeeze(2), table, lengths,  # views: one KV head
                cu_seqlens_q=cu, max_seqlen_q=max_q, softmax_scale=scale, causal=causal, out=out,
                return_lse=return_lse, num_ctas=num_ctas, ckv_scale=ckv_scale, kpe_scale=kpe_scale,
                cache_batch_idx=index,
            )  # fmt: skip
            return (*result, *after_lse) if return_lse else result

        return run

    def _checked_runner(self, call: Call, operator: Callable[..., Any]) -> Callable[..., Any]:
        """The same with `ops.mla_decode_checked`."""
        max_q, scale, causal = call.max_query, float(call.softmax_scale), bool(call.causal)
        num_ctas, after_lse, lse_shape = _num_ctas(call), self.after_lse, None
        if call.return_lse:
            ragged = call.cu_seqlens_q is not None
            lse_shape = (call.heads, call.q_nope.shape[0]) if ragged else (call.batch, call.heads, max_q)
        e4m3 = call.e4m3

        def run(q, qv, k, v, out, ckv_scale, kpe_scale, table, lengths, cu, index):
            rare = (_per_request(ckv_scale), _per_request(kpe_scale)) if e4m3 else ()
            result = operator(
                qv, q, v, k, table, lengths, cu, max_q, scale, causal, out, lse_shape, num_ctas, index, *rare
            )
            return result if lse_shape is None else (*result, *after_lse)

        return run


def _per_request(scale: Any) -> Any:
    """(batch,) of upstream's (batch, KV heads), as a view; the operator's other forms as they are."""
    return scale[:, 0] if isinstance(scale, torch.Tensor) and scale.dim() == 2 else scale


def _num_ctas(call: Call) -> int:
    """How many SMs the call may use; 0: all."""
    margin = call.others.get("sm_margin", 0)
    return max(1, call.machine.sms - margin) if margin else 0


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
    original, label = route.original, route.label
    dispatched, fell_back, known = TALLY.dispatched, TALLY.fell_back, TALLY.known

    @functools.wraps(original)
    def routed(*args: Any, **kwargs: Any) -> Any:
        engine = route.engine
        if engine is None or torch.compiler.is_compiling():
            return original(*args, **kwargs)
        if len(args) <= qv_index and kwargs.get(qv_name) is None:  # the bulk of an engine's other calls
            fell_back(NOT_MLA)
            return original(*args, **kwargs)
        form = engine.repeats.form(args, kwargs) if observer is None else None
        if form is not None:
            values = [*args, *kwargs.values(), None]
            known_call = form.recall(values)
            if known_call is not None:
                facts, tensors = known_call
                reason = facts.reason
                if reason is None and facts.measured and engine.limits.only_where_faster:
                    reason = form.slower(values, facts)
                if reason is None and facts.run is not None:
                    dispatched()
                    return facts.run(*tensors)
                if reason is not None and known(label, reason) and not engine.strict:
                    fell_back(reason)
                    return original(*args, **kwargs)
        return _decide(route, engine, args, kwargs)

    routed.__etap_route__ = route  # type: ignore[attr-defined]
    return routed


def _decide(route: Route, engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The long way of a call: the first of its kind, or one of a kind that cannot be remembered."""
    call = engine.normalise(args, kwargs)
    ran, result = False, None
    supported, reason = supports(call, engine.limits)
    if supported and (not engine.limits.only_where_faster or choose(call)[0]):
        if observer is not None:
            return observer(route, engine, call, args, kwargs)
        TALLY.dispatched()
        ran, result = True, engine.run(call)
    if not supported or ran:
        facts = engine.facts(call, None if supported else reason, ran)
    else:
        reason = choose(call)[1]
        facts = engine.facts(call, None, ran)
    if reason != GRADIENTS:  # which come and go at the same shapes
        by_query = not ran and refused_by_query(call, engine.limits)
        engine.repeats.remember(call, args, kwargs, Facts(reason) if by_query else facts, by_query)
    if ran:
        return result
    TALLY.fell_back(reason)
    _explain(route.label, reason, call, engine.strict)
    return route.original(*args, **kwargs)


def _explain(label: str, reason: str, call: Call, strict: bool) -> None:
    if reason == NOT_MLA:
        return
    if strict:
        raise FallbackError(f"{label}: {reason}: {call.describe()}")
    if TALLY.first(label, reason):
        log.info("%s left to upstream (logged once): %s: %s", label, reason, call.describe())
