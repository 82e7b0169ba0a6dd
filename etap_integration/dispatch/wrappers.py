"""Routing FlashInfer's `BatchMLAPagedAttentionWrapper`: a class with `plan` and `run`, where the others are functions.

`plan` is followed to learn the batch, `run` is decided on. FlashInfer's page table is a list of pages per request, one
after the other; the operator takes a rectangular one, made once a plan. A wrapper whose module is a patched one (see
etap_integration.flashinfer) is left alone: that module decides, and counts, itself; its switch follows ours.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from etap_integration.dispatch import routing
from etap_integration.dispatch.bindings import Replacement
from etap_integration.dispatch.calls import Call, machine_of
from etap_integration.dispatch.decision import D_LATENT, D_ROPE, Limits, decide
from etap_integration.dispatch.routing import TALLY, FallbackError, Options, log
from etap_integration.dispatch.targets import TARGETS, TargetError
from etap_integration.flashinfer import jit, switch

WRAPPER = "BatchMLAPagedAttentionWrapper"
NOT_FA3 = "FlashInfer: the wrapper's backend is not fa3"
CUDA_GRAPH = "FlashInfer: a CUDA graph wrapper, whose plan may be refreshed behind it"
NO_PLAN = "FlashInfer: planned before enable(), and a CUDA graph is being captured"
_MAX_TABLE = 1 << 25  # entries of the rectangular page table
_STATE = "_etap_plan"
_QUERY, _CACHE = ("query", "q_nope", "q_pe"), ("kv_cache", "ckv_cache", "kpe_cache")
_SCALES = ("ckv_scale", "kpe_scale")
_READ = frozenset((*_QUERY, *_CACHE, *_SCALES, "out", "lse", "return_lse", "return_lse_base_on_e"))
_BUFFERS = ("_qo_indptr_buf", "_kv_indptr_buf", "_kv_indices_buf", "_kv_len_arr_buf")


@dataclass(frozen=True)
class Plan:
    """The batch of one `plan()`, in the operator's form. `info` tells a later plan from it."""

    info: Any
    cu_seqlens_q: Tensor  # (batch + 1,) int32
    cache_seqlens: Tensor  # (batch,) int32
    page_table: Tensor | None  # (batch, pages) int32; None: larger than _MAX_TABLE
    longest: int  # query tokens of the longest request

    @classmethod
    def of(cls, wrapper: Any) -> Plan:
        """Reads the plan of a wrapper back. Synchronises with the device, as `plan()` does."""
        queries, starts, pages, lengths = (getattr(wrapper, name) for name in _BUFFERS)
        counts = starts[1:] - starts[:-1]
        widest, longest = int(counts.max()), int((queries[1:] - queries[:-1]).max())
        table = None
        if 0 < counts.numel() * max(widest, 1) <= _MAX_TABLE:
            places = starts[:-1, None] + torch.arange(max(widest, 1), dtype=starts.dtype, device=starts.device)
            table = pages[places.clamp_(max=max(pages.numel() - 1, 0)).long()] if pages.numel() else places.int()
        # Copies: the wrapper may hold the caller's own tensors.
        return cls(wrapper._plan_info, queries.clone(), lengths.clone(), table, longest)


