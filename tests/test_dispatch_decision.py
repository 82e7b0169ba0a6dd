"""What is covered, decided without a GPU: good calls pass, each thing that is not covered has its reason."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from dispatch_fixtures import (
    BF16,
    E4M3,
    FA3,
    HOPPER,
    I32,
    SGL,
    VLLM,
    e4m3,
    hopper,
    kvcache_call,
    sglang_call,
    upstream,
    vllm_call,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from etap_integration import ops, supports
from etap_integration.dispatch import Machine, calls, choose, decision, routing
from etap_integration.dispatch.calls import FA3_VARLEN, KVCACHE, SGL_VARLEN, VLLM_VARLEN, Call, Normaliser
from etap_integration.dispatch.decision import Limits, Rule, decide, neutral


def normaliser(module: str, name: str, interface: calls.Interface, machine: Any = hopper) -> Normaliser:
    return Normaliser(upstream(module, name), interface, machine, neutral)


NORMALISE = {
    "fa3": normaliser(FA3, "flash_attn_with_kvcache", KVCACHE),
    "fa3 varlen": normaliser(FA3, "flash_attn_varlen_func", FA3_VARLEN),
    "sgl": normaliser(SGL, "flash_attn_with_kvcache", KVCACHE),
    "sgl varlen": normaliser(SGL, "flash_attn_varlen_func", SGL_VARLEN),
    "vllm": normaliser(VLLM, "flash_attn_varlen_func", VLLM_VARLEN),
}


def call(**changes: Any) -> Call:
    return NORMALISE["fa3"]((), kvcache_call(**changes))


def decided(one: Call, limits: Limits | None = None) -> str:
    """The reason by `supports`, which `decide` must share."""
    limits = limits or Limits()
    ok, reason = supports(one, limits)
    assert ok == (reason == decision.SUPPORTED)
    assert decide(one, replace(limits, only_where_faster=False)) == (None if ok else reason)
    return reason


def caches(rows: int) -> dict[str, Any]:
    kv = torch.zeros(rows, 100, 1, 576, dtype=BF16)
    return {"k_cache": kv[..., 512:], "v_cache": kv[..., :512]}


def unpaged(**changes: Any) -> dict[str, Any]:
    return {"page_table": None, **caches(2), "cache_seqlens": 100} | changes


GOOD = [
    {},
    {"cache_seqlens": 32},
    {"causal": True, "softmax_scale": 1},
    {"window_size": [-1, -1]},
    {"window_size": None},
    {"softcap": 0},
    {"attention_chunk": None},
    {"num_splits": 5, "pack_gqa": True, "scheduler_metadata": torch.zeros(3), "sm_margin": 16},
    {"rotary_interleaved": False, "rotary_seqlens": torch.zeros(2), "cu_seqlens_k_new": torch.zeros(3)},
    {"sq": 2},
    {"heads": 32},
    {"max_seqlen_q": 99},  # upstream ignores it where the queries are not ragged
    {"page_size": 1, "pages": 64},
    unpaged(),
    unpaged(cache_seqlens=torch.zeros(2, dtype=I32)),
    unpaged(cache_batch_idx=torch.zeros(2, dtype=I32)),
    unpaged(cache_batch_idx=torch.zeros(2, dtype=I32), **caches(7)),
]


@pytest.mark.parametrize("changes", GOOD, ids=lambda c: ",".join(c))
def test_covered(changes: dict[str, Any]) -> None:
    assert decided(call(**changes)) == decision.SUPPORTED


def zeros(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


EIGHT_BIT = "8-bit queries, or an 8-bit cache that is not float8_e4m3fn throughout"


def e5m2_cache() -> dict[str, Any]:
    return {name: x.to(torch.float8_e5m2) for name, x in caches(16).items()}


def e4m3_call(**changes: Any) -> Call:
    return NORMALISE["fa3"]((), e4m3(kvcache_call(), **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"k_descale": None},
        {"v_descale": None, "k_descale": torch.rand(())},
        {"k_descale": torch.rand(1).expand(2, 1), "v_descale": torch.rand(2)},
        {"k_descale": 0.5, "v_descale": 3},
    ],
)
def test_e4m3_caches_are_covered(changes: dict[str, Any]) -> None:
    assert decided(e4m3_call(**changes)) == decision.SUPPORTED


WRONG_DESCALE = "a descale factor is not a float32 tensor (batch, 1) on the queries' device"
NO_NUMBER = "a descale factor is neither a tensor nor a positive number"


@pytest.mark.parametrize("name", ["k_descale", "v_descale"])
@pytest.mark.parametrize(
    ("reason", "value"),
    [
        (WRONG_DESCALE, torch.ones(2, 1, dtype=BF16)),
        (WRONG_DESCALE, torch.ones(3, 1)),
        (WRONG_DESCALE, torch.ones(2, 2)),
        (WRONG_DESCALE, torch.ones(1, 2)),
        (WRONG_DESCALE, torch.ones(0, 1)),
        (WRONG_DESCALE, torch.ones(2, 1, device="meta")),
        (NO_NUMBER, [1.0, 1.0]),
        (NO_NUMBER, True),
        (NO_NUMBER, 0.0),
        (NO_NUMBER, -1.0),
        (NO_NUMBER, float("inf")),
        ("a tensor requires grad", torch.ones(2, 1).requires_grad_()),
    ],
)
def test_other_descales(reason: str, value: Any, name: str) -> None:
    assert decided(e4m3_call(**{name: value})) == reason


def test_e4m3_caches_beside_other_queries() -> None:
    half = {"q": zeros(2, 1, 16, 64, dtype=torch.float16), "qv": zeros(2, 1, 16, 512, dtype=torch.float16)}
    assert decided(e4m3_call(**half)) == decision.SUPPORTED
    assert decided(e4m3_call(q=half["q"])) == "q, qv and the caches differ in dtype"
    wide = {name: x.float() for name, x in half.items()}
    assert decided(e4m3_call(**wide)) == EIGHT_BIT


def rejected() -> list[tuple[str, dict[str, Any]]]:
    one = zeros(1)
    return [
        ("qv is not given: no MLA call", {"qv": None}),
        ("window_size", {"window_size": (128, 0)}),
        ("window_size", {"window_size": (-1, 0)}),
        ("softcap", {"softcap": 30.0}),
        ("softcap", {"softcap": one}),
        ("attention_chunk", {"attention_chunk": 64}),
        ("cache_leftpad", {"cache_leftpad": one}),
        ("cache_batch_idx with page_table", {"cache_batch_idx": zeros(2, dtype=I32)}),
        ("cache_batch_idx is not an int32 tensor (batch,) on the queries' device", unpaged(cache_batch_idx=one)),
        ("rotary embedding", {"rotary_cos": one}),
        ("rotary embedding", {"rotary_sin": one}),
        ("new keys to append (k)", {"k": one}),
        ("new values to append (v)", {"v": one}),
        ("q_descale", {"q_descale": one}),
        ("descale factors of a 16-bit cache", {"k_descale": torch.ones(2, 1)}),
        ("descale factors of a 16-bit cache", {"v_descale": torch.ones(2, 1)}),
        ("sm_margin is not a number of SMs", {"sm_margin": -1}),
        ("unknown keyword tree_mask", {"tree_mask": None}),
        (EIGHT_BIT, {"k_cache": zeros(16, 4, 1, 64, dtype=E4M3)}),
        (EIGHT_BIT, {"v_cache": zeros(16, 4, 1, 512, dtype=E4M3)}),
        (EIGHT_BIT, {"q": zeros(2, 1, 16, 64, dtype=E4M3)}),
        (EIGHT_BIT, e5m2_cache()),
        ("a dtype is neither bfloat16 nor float16", {"q": zeros(2, 1, 16, 64, dtype=torch.float32)}),
        ("q, qv and the caches differ in dtype", {"q": zeros(2, 1, 16, 64, dtype=torch.float16)}),
        ("q, qv and the caches are not all tensors", {"k_cache": [1]}),
        ("too many query rows", {"sq": 5}),
        ("too many query rows", {"heads": 65}),
        ("not 1 to 128 query heads", {"heads": 129}),
        ("no query tokens", {"sq": 0}),
        ("more than one KV head", {"k_cache": zeros(16, 4, 2, 64), "v_cache": zeros(16, 4, 2, 512)}),
        (
            "the head dimensions are not 64 (rope) and 512 (latent)",
            {"q": zeros(2, 1, 16, 128), "k_cache": zeros(16, 4, 1, 128)},
        ),
        ("the head dimensions are not 64 (rope) and 512 (latent)", {"v_cache": zeros(16, 4, 1, 256)}),
        ("the caches are not shaped alike, (pages, page_size, 1, width)", {"k_cache": zeros(15, 4, 1, 64)}),
        ("the caches are not shaped alike, (pages, page_size, 1, width)", {"k_cache": zeros(16, 4, 64)}),
        ("a cache's last dimension is not contiguous", {"k_cache": zeros(16, 4, 1, 128)[..., ::2]}),
        ("an unpaged cache of another batch size", {"page_table": None}),
        (
            "page_table is not an int32 tensor (batch, pages) on the queries' device",
            {"page_table": zeros(2, 8, dtype=torch.int64)},
        ),
        (
            "page_table is not an int32 tensor (batch, pages) on the queries' device",
            {"page_table": zeros(3, 8, dtype=I32)},
        ),
        (
            "cache_seqlens is neither an int nor an int32 tensor (batch,) on the queries' device",
            {"cache_seqlens": None},
        ),
        (
            "cache_seqlens is neither an int nor an int32 tensor (batch,) on the queries' device",
            {"cache_seqlens": torch.zeros(2, dtype=I32, device="meta")},
        ),
        ("cache_seqlens exceeds the cache", {"cache_seqlens": 33}),
        ("cache_seqlens exceeds the cache", {"cache_seqlens": -1}),
        ("softmax_scale is not a positive number", {"softmax_scale": -1.0}),
        ("softmax_scale is not a positive number", {"softmax_scale": torch.ones(())}),
        ("a tensor requires grad", {"q": zeros(2, 1, 16, 64).requires_grad_()}),
        ("q, qv and the caches are on different devices", {"qv": zeros(2, 1, 16, 512).to("meta")}),
        ("a required argument is missing", {"without": "k_cache"}),
    ]


@pytest.mark.parametrize(("reason", "changes"), rejected(), ids=lambda x: x if isinstance(x, str) else "")
def test_left_to_upstream(reason: str, changes: dict[str, Any]) -> None:
    arguments = kvcache_call(**changes)
    arguments.pop(arguments.pop("without", None), None)
    assert decided(NORMALISE["fa3"]((), arguments)) == reason


RAGGED_BAD = [
    ("cu_seqlens_q is not an int32 tensor (batch + 1,) on the queries' device", {"cu_seqlens_q": [0, 1, 2, 3]}),
    ("cu_seqlens_q is not an int32 tensor (batch + 1,) on the queries' device", {"cu_seqlens_q": torch.arange(4)}),
    ("max_seqlen_q is not an int of at least 1", {"max_seqlen_q": None}),
    ("max_seqlen_q is not an int of at least 1", {"max_seqlen_q": torch.ones((), dtype=I32)}),
    ("cache_seqlens is an int and the queries are ragged", {"cache_seqlens": 5}),
    ("too many query rows", {"max_seqlen_q": 5}),
    ("not FlashAttention-3 (ver)", {"ver": 4}),
    ("attention sinks", {"sinks": torch.zeros(16)}),
]


@pytest.mark.parametrize(("reason", "changes"), RAGGED_BAD)
def test_ragged_calls_left_to_upstream(reason: str, changes: dict[str, Any]) -> None:
    assert decided(NORMALISE["sgl"]((), sglang_call() | changes)) == reason


VLLM_BAD = [
    ("not FlashAttention-3 (fa_version)", {"fa_version": 2}),
    ("context parallelism", {"cp_world_size": 2}),
    ("dropout", {"dropout_p": 0.1}),
    ("ALiBi", {"alibi_slopes": torch.zeros(16)}),
    ("attention sinks", {"s_aux": torch.zeros(16)}),
    ("cu_seqlens_k: packed keys", {"cu_seqlens_k": torch.zeros(5, dtype=I32)}),
    ("return_attn_probs", {"return_attn_probs": True}),
    ("out is not a tensor of qv's shape, dtype and device", {"out": torch.zeros(3, 16, 512)}),
    ("out has unaligned rows", {"out": torch.zeros(3, 16, 513, dtype=BF16)[..., 1:]}),
]


@pytest.mark.parametrize(("reason", "changes"), VLLM_BAD)
def test_vllm_calls_left_to_upstream(reason: str, changes: dict[str, Any]) -> None:
    assert decided(NORMALISE["vllm"]((), vllm_call() | changes)) == reason


def test_a_default_counts_where_nothing_is_passed() -> None:
    """vLLM's fa_version defaults to 2: a call that does not name it is no FlashAttention-3 call."""
    arguments = vllm_call()
    del arguments["fa_version"]
    assert decided(NORMALISE["vllm"]((), arguments)) == "not FlashAttention-3 (fa_version)"


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (Machine(None), "the tensors are not on a CUDA device"),
        (Machine((8, 0), 108), "the device is not a Hopper GPU"),
        (Machine((10, 0), 148), "the device is not a Hopper GPU"),
        (Machine((9, 0), 132, "not built"), "the operator library cannot be loaded"),
    ],
)
def test_machines(machine: Machine, reason: str) -> None:
    assert decided(replace(call(), machine=machine)) == reason


