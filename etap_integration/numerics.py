"""References and tile-accurate models of MLA decode attention, in plain torch on any device.

    reference             fp64, nothing rounded: what every kernel is measured against
    rounded_reference     one softmax over all keys, P and the output rounded once, as a query-major kernel rounds them
    etap_model            the ETAP pipeline tile by tile: what the kernel computes, rounding for rounding
    etap_e4m3_model       the same for a float8_e4m3fn cache: Q and P in fp16
    query_major_model     the usual pipeline tile by tile: running maximum, 16-bit P, fp32 O

All take the tensors of `mla_decode`, with `cache_seqlens` as any sequence of ints or tensor (read on the host), and
return (out, lse): out shaped as q_nope, lse (batch, heads, sq) or ragged (heads, total_q), natural logarithm. A row
that sees no key gives output 0 and LSE -inf. Slots past a request's length and page ids past its last page are unread.
A float8_e4m3fn cache is for etap_e4m3_model; the others take it dequantised.

`python -m etap_integration.numerics` prints the error of each model against fp64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

D_LATENT, D_ROPE = 512, 64
DEFAULT_SCALE = (D_LATENT + D_ROPE) ** -0.5
SCALE_GROUP = 128  # latent columns of an e4m3 cache that may share a scale
TILE = 64  # keys per tile, the M of one wgmma
RAISE_BY = 8.0  # log2 units a score may exceed the reference maximum by before that is raised
LOG2E = math.log2(math.e)

# One request: q (rows, 576), k (keys, 576), `limits` (rows,): how many keys each row sees. Rows are token-major.
Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def query_lengths(q_nope: Tensor, cu_seqlens_q: Sequence[int] | Tensor | None) -> list[int]:
    """Query tokens of each request."""
    if cu_seqlens_q is None:
        return [q_nope.shape[1]] * q_nope.shape[0]
    ends = _ints(cu_seqlens_q)
    return [b - a for a, b in itertools.pairwise(ends)]


def gather_keys(cache: Tensor, page_table: Tensor | None, request: int, length: int) -> Tensor:
    """The first `length` keys of a request, (length, width), from a paged or unpaged cache."""
    if page_table is None:
        return cache[request, :length]
    page_size = cache.shape[1]
    pages = page_table[request, : -(-length // page_size)].long()
    return cache[pages].reshape(-1, cache.shape[2])[:length]


def visible_keys(length: int, q_len: int, heads: int, causal: bool, device: torch.device | str) -> Tensor:
    """(q_len * heads,) keys each row sees: all, or under the causal mask aligned at the bottom right."""
    tokens = torch.arange(q_len, device=device)
    seen = (length - q_len + 1 + tokens).clamp(min=0) if causal else torch.full_like(tokens, length)
    return seen.repeat_interleave(heads)


def reference(
    q_nope: Tensor,
    q_rope: Tensor,
    ckv_cache: Tensor,
    kpe_cache: Tensor,
    page_table: Tensor | None,
    cache_seqlens: Sequence[int] | Tensor | int,
    *,
    cu_seqlens_q: Sequence[int] | Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output and LSE in float64."""
    scale = DEFAULT_SCALE if softmax_scale is None else softmax_scale

    def attend(q: Tensor, k: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        k = k.double()
        scores = _masked(q.double() @ k.T * scale, limits)
        lse = scores.logsumexp(-1)
        p = torch.exp(scores - _finite(lse)[:, None])
        return p @ k[:, :D_LATENT], lse

    problem = (q_nope, q_rope, ckv_cache, kpe_cache, page_table, cache_seqlens, cu_seqlens_q, causal)
    return _per_request(*problem, attend, torch.float64)


def rounded_reference(
    q_nope: Tensor,
    q_rope: Tensor,
    ckv_cache: Tensor,
    kpe_cache: Tensor,
    page_table: Tensor | None,
    cache_seqlens: Sequence[int] | Tensor | int,
    *,
    cu_seqlens_q: Sequence[int] | Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """S and O in float32, P = exp(S - max) rounded to the input dtype, the output rounded once: the error a good
    query-major kernel has. `out_dtype` defaults to the input dtype; LSE float32."""
    scale, dtype = DEFAULT_SCALE if softmax_scale is None else softmax_scale, q_nope.dtype

    def attend(q: Tensor, k: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        k = k.float()
        z = _masked(q.float() @ k.T, limits) * (scale * LOG2E)
        top = _finite(z.amax(-1) if z.shape[1] else z.new_full(z.shape[:1], -math.inf))
        p = torch.exp2(z - top[:, None])
        return _finish(p.to(dtype).float() @ k[:, :D_LATENT], p.sum(-1), top)

    problem = (q_nope, q_rope, ckv_cache, kpe_cache, page_table, cache_seqlens, cu_seqlens_q, causal)
    return _per_request(*problem, attend, out_dtype or dtype)


def etap_model(
    q_nope: Tensor,
    q_rope: Tensor,
    ckv_cache: Tensor,
    kpe_cache: Tensor,
    page_table: Tensor | None,
    cache_seqlens: Sequence[int] | Tensor | int,
    *,
    cu_seqlens_q: Sequence[int] | Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    out_dtype: torch.dtype | None = None,
    p_parts: int = 2,
    num_parts: int = 1,
    raise_by: float = RAISE_BY,
) -> tuple[Tensor, Tensor]:
    """The ETAP pipeline, S^T = K Q^T and O^T += V^T P^T over 64-key tiles.

    The tiles of a request are cut into `num_parts` contiguous shares, one per CTA. In each share two warpgroups take
    alternate tiles, each with its own reference maximum m, sum l and O^T; or both work on every tile, which then has
    one of each: with more than 32 query rows (those of the longest request), and with more than 8 where `p_parts` is 2.
    S^T is fp32 of 16-bit products.
    P^T = exp2(S^T c - m); m starts as the first tile's maximum and is raised to a tile's maximum only where that
    exceeds it by more than `raise_by`, when l and O^T are rescaled. P^T is rounded to the input dtype in one part, or
    split into a high and a low one (`p_parts` = 2). l sums the unrounded P. Warpgroups, then shares, are merged in
    fp32; the output is rounded once, to `out_dtype` (default: the input dtype).
    """
    if p_parts not in (1, 2):
        raise ValueError(f"p_parts: {p_parts}, expected 1 or 2")
    scale = DEFAULT_SCALE if softmax_scale is None else softmax_scale
    groups = _tile_owners(q_nope, cu_seqlens_q, shared_above=8 if p_parts == 2 else 32)

    def attend(q: Tensor, k: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        m, l, ot = _stream_tiles(q, k, limits, scale * LOG2E, num_parts, groups, raise_by, p_parts)  # noqa: E741
        for group in (groups, num_parts):  # the warpgroups of a share, then the shares
            m, l, ot = _merge(m, l, ot, group)  # noqa: E741
        return _finish(ot[0].T, l[0], m[0])

    problem = (q_nope, q_rope, ckv_cache, kpe_cache, page_table, cache_seqlens, cu_seqlens_q, causal)
    return _per_request(*problem, attend, out_dtype or q_nope.dtype)


def _tile_owners(q_nope: Tensor, cu_seqlens_q: Sequence[int] | Tensor | None, shared_above: int) -> int:
    """2 where each warpgroup has tiles of its own, 1 where both work on every tile: above so many rows."""
    rows = max(query_lengths(q_nope, cu_seqlens_q), default=0) * q_nope.shape[-2]
    return 1 if rows > shared_above else 2


def etap_e4m3_model(
    q_nope: Tensor,
    q_rope: Tensor,
    ckv_cache: Tensor,
    kpe_cache: Tensor,
    page_table: Tensor | None,
    cache_seqlens: Sequence[int] | Tensor | int,
    *,
    cu_seqlens_q: Sequence[int] | Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    out_dtype: torch.dtype | None = None,
    p_parts: int = 2,
    num_parts: int = 1,
    raise_by: float = RAISE_BY,
    ckv_scale: float = 1.0,
    kpe_scale: float = 1.0,
    ckv_scale_arr: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`etap_model` for a float8_e4m3fn cache, whose elements fp16 holds exactly.

    Each row of Q is brought to fp16 times a power of two, so that its largest magnitude is in [2^13, 2^15), its rope
    part times kpe_scale / ckv_scale and in two fp16 parts. P^T is rounded to fp16, in `p_parts` parts. A score's factor
    is softmax_scale x ckv_scale over the row's power of two; the output's is ckv_scale. Both warpgroups work on every
    tile with more than 16 query rows.

    With scales for each key and 128 latent columns (`ckv_scale_arr`), or a rope part of 16 bits, the latent and the
    rope part of Q have a power of two each, a 16-bit rope part none; S^T is added up group by group in fp32, times the
    scale; P^T is rounded to fp16 once for each group, as P x scale over a power of two (see `_stream_scaled_tiles`);
    and both warpgroups work on every tile.
    """
    scale = DEFAULT_SCALE if softmax_scale is None else softmax_scale
    rope_e4m3 = kpe_cache.dtype == torch.float8_e4m3fn

    def attend_groups(q: Tensor, k: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        k, scales = k[:, : D_LATENT + D_ROPE], k[:, D_LATENT + D_ROPE :]
        log2_scale, q_rope = torch.tensor(scale * LOG2E, device=q.device), q[:, D_LATENT:].float()
        q16, down = _part_in_fp16(q[:, :D_LATENT].float())
        factors = (log2_scale * torch.tensor(ckv_scale, device=q.device) * down).clamp(-3e38, 3e38)
        rope_factors = log2_scale.expand(q.shape[0])
        if rope_e4m3:
            q_rope, down = _part_in_fp16(q_rope)
            rope_factors = (log2_scale * torch.tensor(kpe_scale, device=q.device) * down).clamp(-3e38, 3e38)
        q16 = torch.cat([q16, q_rope], 1)
        m, l, ot = _stream_scaled_tiles(  # noqa: E741
            q16, k, scales, limits, factors, rope_factors, num_parts, raise_by, p_parts
        )
        m, l, ot = _merge(m, l, ot, num_parts)  # noqa: E741
        o, lse = _finish(ot[0].T, l[0], m[0])
        return o * ckv_scale, lse

    if ckv_scale_arr is not None or not rope_e4m3:
        if ckv_scale_arr is None:
            ckv_scale_arr = torch.ones(*ckv_cache.shape[:2], D_LATENT // SCALE_GROUP, device=ckv_cache.device)
        kpe_cache = torch.cat([kpe_cache.float(), ckv_scale_arr], -1)
        problem = (q_nope, q_rope, ckv_cache.float(), kpe_cache, page_table, cache_seqlens, cu_seqlens_q, causal)
        return _per_request(*problem, attend_groups, out_dtype or q_nope.dtype)
    groups = _tile_owners(q_nope, cu_seqlens_q, shared_above=16)
    ratio = torch.tensor(kpe_scale, dtype=torch.float32) / torch.tensor(ckv_scale, dtype=torch.float32)

    def attend(q: Tensor, k: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        q16, down = _query_in_fp16(q.float(), ratio.to(q.device))
        factor = (torch.tensor(scale * LOG2E, device=q.device) * torch.tensor(ckv_scale, device=q.device)) * down
        m, l, ot = _stream_tiles(  # noqa: E741
            q16, k, limits, factor.clamp(-3e38, 3e38), num_parts, groups, raise_by, p_parts, torch.float16
        )
        for group in (groups, num_parts):  # the warpgroups of a share, then the shares
            m, l, ot = _merge(m, l, ot, group)  # noqa: E741
        o, lse = _finish(ot[0].T, l[0], m[0])
        return o * ckv_scale, lse

    ckv_cache, kpe_cache = ckv_cache.float(), kpe_cache.float()
    problem = (q_nope, q_rope, ckv_cache, kpe_cache, page_table, cache_seqlens, cu_seqlens_q, causal)
    return _per_request(*problem, attend, out_dtype or q_nope.dtype)


def query_major_model(
    q_nope: Tensor,
    q_rope: Tensor,
    ckv_cache: Tensor,
    kpe_cache: Tensor,
    page_table: Tensor | None,
    cache_seqlens: Sequence[int] | Tensor | int,
    *,
    cu_seqlens_q: Sequence[int] | Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    out_dtype: torch.dtype | None = None,
    num_parts: int = 1,
    partial_dtype: torch.dtype | None = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The usual pipeline, as FlashAttention-3 does it: S = Q K^T over 64-key tiles, a running maximum raised at every
    tile, P in 16 bits, O in fp32. `num_parts` splits are merged from normalised partial outputs in `partial_dtype`
    (float32 as FlashAttention-3 has it; None: the input dtype, as FlashInfer has it)."""
    scale = DEFAULT_SCALE if softmax_scale is None else softmax_scale

    def attend(q: Tensor, k: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        m, l, ot = _stream_tiles(q, k, limits, scale * LOG2E, num_parts, 1, 0.0, 1)  # noqa: E741
        if num_parts > 1:
            ot = torch.where(l[:, None] > 0, ot / l[:, None], 0.0).to(partial_dtype or q.dtype).float() * l[:, None]
        m, l, ot = _merge(m, l, ot, num_parts)  # noqa: E741
        return _finish(ot[0].T, l[0], m[0])

    problem = (q_nope, q_rope, ckv_cache, kpe_cache, page_table, cache_seqlens, cu_seqlens_q, causal)
    return _per_request(*problem, attend, out_dtype or q_nope.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces
# ---------------------------------------------------------------------------------------------------------------------


def _per_request(
    q_nope, q_rope, ckv_cache, kpe_cache, page_table, cache_seqlens, cu_seqlens_q, causal, attend: Attend, out_dtype
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs `attend` on every request and lays the results out as mla_decode does."""
    q_lens = query_lengths(q_nope, cu_seqlens_q)
    lengths = [cache_seqlens] * len(q_lens) if isinstance(cache_seqlens, int) else _ints(cache_seqlens)
    heads, ragged = q_nope.shape[-2], cu_seqlens_q is not None
    q_all = torch.cat([q_nope, q_rope], -1).flatten(0, -3)  # (tokens, heads, 576)
    out = torch.zeros(q_all.shape[0], heads, D_LATENT, dtype=out_dtype, device=q_nope.device)
    lse_dtype = torch.float64 if out_dtype == torch.float64 else torch.float32
    lse = torch.full((q_all.shape[0], heads), -math.inf, dtype=lse_dtype, device=q_nope.device)
    first = 0
    for i, (q_len, length) in enumerate(zip(q_lens, lengths, strict=True)):
        tokens = slice(first, first + q_len)
        first += q_len
        if q_len == 0 or length == 0:
            continue
        k = torch.cat([gather_keys(c, page_table, i, length) for c in (ckv_cache, kpe_cache)], -1)
        limits = visible_keys(length, q_len, heads, causal, q_nope.device)
        o, part = attend(q_all[tokens].flatten(0, 1), k, limits)
        out[tokens] = o.unflatten(0, (q_len, heads)).to(out_dtype)
        lse[tokens] = part.unflatten(0, (q_len, heads))
    if ragged:
        return out, lse.T.contiguous()
    return out.view(q_nope.shape), lse.unflatten(0, q_nope.shape[:2]).mT.contiguous()


def _stream_tiles(
    q: Tensor, k: Tensor, limits: Tensor, c: float | Tensor, num_parts: int, groups: int, raise_by: float, p_parts: int,
    p_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One request's tiles in `num_parts` shares of `groups` chains each, all chains in step.

    `c`, per row if a tensor, turns a product into log2 units; P is rounded to `p_dtype` (default: that of q). Returns
    each chain's reference maximum m (chains, rows) in log2 units, sum l (chains, rows) and unnormalised O^T
    (chains, 512, rows), fp32.
    """
    p_dtype = p_dtype or q.dtype
    order = _share_tiles(-(-k.shape[0] // TILE), num_parts, groups, k.device)
    tiles, qt = _tiles(k), q.float().T
    m = torch.full((order.shape[0], q.shape[0]), -math.inf, device=q.device)
    l, ot = torch.zeros_like(m), m.new_zeros(m.shape[0], D_LATENT, m.shape[1])  # noqa: E741  (the literature's l)
    for step in range(order.shape[1]):
        tile = order[:, step]
        kt = tiles[tile.clamp(min=0)]
        zt = _masked_tile(kt @ qt * c, tile, limits)
        m, l, alpha, pt = _softmax_step(zt, m, l, raise_by)  # noqa: E741
        rounded = pt.to(p_dtype).float()
        if p_parts == 2:
            rounded = rounded + (pt - rounded).to(p_dtype).float()  # exact: both parts fit in one float32
        ot = ot * alpha[:, None] + kt[:, :, :D_LATENT].mT @ rounded
    return m, l, ot


def _softmax_step(zt: Tensor, m: Tensor, l: Tensor, raise_by: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: E741
    """Reference maximum, sum, what O^T is rescaled by, and P^T, after a tile of scores (chains, keys, rows)."""
    top = zt.amax(1)
    raised = torch.where(top > m + raise_by, top, m)
    alpha = torch.where(raised > m, torch.exp2(m - _finite(raised)), 1.0)
    pt = torch.exp2(zt - _finite(raised)[:, None])
    return raised, l * alpha + pt.sum(1), alpha, pt


def _stream_scaled_tiles(
    q: Tensor, k: Tensor, scales: Tensor, limits: Tensor, factors: Tensor, rope_factors: Tensor, num_parts: int,
    raise_by: float, p_parts: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`_stream_tiles` where 128 latent columns of each key have a scale, (keys, 4), as fp32.

    A score is the rope product times the row's `rope_factors`, plus each group's product times scale x `factors`. P of
    a group is fp16(P x scale x 2^(133 - power)), where the power is the largest biased exponent of the chain's scales
    in the group so far, at least 7; O^T is rescaled as it grows, and multiplied by 2^(power - 133) at the end.
    """
    order = _share_tiles(-(-k.shape[0] // TILE), num_parts, 1, k.device)
    tiles, tile_scales = _tiles(k), _tiles(scales)
    groups, chains = range(D_LATENT // SCALE_GROUP), order.shape[0]
    columns = [slice(g * SCALE_GROUP, (g + 1) * SCALE_GROUP) for g in groups]
    qt = q.float().T
    m = torch.full((chains, q.shape[0]), -math.inf, device=q.device)
    l, ot = torch.zeros_like(m), m.new_zeros(chains, D_LATENT, m.shape[1])  # noqa: E741
    power = torch.full((chains, len(groups)), 7, dtype=torch.int32, device=q.device)
    for step in range(order.shape[1]):
        tile = order[:, step]
        kt, st = tiles[tile.clamp(min=0)], tile_scales[tile.clamp(min=0)]
        st = torch.where((tile < 0)[:, None, None], 0.0, st)
        zt = kt[:, :, D_LATENT:] @ qt[D_LATENT:] * rope_factors
        for g in groups:
            zt = zt + kt[:, :, columns[g]] @ qt[columns[g]] * (st[:, :, g, None] * factors)
        zt = _masked_tile(zt, tile, limits)
        m, l, alpha, pt = _softmax_step(zt, m, l, raise_by)  # noqa: E741
        before = power
        power = torch.maximum(power, st.abs().view(torch.int32).amax(1) >> 23)
        rescale, divide = _power_of_two(127 - (power - before)), _power_of_two(260 - power)
        for g in groups:
            scaled = pt * (st[:, :, g] * divide[:, g, None])[:, :, None]
            rounded = scaled.half().float()
            if p_parts == 2:
                rounded = rounded + (scaled - rounded).half().float()
            ot[:, columns[g]] *= alpha[:, None] * rescale[:, g, None, None]
            ot[:, columns[g]] += kt[:, :, columns[g]].mT @ rounded
    for g in groups:
        ot[:, columns[g]] *= _power_of_two(power - 6)[:, g, None, None]
    return m, l, ot


def _power_of_two(biased: Tensor) -> Tensor:
    """2^(biased - 127) as float32, 0 from -127 down."""
    return (biased.clamp(min=0).int() << 23).view(torch.float32)


def _part_in_fp16(q: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a part of Q with a power of two of their own: (q 2^e in fp16 precision, as float32; 2^-e per row)."""
    e = (q.abs().amax(1).contiguous().view(torch.int32) >> 23).clamp(15, 267)
    return (q * _power_of_two(268 - e)[:, None]).half().float(), _power_of_two(e - 14)


def _query_in_fp16(q: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of Q as the e4m3 kernel has them: (q 2^e in fp16 precision, as float32; 2^-e per row)."""

    def exponent(x: Tensor) -> Tensor:  # biased, 0 for what float32 holds as subnormal
        return x.abs().float().contiguous().view(torch.int32) >> 23

    latent, rope = q[:, :D_LATENT], q[:, D_LATENT:]
    of_rope = exponent(rope.abs().amax(1)) + exponent(ratio) - 126
    e = torch.maximum(exponent(latent.abs().amax(1)), of_rope).clamp(15, 267)
    up, down = (n.int().bitwise_left_shift(23).view(torch.float32) for n in (268 - e, e - 14))
    rope = rope * up[:, None] * ratio
    high = rope.half().float()
    return torch.cat([(latent * up[:, None]).half().float(), high + (rope - high).half().float()], 1), down


def _ints(values: Sequence[int] | Tensor) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else [int(v) for v in values]


def _finite(m: Tensor) -> Tensor:
    """m with -inf (nothing seen yet) as 0, so that exp2(-inf - m) is 0 and not NaN."""
    return torch.where(m == -math.inf, 0.0, m)


def _masked(scores: Tensor, limits: Tensor) -> Tensor:
    """(rows, keys) scores, -inf past each row's limit."""
    keys = torch.arange(scores.shape[1], device=scores.device)
    return scores.masked_fill(keys >= limits[:, None], -math.inf)


def _masked_tile(zt: Tensor, tile: Tensor, limits: Tensor) -> Tensor:
    """(chains, 64, rows) scores, -inf past each row's limit and in chains with no tile at this step."""
    keys = tile[:, None] * TILE + torch.arange(TILE, device=zt.device)
    hidden = (keys[:, :, None] >= limits) | (tile < 0)[:, None, None]
    return zt.masked_fill(hidden, -math.inf)


def _tiles(k: Tensor) -> Tensor:
    """(tiles, 64, 576) float32, the tail rows zero."""
    return torch.nn.functional.pad(k.float(), (0, 0, 0, -k.shape[0] % TILE)).unflatten(0, (-1, TILE))


def _share_tiles(count: int, num_parts: int, groups: int, device: torch.device) -> Tensor:
    """(num_parts * groups, steps) tile numbers: contiguous shares, each dealt to its `groups` in turn; -1: none."""
    bounds = [count * p // num_parts for p in range(num_parts + 1)]
    chains = [list(range(a + g, b, groups)) for a, b in itertools.pairwise(bounds) for g in range(groups)]
    steps = max(len(c) for c in chains)
    return torch.tensor([c + [-1] * (steps - len(c)) for c in chains], dtype=torch.long, device=device)


def _merge(m: Tensor, l: Tensor, ot: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:  # noqa: E741
    """Merges every `group` neighbouring chains of (m, l, O^T) into one, in fp32."""
    m, l, ot = (x.unflatten(0, (-1, group)) for x in (m, l, ot))  # noqa: E741
    top = m.amax(1)
    weight = torch.exp2(m - _finite(top)[:, None])
    return top, (l * weight).sum(1), (ot * weight[:, :, None]).sum(1)


def _finish(o: Tensor, l: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
    """(rows, 512) output and (rows,) LSE from an unnormalised O, its sum l and the reference maximum m (log2)."""
    out = torch.where(l[:, None] > 0, o / l[:, None], 0.0)
    return out, torch.where(l > 0, (m + l.log2()) / LOG2E, -math.inf)


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def error(out: Tensor, exact: Tensor) -> tuple[float, float]:
    """(RMSE, largest error) of `out` against fp64."""
    difference = out.double() - exact
    return difference.pow(2).mean().sqrt().item(), difference.abs().max().item()


def draw(
    batch: int, length: int, heads: int, q_len: int = 1, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple:
    """Positional arguments for the functions here: normal q and an unpaged cache, both views of one 576-wide buffer."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, q_len, heads, D_LATENT + D_ROPE, generator=generator).to(dtype)
    kv = torch.randn(batch, length, D_LATENT + D_ROPE, generator=generator).to(dtype)
    return q[..., :D_LATENT], q[..., D_LATENT:], kv[..., :D_LATENT], kv[..., D_LATENT:], None, length


def survey() -> list[dict[str, Any]]:
    """RMSE and largest error of every model against fp64, on the CPU: one dict for each problem and model.

    Keys: dtype, batch, kv_len, heads, model, and `rounded` and `float32`: (RMSE, largest error) with the output in the
    input's dtype and in float32.
    """
    models: dict[str, tuple[Callable, dict]] = {
        "query-major, 16-bit P": (query_major_model, {}),
        "query-major, 4 splits merged in 16 bits": (query_major_model, {"num_parts": 4, "partial_dtype": None}),
        "ETAP, 16-bit P": (etap_model, {"p_parts": 1}),
        "ETAP, P in two 16-bit parts": (etap_model, {}),
        "ETAP, P in two 16-bit parts, 4 CTAs": (etap_model, {"num_parts": 4}),
    }
    found = []
    for dtype, length in ((torch.bfloat16, 1000), (torch.bfloat16, 4096), (torch.float16, 4096)):
        problem = draw(2, length, 16, dtype=dtype)
        exact = reference(*problem)[0]
        shape = {"dtype": str(dtype).removeprefix("torch."), "batch": 2, "kv_len": length, "heads": 16}
        for name, (model, options) in models.items():
            rounded, wide = (error(model(*problem, **options, out_dtype=d)[0], exact) for d in (dtype, torch.float32))
            found.append({**shape, "model": name, "rounded": rounded, "float32": wide})
    return found


def show(found: list[dict[str, Any]]) -> None:
    """Prints what `survey` returned."""
    title = None
    for one in found:
        newer = "{dtype}, batch {batch}, {kv_len} keys, {heads} heads: error against fp64, RMSE (largest)".format(**one)
        if newer != title:
            print(title := newer)
        errors = (("16-bit", one["rounded"]), ("float32", one["float32"]))
        columns = [f"{kind} {e[0]:.2e} ({e[1]:.1e})" for kind, e in errors]
        print(f"  {one['model']:42} {columns[0]}   {columns[1]}")


def main() -> None:
    """Prints RMSE and largest error of every model against fp64 on the CPU."""
    show(survey())


if __name__ == "__main__":
    main()