class WrapperEngine:
    """Options made ready for the calls of the wrapper."""

    def __init__(self, run: Callable[..., Any], options: Options) -> None:
        from etap_integration import ops

        self.options, self.strict = options, options.strict
        self.operator: Callable[..., Any] = options.operator or ops.mla_decode
        self.machine = options.machine or machine_of
        self.limits = Limits(options.max_rows, options.only_where_faster)
        parameters = list(inspect.signature(run).parameters.values())[1:]
        self.names = [p.name for p in parameters]
        self.defaults = {p.name: p.default for p in parameters}

    def reason(self, wrapper: Any, given: dict[str, Any]) -> str | None:
        """Why upstream runs the call, as far as it can be said before there is a `Call`."""
        if wrapper._use_cuda_graph:
            return CUDA_GRAPH
        for name, value in given.items():
            if name not in self.defaults:
                return f"FlashInfer: unknown argument {name}"
            if name not in _READ and value is not None and value is not self.defaults[name]:
                return f"FlashInfer: {name}"
        if getattr(wrapper, "_use_profiler", False):
            return "FlashInfer: profiler"
        return _lse_reason(wrapper, given)

    def call(self, wrapper: Any, given: dict[str, Any]) -> Call | str:
        """The call in the common form, or why there is none."""
        query, cache = _parts(given, _QUERY), _parts(given, _CACHE)
        if query is None or cache is None:
            return "FlashInfer: query or cache is neither a pair of tensors nor one tensor of 576 columns"
        scales = tuple(given.get(name) for name in _SCALES)
        if (reason := _scales_reason(wrapper, cache[0].dtype, scales)) is not None:
            return reason
        contract = _contract(wrapper)
        if contract is not None and (
            _layout(given, _QUERY) != contract.query_layout or _layout(given, _CACHE) != contract.kv_cache_layout
        ):
            return "FlashInfer: another layout than the planned one"
        plan = getattr(wrapper, _STATE, None)
        if plan is None or plan.info is not wrapper._plan_info:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return NO_PLAN
            plan = note_plan(wrapper)
        if plan.page_table is None:
            return "FlashInfer: the page table is too large to be made rectangular"
        if any(x.dim() != 3 for x in cache) or cache[0].shape[1] != wrapper._page_size:
            return "FlashInfer: the caches are not (pages, page_size, width) of the planned page size"
        call = Call(
            query[1], query[0], cache[1].unsqueeze(2), cache[0].unsqueeze(2), plan.page_table, plan.cache_seqlens,
            plan.cu_seqlens_q, plan.longest, wrapper._sm_scale, bool(wrapper._causal), given.get("out"),
            bool(given.get("return_lse", False)), ckv_scale=scales[0], kpe_scale=scales[1],
        )  # fmt: skip
        call.machine = self.machine(query[1].device)
        return call

    def decide(self, call: Call) -> str | None:
        """None: run it on ETAP. Otherwise the reason why not."""
        return decide(call, self.limits)

    def run(self, call: Call, given: dict[str, Any]) -> Any:
        """The operator on `call`; the result as upstream returns it."""
        result = self.operator(
            call.q_nope,
            call.q_rope,
            call.v_cache.squeeze(2),
            call.k_cache.squeeze(2),
            call.page_table,
            call.cache_seqlens,
            cu_seqlens_q=call.cu_seqlens_q,
            max_seqlen_q=call.max_seqlen_q,
            softmax_scale=call.softmax_scale,
            causal=call.causal,
            out=call.out,
            return_lse=call.return_lse,
            ckv_scale=call.ckv_scale,
            kpe_scale=call.kpe_scale,
        )
        if not call.return_lse:
            return result
        out, natural = result  # (heads, tokens), natural logarithm
        lse = given.get("lse")
        if lse is None:
            lse = torch.empty(natural.shape[::-1], dtype=torch.float32, device=natural.device)
        torch.mul(natural.t(), 1.0 if given.get("return_lse_base_on_e") else 1.0 / math.log(2.0), out=lse)
        return out, lse


class Observed:
    """A call of the wrapper as shadow mode takes it: run for the caller, or apart from the caller's buffers."""

    def __init__(self, engine: WrapperEngine, given: dict[str, Any]) -> None:
        self.engine, self.given = engine, given

    def run(self, call: Call) -> Any:
        """ETAP's result, in the caller's buffers."""
        return self.engine.run(call, self.given)

    def run_apart(self, call: Call) -> Any:
        """ETAP's result, in buffers of its own."""
        return self.engine.run(replace(call, out=None), {**self.given, "out": None, "lse": None})

    def arguments_apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Upstream's arguments, the wrapper first, without the caller's buffers."""
        names = ("self", *self.engine.names)
        kept = tuple(None if name in ("out", "lse") else v for name, v in zip(names, args, strict=False))
        return kept, {name: v for name, v in kwargs.items() if name not in ("out", "lse")}


def note_plan(wrapper: Any) -> Plan:
    """Remembers a wrapper's plan on the wrapper."""
    plan = Plan.of(wrapper)
    setattr(wrapper, _STATE, plan)
    return plan


def _parts(given: dict[str, Any], names: tuple[str, str, str]) -> tuple[Tensor, Tensor] | None:
    """(latent, rope) of a query or a cache in either of FlashInfer's forms; None where it is neither."""
    whole, latent, rope = (given.get(name) for name in names)
    if whole is not None:
        if latent is not None or rope is not None:
            return None
        if isinstance(whole, Tensor) and whole.dim() == 3 and whole.shape[-1] == D_LATENT + D_ROPE:
            return whole[..., :D_LATENT], whole[..., D_LATENT:]
        if not isinstance(whole, (tuple, list)) or len(whole) != 2:
            return None
        latent, rope = whole
    return (latent, rope) if isinstance(latent, Tensor) and isinstance(rope, Tensor) else None