def test_cpu_tensors_have_no_machine() -> None:
    normalise = normaliser(FA3, "flash_attn_with_kvcache", KVCACHE, calls.machine_of)
    assert decided(normalise((), kvcache_call())) == "the tensors are not on a CUDA device"


def test_row_limit() -> None:
    assert decided(call(heads=128), Limits(128)) == decision.SUPPORTED
    assert decided(call(heads=16), Limits(15)) == "too many query rows"
    for bad in (0, -1, True, 64.0):
        with pytest.raises(ValueError, match="max_rows"):
            Limits(bad)  # type: ignore[arg-type]


def test_default_scales() -> None:
    """Over both parts of the head dimension, but over the rope part alone in vLLM's interface."""
    arguments = vllm_call() | {"softmax_scale": None}
    assert NORMALISE["vllm"]((), arguments).softmax_scale == 64**-0.5
    assert call().softmax_scale == ops.DEFAULT_SCALE == 576**-0.5
    varlen = {"q": arguments["q"], "qv": arguments["q_v"], "k": arguments["k"], "v": arguments["v"]}
    for name in ("fa3 varlen", "sgl varlen"):
        assert NORMALISE[name]((), varlen).softmax_scale == 576**-0.5


def test_positions_and_keywords_mean_the_same() -> None:
    arguments = kvcache_call(softcap=1.0)
    order = ("q", "k_cache", "v_cache", "k", "v", "qv")
    positional = [arguments.pop(name, None) for name in order]
    by_position = NORMALISE["fa3"](tuple(positional), arguments)
    by_name = NORMALISE["fa3"]((), arguments | dict(zip(order, positional, strict=True)))
    for field in fields(Call):
        if field.name != "others":
            assert getattr(by_position, field.name) is getattr(by_name, field.name) or field.name == "softmax_scale"
    assert by_position.others == by_name.others


