"""Which calls run on ETAP: pure functions of a `Call`. They need no GPU, and look at no tensor's contents.

    supports(call)   can the operator compute this call, exactly as upstream would?
    choose(call)     is it expected to be faster than upstream?
    decide(call)     both

Every reason is one of few fixed sentences, so that fall-backs can be counted by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etap_integration import costmodel
from etap_integration.dispatch.calls import Call

D_ROPE, D_LATENT = 64, 512
MAX_HEADS = 128  # what the operator takes
DEFAULT_MAX_ROWS = 64
SUPPORTED = "supported"
NOT_MLA = "qv is not given: no MLA call"
GRADIENTS = "a tensor requires grad"


@dataclass(frozen=True)
class Limits:
    """What is left to upstream though the operator could compute it.

    max_rows: calls with more query rows (tokens of the longest request times heads).
    only_where_faster: calls for which `choose` says no.
    """

    max_rows: int = DEFAULT_MAX_ROWS
    only_where_faster: bool = True

    def __post_init__(self) -> None:
        if type(self.max_rows) is not int or self.max_rows < 1:
            raise ValueError(f"max_rows: {self.max_rows!r}, expected an int of at least 1")


DEFAULT_LIMITS = Limits()

# ---------------------------------------------------------------------------------------------------------------------
# Keywords. Each is covered at some values: `neutral(name, value)`.
# ---------------------------------------------------------------------------------------------------------------------

# Tuning hints, and what upstream reads only together with a keyword that is refused below.
ACCEPTED = frozenset((
    "num_splits", "scheduler_metadata", "pack_gqa", "deterministic", "max_seqlen_k",
    "rotary_interleaved", "rotary_seqlens", "cu_seqlens_k_new",
))  # fmt: skip


def _is_none(value: Any) -> bool:
    return value is None


def _is_zero(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and value == 0)


def _is(number: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and value == number


def _no_window(value: Any) -> bool:
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    return value is None or (pair and all(type(side) is int and side == -1 for side in value))


# Of vLLM's function (0.33), which serves all versions.
_FLASH_ATTENTION_4 = (
    "output_scale", "block_sparse_tensors", "aux_tensor_leading_dims", "dynamic_causal", "gather_kv_indices",
    "gather_kv_valid_length",
)  # fmt: skip

NEUTRAL: dict[str, tuple[Callable[[Any], bool], str]] = {
    "k": (_is_none, "new keys to append (k)"),
    "v": (_is_none, "new values to append (v)"),
    "rotary_cos": (_is_none, "rotary embedding"),
    "rotary_sin": (_is_none, "rotary embedding"),
    "cache_leftpad": (_is_none, "cache_leftpad"),
    "seqused_q": (_is_none, "seqused_q"),
    "cu_seqlens_k": (_is_none, "cu_seqlens_k: packed keys"),
    "q_descale": (_is_none, "q_descale"),
    "window_size": (_no_window, "window_size"),
    "attention_chunk": (_is_zero, "attention_chunk"),
    "softcap": (_is_zero, "softcap"),
    "dropout_p": (_is_zero, "dropout"),
    "alibi_slopes": (_is_none, "ALiBi"),
    "s_aux": (_is_none, "attention sinks"),
    "sinks": (_is_none, "attention sinks"),
    "learnable_sink": (_is_none, "attention sinks"),
    "only_qv": (_is_zero, "only_qv: queries without a rope part"),
    "score_mod": (_is_none, "score_mod"),
    "mask_mod": (_is_none, "mask_mod"),
    "aux_tensors": (_is_none, "score_mod"),
    "return_attn_probs": (_is_zero, "return_attn_probs"),
    "cp_world_size": (_is(1), "context parallelism"),
    "cp_rank": (_is_zero, "context parallelism"),
    "cp_tot_seqused_k": (_is_none, "context parallelism"),
    "fa_version": (_is(3), "not FlashAttention-3 (fa_version)"),
    "ver": (_is(3), "not FlashAttention-3 (ver)"),
    "sm_margin": (lambda value: type(value) is int and value >= 0, "sm_margin is not a number of SMs"),
    **{name: (_is_none, f"FlashAttention-4's {name}") for name in _FLASH_ATTENTION_4},
}


def neutral(name: str, value: Any) -> bool:
    """Whether a parameter that nobody passed may keep its default `value` unexamined.

    True of an unknown parameter: left alone, it does what upstream always did.
    """
    rule = NEUTRAL.get(name)
    return rule is None or rule[0](value)


def keyword_reason(call: Call) -> str | None:
    """Why the operator cannot compute a call with `call`'s keywords, whatever its tensors, or None."""
    for name, value in call.others.items():
        if name in ACCEPTED:
            continue
        rule = NEUTRAL.get(name)
        if rule is None:
            return f"unknown keyword {name}"
        if not rule[0](value):
            return rule[1]
    return None