def _layout(given: dict[str, Any], names: tuple[str, str, str]) -> str:
    return "packed" if isinstance(given.get(names[0]), Tensor) else "split"


def _scales_reason(wrapper: Any, cache: torch.dtype, scales: tuple[Any, ...]) -> str | None:
    """Why upstream has to judge the scales: it wants both with an e4m3 cache that was planned as one, else neither."""
    if cache != torch.float8_e4m3fn:
        given = any(x is not None for x in scales)
        return "FlashInfer: ckv_scale or kpe_scale of a 16-bit cache" if given else None
    if getattr(wrapper, "_kv_data_type", cache) != cache:
        return "FlashInfer: another cache dtype than the planned one"
    if all(type(x) in (int, float) for x in scales):
        return None
    return "FlashInfer: an e4m3 cache without both ckv_scale and kpe_scale as numbers"


def _lse_reason(wrapper: Any, given: dict[str, Any]) -> str | None:
    """Why upstream has to judge what the call says of the LSE."""
    wanted, lse, base_e = given.get("return_lse", False), given.get("lse"), given.get("return_lse_base_on_e", False)
    if not wanted and (lse is not None or base_e):
        return "FlashInfer: an LSE argument without return_lse"
    contract = _contract(wrapper)
    if contract is not None and contract.lse_mode != ("none" if not wanted else "basee" if base_e else "base2"):
        return "FlashInfer: another LSE than the planned one"
    if lse is None:
        return None
    query = _parts(given, _QUERY)
    if query is None or not isinstance(lse, Tensor):
        return "FlashInfer: lse is not a float32 tensor (tokens, heads) on the queries' device"
    if lse.dtype != torch.float32 or lse.shape != query[0].shape[:2] or lse.device != query[0].device:
        return "FlashInfer: lse is not a float32 tensor (tokens, heads) on the queries' device"
    return None


def _contract(wrapper: Any) -> Any:
    """What a plan of releases from 0.7 on says of `run`'s arguments; None where it lets them be."""
    return None if getattr(wrapper, "_legacy_flat_csr_plan", False) else getattr(wrapper, "_input_contract", None)


class RunRoute:
    """`run` and its stand-in. Setting `engine` also sets the switch of patched modules."""

    def __init__(self, label: str, original: Callable[..., Any]) -> None:
        self.label, self.original = label, original
        self._engine: WrapperEngine | None = None
        self.wrapper = _wrap_run(self)

    def make_engine(self, options: Options) -> WrapperEngine:
        """Options made ready for the calls of `run`."""
        return WrapperEngine(self.original, options)

    @property
    def engine(self) -> WrapperEngine | None:
        """What decides and runs; None: everything goes to upstream."""
        return self._engine

    @engine.setter
    def engine(self, engine: WrapperEngine | None) -> None:
        """Also sets the switch and the row limit of patched modules."""
        self._engine = engine
        if engine is not None:
            switch.lower_max_rows(engine.options.max_rows)
        switch.set_mode("never" if engine is None else "always" if engine.strict else "auto")


class PlanRoute:
    """`plan` and its stand-in, which notes the plan of wrappers that `run` may route."""

    def __init__(self, label: str, original: Callable[..., Any], run: RunRoute) -> None:
        self.label, self.original, self.run = label, original, run
        self.engine: WrapperEngine | None = None
        self.wrapper = _wrap_plan(self)

    def make_engine(self, options: Options) -> WrapperEngine:
        """Options made ready for the calls of `plan`."""
        return WrapperEngine(self.run.original, options)