def test_malformed_calls_are_upstreams_to_refuse() -> None:
    arguments = kvcache_call()
    twice = NORMALISE["fa3"]((arguments["q"],), arguments)
    too_many = NORMALISE["fa3"](tuple(range(40)), {})
    assert supports(twice) == supports(too_many) == (False, "arguments upstream does not take")
    assert decided(NORMALISE["fa3"]((), {})) == "a required argument is missing"


def test_every_parameter_of_every_interface_has_a_rule() -> None:
    """No parameter that upstream has today is unknown: each is a role, accepted, or covered at some values."""
    for normalise in NORMALISE.values():
        known = {*normalise.interface.roles.values(), *decision.ACCEPTED, *decision.NEUTRAL}
        assert set(normalise.positional) <= known


def test_rules_choose() -> None:
    one = call(cache_seqlens=20)
    assert choose(one) == (True, decision.SUPPORTED)
    seen = []
    losing = Rule("slower here", lambda *facts: seen.append(facts) or facts[0] <= 16)
    assert choose(one, (losing,)) == (False, "slower here")
    assert seen == [(16, 2, 20, 132)]
    assert choose(call(heads=32), (losing,))[0]


def test_measured_rules() -> None:
    more = call(heads=33)
    assert supports(more)[0] and choose(more) == (False, "more than 32 query rows: upstream is faster")
    assert decide(more) == "more than 32 query rows: upstream is faster"
    assert decide(call(batch=5, heads=32)) is decide(more, Limits(only_where_faster=False)) is None
    widened = replace(e4m3_call(), q_rope=zeros(2, 1, 64, 64), q_nope=zeros(2, 1, 64, 512))
    assert widened.rows == 64 and choose(widened) == (True, decision.SUPPORTED)
    assert decide(call(batch=4, heads=17)) is None