def _value_reason(call: Call) -> str | None:
    """What is neither a shape nor cheap to remember. After `_static_reason`."""
    scale = call.softmax_scale
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not 0 < scale < math.inf:
        return "softmax_scale is not a positive number"
    lengths = call.cache_seqlens
    if type(lengths) is int:
        if call.cu_seqlens_q is not None:
            return "cache_seqlens is an int and the queries are ragged"
        if not 0 <= lengths <= call.capacity:
            return "cache_seqlens exceeds the cache"
    needed = needs_gradients(
        call.q_rope, call.q_nope, call.k_cache, call.v_cache, call.out, call.ckv_scale, call.kpe_scale
    )
    return GRADIENTS if needed else None


def needs_gradients(q: Tensor, qv: Tensor, k: Tensor, v: Tensor, out: Any, ckv_scale: Any, kpe_scale: Any) -> bool:
    """Whether autograd would follow a call on these, of which the last three need not be tensors."""
    return torch.is_grad_enabled() and (
        q.requires_grad or qv.requires_grad or k.requires_grad or v.requires_grad
        or getattr(out, "requires_grad", False)
        or getattr(ckv_scale, "requires_grad", False) or getattr(kpe_scale, "requires_grad", False)
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Shapes, dtypes, devices
# ---------------------------------------------------------------------------------------------------------------------

_DTYPES = (torch.bfloat16, torch.float16)


def _static_reason(call: Call, limits: Limits) -> str | None:
    q, qv, k, v = call.q_rope, call.q_nope, call.k_cache, call.v_cache
    if not all(isinstance(x, Tensor) for x in (q, qv, k, v)):
        return "q, qv and the caches are not all tensors"
    device = q.device
    return (
        _machine_reason(call, device)
        or _dtype_reason(q.dtype, qv.dtype, k.dtype, v.dtype)
        or _query_reason(call, device)
        or _cache_reason(call, device)
        or _scale_reason(call, device)
        or ("too many query rows" if call.rows > limits.max_rows else None)
        or (None if call.out is None else _out_reason(call.out, qv))
    )


def _machine_reason(call: Call, device: torch.device) -> str | None:
    if call.machine.capability is None:
        return "the tensors are not on a CUDA device"
    if call.machine.capability[0] != 9:
        return "the device is not a Hopper GPU"
    if call.machine.library is not None:
        return "the operator library cannot be loaded"
    if any(x.device != device for x in (call.q_nope, call.k_cache, call.v_cache)):
        return "q, qv and the caches are on different devices"
    return None


def _dtype_reason(q: torch.dtype, qv: torch.dtype, k: torch.dtype, v: torch.dtype) -> str | None:
    cache = (q, q) if k == v == torch.float8_e4m3fn and q in _DTYPES else (k, v)
    dtypes = (q, qv, *cache)
    if any(x.itemsize == 1 for x in dtypes):
        return "8-bit queries, or an 8-bit cache that is not float8_e4m3fn throughout"
    if any(x not in _DTYPES for x in dtypes):
        return "a dtype is neither bfloat16 nor float16"
    return None if all(x == q for x in dtypes) else "q, qv and the caches differ in dtype"


def _query_reason(call: Call, device: torch.device) -> str | None:
    q, qv, cu, longest = call.q_rope, call.q_nope, call.cu_seqlens_q, call.max_seqlen_q
    if q.dim() != (4 if cu is None else 3) or qv.dim() != q.dim() or qv.shape[:-1] != q.shape[:-1]:
        return "q and qv are not shaped alike, (batch, sq, heads, width) or (total_q, heads, width) with cu_seqlens_q"
    if q.shape[-1] != D_ROPE or qv.shape[-1] != D_LATENT:
        return "the head dimensions are not 64 (rope) and 512 (latent)"
    if not 1 <= q.shape[-2] <= MAX_HEADS:
        return "not 1 to 128 query heads"
    if cu is None:
        return None if q.shape[1] >= 1 else "no query tokens"
    if not _int32(cu, 1, device) or cu.shape[0] < 1:
        return "cu_seqlens_q is not an int32 tensor (batch + 1,) on the queries' device"
    return None if type(longest) is int and longest >= 1 else "max_seqlen_q is not an int of at least 1"


def _cache_reason(call: Call, device: torch.device) -> str | None:
    k, v, table, lengths = call.k_cache, call.v_cache, call.page_table, call.cache_seqlens
    index = call.cache_batch_idx
    if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
        return "the caches are not shaped alike, (pages, page_size, 1, width)"
    if k.shape[2] != 1:
        return "more than one KV head"
    if k.shape[3] != D_ROPE or v.shape[3] != D_LATENT:
        return "the head dimensions are not 64 (rope) and 512 (latent)"
    if k.stride(3) != 1 or v.stride(3) != 1:
        return "a cache's last dimension is not contiguous"
    batch = call.batch
    if index is not None and table is not None:
        return "cache_batch_idx with page_table"
    if index is not None and (not _int32(index, 1, device) or index.shape[0] != batch):
        return "cache_batch_idx is not an int32 tensor (batch,) on the queries' device"
    if table is None:
        if index is None and k.shape[0] != batch:
            return "an unpaged cache of another batch size"
    elif not _int32(table, 2, device) or table.shape[0] != batch or k.shape[1] < 1:
        return "page_table is not an int32 tensor (batch, pages) on the queries' device"
    if type(lengths) is not int and (not _int32(lengths, 1, device) or lengths.shape[0] != batch):
        return "cache_seqlens is neither an int nor an int32 tensor (batch,) on the queries' device"
    return None


def _scale_reason(call: Call, device: torch.device) -> str | None:
    for scale in (call.ckv_scale, call.kpe_scale):
        if scale is None:
            continue
        if not call.e4m3:
            return "descale factors of a 16-bit cache"
        if isinstance(scale, Tensor):
            known = scale.numel() == 1 or scale.shape in ((call.batch,), (call.batch, 1))
            if scale.dtype != torch.float32 or scale.device != device or not known:
                return "a descale factor is not a float32 tensor (batch, 1) on the queries' device"
        elif isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            return "a descale factor is neither a tensor nor a positive number"
    return None


def _int32(value: Any, dims: int, device: torch.device) -> bool:
    if not isinstance(value, Tensor) or value.dtype != torch.int32 or value.device != device or value.dim() != dims:
        return False
    return value.shape[-1] <= 1 or value.stride(-1) == 1


def _out_reason(out: Any, qv: Tensor) -> str | None:
    if not isinstance(out, Tensor) or out.dtype != qv.dtype or out.device != qv.device or out.shape != qv.shape:
        return "out is not a tensor of qv's shape, dtype and device"
    *outer, last = out.stride()
    rows = all(n <= 1 or (step > 0 and step % 8 == 0) for n, step in zip(out.shape, outer, strict=False))
    return None if last == 1 and rows and out.storage_offset() % 8 == 0 else "out has unaligned rows"


def attention_key(
    q: Tensor, qv: Tensor, k: Tensor, v: Tensor, out: Tensor | None, ckv_scale: Tensor | None, kpe_scale: Tensor | None
) -> tuple[Any, ...]:
    """With `index_key`, all that `supports` looks at in the tensors of a call, gradients apart.

    The machine goes without saying: it is the one of the device. Raises AttributeError where something is no tensor.
    """
    return (
        q.shape, q.dtype, q.device, qv.shape, qv.dtype, qv.device,
        k.shape, k.dtype, k.device, k.stride(), v.shape, v.dtype, v.device, v.stride(),
        None if out is None else (out.shape, out.dtype, out.device, out.stride(), out.storage_offset() % 8),
        None if ckv_scale is None else (ckv_scale.shape, ckv_scale.dtype, ckv_scale.device),
        None if kpe_scale is None else (kpe_scale.shape, kpe_scale.dtype, kpe_scale.device),
    )  # fmt: skip


def index_key(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """The same for page table, lengths, cu_seqlens_q and cache_batch_idx."""
    return tuple(None if x is None else (x.shape, x.dtype, x.device, x.stride()) for x in tensors)


# ---------------------------------------------------------------------------------------------------------------------
# The decisions
# ---------------------------------------------------------------------------------------------------------------------


def supports(call: Call, limits: Limits = DEFAULT_LIMITS) -> tuple[bool, str]:
    """Whether the operator computes `call` as upstream would. (True, "supported") or (False, the reason)."""
    reason = _reason(call, limits)
    return reason is None, reason or SUPPORTED


def _reason(call: Call, limits: Limits) -> str | None:
    if call.malformed is not None:
        return call.malformed
    if call.q_nope is None:
        return NOT_MLA
    return keyword_reason(call) or _static_reason(call, limits) or _value_reason(call)


@dataclass(frozen=True)
class Rule:
    """A region where upstream is faster: `upstream_wins(rows, batch, length_bound, sms)`.

    rows_only: it does not look at the rest.
    """

    reason: str
    upstream_wins: Callable[[int, int, int, int], bool]
    rows_only: bool = False


# What measurements of the operator against an unpatched upstream found, one rule a region; then the cost model, which
# its tests hold against measurements. All for a 16-bit cache.
MEASURED_RULES: tuple[Rule, ...] = (
    # With 33 to 64 rows 0.86 times as fast as the better upstream in the mean on an H200 with v23 (kernel log), and
    # 0.67 where caches are longest (P in one part, v22: 0.99 and 0.83). csrc/fa3/call.h has the same rule.
    Rule("more than 32 query rows: upstream is faster", lambda rows, batch, length, sms: rows > 32, rows_only=True),
    Rule("the cost model expects upstream to be faster", costmodel.upstream_wins),
)


def slower(rows: int, batch: int, length_bound: int, sms: int, rules: tuple[Rule, ...] | None = None) -> str | None:
    """Why upstream is expected to be faster, by `rules` (default: `MEASURED_RULES`), or None."""
    for rule in MEASURED_RULES if rules is None else rules:
        if rule.upstream_wins(rows, batch, length_bound, sms):
            return rule.reason
    return None


def refused_by_query(call: Call, limits: Limits) -> bool:
    """Whether keywords, the shape of q and the dtype of k are enough for upstream to get a call that it gets."""
    if keyword_reason(call) is not None:
        return True
    q, qv = call.q_rope, call.q_nope
    if not isinstance(q, Tensor) or not isinstance(qv, Tensor) or _query_reason(call, q.device) is not None:
        return False
    measured = limits.only_where_faster and not call.e4m3
    by_rows = (rule for rule in MEASURED_RULES if rule.rows_only and measured)
    return call.rows > limits.max_rows or any(rule.upstream_wins(call.rows, 0, 0, 0) for rule in by_rows)


def choose(call: Call, rules: tuple[Rule, ...] | None = None) -> tuple[bool, str]:
    """Whether ETAP is the faster one, for a call that `supports` let through: yes, where no rule says otherwise.

    Looks at rows, batch, an upper bound of the lengths that the host knows, and the number of SMs. Always yes for an
    e4m3 cache: FlashAttention-3 has no kernel for it, FlashInfer one that is several times slower. `rules`: as in
    `slower`. Returns as `supports` does.
    """
    if call.e4m3:
        return True, SUPPORTED
    reason = slower(call.rows, call.batch, call.length_bound, call.machine.sms, rules)
    return reason is None, reason or SUPPORTED


def decide(call: Call, limits: Limits = DEFAULT_LIMITS) -> str | None:
    """None: run it on ETAP. Otherwise the reason why not."""
    ok, reason = supports(call, limits)
    if ok and limits.only_where_faster:
        ok, reason = choose(call)
    return None if ok else reason