def _wrap_run(route: RunRoute) -> Callable[..., Any]:
    original = route.original

    @functools.wraps(original)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        engine = route.engine
        if engine is None or torch.compiler.is_compiling() or jit.is_patched_module(_module_of(self)):
            return original(self, *args, **kwargs)
        if getattr(self, "_backend", None) != "fa3" or getattr(self, "_plan_info", None) is None:
            TALLY.fell_back(NOT_FA3)
            return original(self, *args, **kwargs)
        given = {**dict(zip(engine.names, args, strict=False)), **kwargs}
        call: Any = engine.reason(self, given) or engine.call(self, given)  # or why there is none
        reason = call if isinstance(call, str) else engine.decide(call)
        if reason is None:
            if routing.observer is not None:
                return routing.observer(route, Observed(engine, given), call, (self, *args), kwargs)
            TALLY.dispatched()
            return engine.run(call, given)
        TALLY.fell_back(reason)
        shown = "" if isinstance(call, str) else f": {call.describe()}"
        if engine.strict:
            raise FallbackError(f"{route.label}: {reason}{shown}")
        if TALLY.first(route.label, reason):
            log.info("%s left to upstream (logged once): %s%s", route.label, reason, shown)
        return original(self, *args, **kwargs)

    run.__etap_route__ = route  # type: ignore[attr-defined]
    return run


def _wrap_plan(route: PlanRoute) -> Callable[..., Any]:
    original = route.original

    @functools.wraps(original)
    def plan(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        routed = route.engine is not None and self._backend == "fa3" and not self._use_cuda_graph
        if routed and not jit.is_patched_module(_module_of(self)):
            note_plan(self)
        return result

    plan.__etap_route__ = route  # type: ignore[attr-defined]
    return plan


def _module_of(wrapper: Any) -> Any:
    """The JIT module that a wrapper was planned with; later releases keep it in the planned backend."""
    planned = getattr(wrapper, "_planned_backend", None)
    return getattr(planned if planned is not None else wrapper, "_cached_module", None)


@dataclass(frozen=True)
class WrapperTarget:
    """FlashInfer, in the place of a `Target`."""

    module: str = "flashinfer.mla"
    package: str = "flashinfer-python"
    required: str = WRAPPER

    def load(self) -> ModuleType:
        """The module, imported. Raises TargetError, saying what to install or what went wrong."""
        from importlib import import_module

        try:
            module = import_module(self.module)
        except ModuleNotFoundError as failure:
            if failure.name is not None and (self.module + ".").startswith(failure.name + "."):
                raise TargetError(f"{self.module} is not installed; it comes with {self.package}") from failure
            raise TargetError(f"{self.module} cannot be imported: {failure}") from failure
        except Exception as failure:  # an import that looks for GPUs or compilers may raise anything
            raise TargetError(f"{self.module} cannot be imported: {type(failure).__name__}: {failure}") from failure
        self._methods(module)
        return module

    def prepare(self, module: ModuleType) -> tuple[list[tuple[Any, Replacement]], list[str]]:
        """The routes, nothing patched yet, and notes. Raises TargetError where the class is not as known."""
        home, methods = self._methods(module)
        originals = {name: _unrouted(method) for name, method in methods.items()}
        for name, original in originals.items():
            if methods[name] is not original:
                setattr(home, name, original)
        label = f"{self.module}.{WRAPPER}"
        run = RunRoute(f"{label}.run", originals["run"])
        plan = PlanRoute(f"{label}.plan", originals["plan"], run)
        routes: dict[str, Any] = {"run": run, "plan": plan}
        return [(r, Replacement(home, n, originals[n], r.wrapper)) for n, r in routes.items()], []

    def _methods(self, module: ModuleType) -> tuple[Any, dict[str, Any]]:
        home = getattr(module, WRAPPER, None)
        methods: dict[str, Any] = {}
        if isinstance(home, type):
            methods = {name: vars(home).get(name) for name in ("run", "plan")}
        for name in ("run", "plan"):
            if not callable(methods.get(name)):
                raise TargetError(
                    f"{self.module} has no {WRAPPER}.{name}: this release of {self.package} is not one that "
                    "etap_integration knows"
                )
        there = inspect.signature(methods["run"]).parameters.keys()
        lacking = {"return_lse", "return_lse_base_on_e", "out", "lse"} - there
        if lacking:
            raise TargetError(
                f"{self.module}.{WRAPPER}.run is not the method etap_integration knows: it has no parameter "
                + ", ".join(sorted(map(repr, lacking)))
            )
        return home, methods


def _unrouted(method: Any) -> Any:
    """The original under a stand-in of an earlier time, which somebody put back."""
    while (earlier := getattr(method, "__etap_route__", None)) is not None and earlier.engine is None:
        method = earlier.original
    return method


TARGETS["flashinfer.mla"] = WrapperTarget()  # type: ignore[assignment]