def test_length_bounds_come_from_the_host() -> None:
    assert call().length_bound == 32
    assert call(cache_seqlens=7).length_bound == 7
    assert NORMALISE["vllm"]((), vllm_call()).length_bound == 40
    assert NORMALISE["vllm"]((), vllm_call() | {"max_seqlen_k": 10**6}).length_bound == 48


SIZES = st.sampled_from([0, 1, 2, 3, 16, 64, 65, 128, 512])
DTYPES = st.sampled_from([BF16, BF16, BF16, torch.float16, torch.float32, I32, torch.float8_e4m3fn])


@st.composite
def tensors(draw: st.DrawFn, *shape: int, dtype: torch.dtype = BF16) -> Any:
    """Usually as asked, sometimes not; on the meta device."""
    sizes = [draw(SIZES) if draw(st.integers(0, 30)) == 0 else n for n in shape]
    if draw(st.integers(0, 30)) == 0:
        sizes = sizes[1:]
    if draw(st.integers(0, 20)) == 0:
        return draw(st.sampled_from([None, 3, 1.5, "x"]))
    made = torch.empty(sizes, dtype=draw(DTYPES) if draw(st.integers(0, 20)) == 0 else dtype, device="meta")
    return made.transpose(-1, -2) if made.dim() > 1 and draw(st.integers(0, 20)) == 0 else made


@st.composite
def any_call(draw: st.DrawFn) -> Call:
    batch, sq, heads = draw(st.integers(0, 3)), draw(st.integers(0, 3)), draw(st.sampled_from([1, 5, 16, 64, 128]))
    ragged, paged = draw(st.booleans()), draw(st.booleans())
    q = (batch * sq, heads) if ragged else (batch, sq, heads)
    cache = (9, 4, 1) if paged else (batch, 36, 1)
    kv = draw(st.sampled_from([BF16, E4M3]))
    descale = st.one_of(
        st.none(), tensors(batch, 1, dtype=torch.float32), tensors(batch, dtype=torch.float32),
        st.sampled_from([0.5, 1, 0.0, float("nan")]),
    )  # fmt: skip
    made = Call(
        draw(tensors(*q, 64)), draw(tensors(*q, 512)), draw(tensors(*cache, 64, dtype=kv)),
        draw(tensors(*cache, 512, dtype=kv)),
        draw(tensors(batch, 9, dtype=I32)) if paged else None,
        draw(st.one_of(tensors(batch, dtype=I32), st.integers(-1, 40), st.just(None))),
        draw(tensors(batch + 1, dtype=I32)) if ragged else None,
        draw(st.one_of(st.none(), st.integers(0, 4), st.just("x"))) if draw(st.booleans()) else sq,
        draw(st.sampled_from([0.1, 0.1, 1, 0, -1.0, None, float("nan"), float("inf")])),
        out=draw(st.one_of(st.none(), st.none(), tensors(*q, 512))),
        cache_batch_idx=draw(st.one_of(st.none(), st.none(), tensors(batch, dtype=I32))),
        ckv_scale=draw(descale) if kv == E4M3 else None,
        kpe_scale=draw(descale) if kv == E4M3 else None,
        machine=HOPPER,
    )  # fmt: skip
    return made


@settings(max_examples=400, deadline=None)
@given(any_call())
def test_the_operator_takes_whatever_is_supported(one: Call) -> None:
    """`supports` never raises, and what it lets through passes the operator's own checks, arguments as passed on."""
    if decided(one, Limits(512)) == decision.SUPPORTED:
        ops._check_arguments(
            one.q_nope, one.q_rope, one.v_cache.squeeze(2), one.k_cache.squeeze(2), one.page_table, one.cache_seqlens,
            one.cu_seqlens_q, one.max_seqlen_q if one.cu_seqlens_q is not None else None, one.softmax_scale,
            bool(one.causal), one.out, bool(one.return_lse), None, None, routing._per_request(one.ckv_scale),
            routing._per_request(one.kpe_scale), one.cache_batch_idx,
        )  # fmt: skip
