"""Decode problems: drawn from a seed, built on any device, and judged against fp64.

A problem's cache is NaN wherever a kernel has no business: unreferenced pages, the tail of each last page, padding
between rows and pages. Page ids past a request's last page are -1, one too many, or as far out as int32 goes.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from etap_integration import numerics, tokens

PAGE_SIZES = (1, 2, 4, 8, 16, 24, 32, 64, 100, 128)
HEADS = (1, 5, 8, 16, 17, 32, 64, 128)
CACHE_LAYOUTS = ("views", "views", "separate", "padded", "odd")
QUERY_LAYOUTS = ("contiguous", "views", "transposed", "misaligned", "offset")
LOGITS = ("normal", "extreme", "rising", "falling")
HALF_ULP = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-25}


@dataclass(frozen=True)
class Problem:
    """One call of mla_decode. `page_size` 0: an unpaged cache; `q_lens` None: not ragged, `sq` tokens each."""

    lengths: tuple[int, ...]
    heads: int = 16
    sq: int = 1
    q_lens: tuple[int, ...] | None = None
    page_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    e4m3: bool = False  # the cache is float8_e4m3fn
    scales: tuple[float, float] = (1.0, 1.0)  # ckv_scale and kpe_scale, where e4m3
    scale_form: str = "float"  # or tensor: on the device
    groups: int | None = None  # scales of each key and 128 latent columns, up to 2^groups apart from one another
    rope16: bool = False  # kpe_cache in the queries' dtype beside an e4m3 ckv_cache
    q_scale: float = 1.0  # of q as drawn
    cache_scale: float = 1.0  # of a 16-bit cache as drawn; q is divided by it, so that logits stay what they are
    out_dtype: torch.dtype | None = None
    causal: bool = False
    cache_layout: str = "views"
    query_layout: str = "contiguous"
    logits: str = "normal"
    softmax_scale: float | None = None
    precise: bool | None = None
    num_ctas: int | None = None
    poison: float = math.nan
    seed: int = 0

    @property
    def query_lengths(self) -> tuple[int, ...]:
        return self.q_lens if self.q_lens is not None else (self.sq,) * len(self.lengths)

    @property
    def rows(self) -> int:
        """Query rows of the KV head that the launch is told of: heads x tokens of the longest request."""
        return max((self.sq, *self.query_lengths)) * self.heads

    def with_(self, **changes: Any) -> Problem:
        return replace(self, **changes)


@dataclass
class Built:
    """A problem's tensors: `args` and `options` are mla_decode's, host copies of lengths beside them."""

    problem: Problem
    args: tuple
    options: dict[str, Any]
    logit_bound: float

    def reference(self, model=numerics.reference, **more: Any) -> tuple[Tensor, Tensor]:
        """A function of `numerics` on this problem."""
        p = self.problem
        cu = None if p.q_lens is None else cumulative(p.q_lens)
        options = {"cu_seqlens_q": cu, "softmax_scale": p.softmax_scale, "causal": p.causal, **more}
        ckv, kpe = self.args[2:4]
        arr = self.options.get("ckv_scale_arr")
        if p.e4m3 and model is not numerics.etap_e4m3_model:
            ckv, kpe = (c.double() * f for c, f in zip((ckv, kpe), p.scales, strict=True))
            if arr is not None:
                ckv = (ckv.unflatten(-1, (4, 128)) * arr.double()[..., None]).flatten(-2)
        elif p.e4m3:
            options |= dict(zip(("ckv_scale", "kpe_scale"), p.scales, strict=True)) | {"ckv_scale_arr": arr}
        return model(*self.args[:2], ckv, kpe, self.args[4], p.lengths, **options)

    def new_out(self) -> Tensor:
        """A poisoned output."""
        q = self.args[0]
        return torch.full(q.shape, math.nan, dtype=self.problem.out_dtype or q.dtype, device=q.device)


def cumulative(q_lens: tuple[int, ...]) -> list[int]:
    """cu_seqlens_q."""
    ends = [0]
    for n in q_lens:
        ends.append(ends[-1] + n)
    return ends


def draw_e4m3(seed: int) -> Problem:
    """A problem with a float8_e4m3fn cache for a seed."""
    r, p = random.Random(seed + 1000003), draw(seed)
    scales = r.choice(((1.0, 1.0), (0.0625, 0.0625), (0.375, 1.875), (3.0, 0.0107421875)))
    up = r.choice((0, 0, 0, 40, -40)) if p.dtype == torch.bfloat16 else 0  # logits stay what they are
    return p.with_(
        e4m3=True,
        cache_scale=1.0,
        scales=tuple(s * 2.0**-up for s in scales),
        scale_form=r.choice(("float", "tensor")),
        q_scale=2.0**up,
        precise=r.choice((None, None, True, False)),
    )


def draw_groups(seed: int) -> Problem:
    """A problem with an e4m3 cache and scales of groups, or a 16-bit rope part, or both, for a seed."""
    r, p = random.Random(seed + 2000003), draw_e4m3(seed)
    form = r.choice(("groups", "groups", "both", "both", "both", "rope16"))
    ckv_scale, kpe_scale = p.scales
    if form != "rope16":
        ckv_scale = 1.0
    if form != "groups":
        kpe_scale = 1.0
    if p.q_scale != 1.0:  # which scales make up for: not all of these problems have both
        p, ckv_scale, kpe_scale = p.with_(q_scale=1.0), 1.0, 1.0
    return p.with_(
        groups=None if form == "rope16" else r.choice((0, 2, 6, 12)),
        rope16=form != "groups",
        scales=(ckv_scale, kpe_scale),
    )


def draw(seed: int) -> Problem:
    """A problem for a seed: every axis at random, with a taste for edges."""
    r = random.Random(seed)
    page_size = r.choice((0, *PAGE_SIZES, *PAGE_SIZES))
    heads, sq = r.choice(HEADS), r.choice((1, 1, 1, 2, 3, 4, 5, 6, 7, 8))
    edge = page_size or 64
    edges = (0, 1, 63, 64, 65, 127, 128, 129, edge - 1, edge, edge + 1, 2 * edge - 1, 2 * edge, 2 * edge + 1)

    def length() -> int:
        return r.choice((r.choice(edges), r.choice(edges), r.randint(0, 200), r.randint(200, 900)))

    batch = r.choice((1, 1, 2, 3, 4, 5, 7, 9))
    lengths = [length() for _ in range(batch)]
    if r.random() < 0.2:
        lengths[r.randrange(batch)] = r.randint(1000, 6000)
    ragged = r.random() < 0.3
    drawn = Problem(
        lengths=tuple(lengths),
        heads=heads,
        sq=sq,
        q_lens=tuple(r.randint(0, sq) for _ in range(batch)) if ragged else None,
        page_size=page_size,
        dtype=r.choice((torch.bfloat16, torch.bfloat16, torch.float16)),
        out_dtype=r.choice((None, None, torch.float32)),
        causal=r.random() < 0.6,
        cache_layout=r.choice(CACHE_LAYOUTS),
        query_layout=r.choice(QUERY_LAYOUTS),
        logits=r.choice(("normal", "normal", *LOGITS)),
        softmax_scale=r.choice((None, None, 0.07, 192**-0.5)),
        precise=r.choice((None, None, True, False)),
        num_ctas=r.choice((None, None, None, 1, 7, 78)),
        seed=seed,
    )
    # In and out of fp16's range, which partial results of bf16 problems are kept in.
    return drawn.with_(cache_scale=2.0 ** r.choice((0, 0, 0, 10, 17, -20)) if drawn.dtype == torch.bfloat16 else 1.0)


def reduced() -> list[Problem]:
    """Few and short problems, for tools that take their time, such as compute-sanitizer.

    Every kernel with TMA and with gathers; those of bf16 also with boxes of part of a tile, and element by element. The
    CTAs go round each of their rings, have more pieces than they keep, and merge.
    """
    lengths = (330, 64, 0, 200, 70, 1, 65, 3, 129)
    sixteen = [{"heads": h} for h in (8, 16, 32, 64)]
    e4m3 = [{"heads": h, "e4m3": True, "scales": (0.375, 1.875)} for h in (8, 16, 32)]
    groups = [{"heads": h, "e4m3": True, "groups": 6, "rope16": r} for h in (16, 32) for r in (False, True)]
    kernels = [{**k, "precise": p} for k in (*sixteen, *e4m3, *groups) for p in (True, False)]
    caches = {
        torch.bfloat16: [
            {"page_size": 64},
            {"page_size": 16},
            {"page_size": 1},
            {"page_size": 16, "cache_layout": "odd"},
        ],
        torch.float16: [{"page_size": 64}, {"page_size": 1}],
    }
    problems = [
        Problem(lengths, dtype=dtype, num_ctas=2, out_dtype=torch.float32 if i % 3 == 2 else None, **cache, **kernel)
        for dtype, of_type in caches.items()
        for cache in of_type
        for i, kernel in enumerate(kernels)
    ]
    rope16 = Problem(lengths, e4m3=True, rope16=True, num_ctas=2)  # no scales of groups beside it
    many = tuple(37 * i % 65 * (i % 3 == 0) for i in range(140))  # lengths in shared memory; dealt by rank
    for page_size in (64, 1):
        problems.append(rope16.with_(page_size=page_size))
        problems.append(Problem(many, page_size=page_size, num_ctas=5))
        problems.append(
            Problem(lengths, heads=8, sq=3, causal=True, page_size=page_size, q_lens=(0, 3, 1, 2, 3, 1, 1, 2, 3))
        )
    return problems


def build(p: Problem, device: torch.device | str) -> Built:
    """The problem's tensors on `device`."""
    generator = torch.Generator(device).manual_seed(p.seed)
    r = random.Random(p.seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    tokens, keys = sum(p.query_lengths), sum(p.lengths)
    q, kv = normal(tokens, p.heads, 576), normal(keys, 576)
    scale = p.softmax_scale or numerics.DEFAULT_SCALE
    if p.logits == "extreme":  # |logit| up to about 1e4
        q *= 2500 / (24 * scale)
    elif p.logits in ("rising", "falling"):  # the maximum keeps moving, or is the first key's
        ramp = torch.cat([torch.linspace(-40, 40, n, device=device) for n in p.lengths])
        q[..., -1], kv[:, -1] = 1 / scale, ramp if p.logits == "rising" else -ramp
    q, kv = q * (p.q_scale / p.cache_scale), kv * p.cache_scale
    q, rope = q.to(p.dtype), kv[:, 512:].to(p.dtype)
    kv = kv.to(torch.float8_e4m3fn if p.e4m3 else p.dtype)
    key_scales = None
    if p.groups is not None:  # log-uniform, the largest 1
        key_scales = torch.exp2(-p.groups * torch.rand(keys, 4, generator=generator, device=device))
    bound = scale * (_norm(q) * _norm(kv) * max(p.scales))

    table, pages, slots = _place(p, r, device)
    ckv, kpe, arr = _caches(p, pages, device)
    if keys:
        for cache, part in ((ckv, kv[:, :512]), (kpe, rope if p.rope16 else kv[:, 512:])):
            _bits(cache)[slots] = _bits(part)
        if arr is not None:
            arr[slots] = key_scales
    q_nope, q_rope = _queries(p, q)
    lengths = torch.tensor(p.lengths, dtype=torch.int32, device=device)
    options: dict[str, Any] = {
        "softmax_scale": p.softmax_scale, "causal": p.causal, "precise": p.precise, "num_ctas": p.num_ctas,
    }  # fmt: skip
    if p.e4m3 and p.scales != (1.0, 1.0):
        scales = [torch.tensor([s], device=device) if p.scale_form == "tensor" else s for s in p.scales]
        options |= {} if arr is not None else {"ckv_scale": scales[0]}
        options |= {} if p.rope16 else {"kpe_scale": scales[1]}
    if arr is not None:
        options["ckv_scale_arr"] = arr
    if p.q_lens is not None:
        cu = torch.tensor(cumulative(p.q_lens), dtype=torch.int32, device=device)
        options |= {"cu_seqlens_q": cu, "max_seqlen_q": max(p.sq, *p.q_lens)}
    return Built(p, (q_nope, q_rope, ckv, kpe, table, lengths), options, bound)


def _bits(x: Tensor) -> Tensor:
    """x, or an e4m3 tensor's bytes, which more operations are defined for."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _norm(rows: Tensor) -> float:
    return rows.double().norm(dim=-1).max().item() if rows.numel() else 0.0


def _place(p: Problem, r: random.Random, device) -> tuple[Tensor | None, int, tuple[Tensor, Tensor]]:
    """(page table or None, number of pages or requests, (page, offset) of every key in order)."""
    batch = len(p.lengths)
    positions = torch.cat([torch.arange(n) for n in p.lengths]) if batch else torch.arange(0)
    request = torch.repeat_interleave(torch.arange(batch), torch.tensor(p.lengths, dtype=torch.long))
    if p.page_size == 0:
        return None, batch, (request.to(device), positions.to(device))
    used = [-(-n // p.page_size) for n in p.lengths]
    pages = sum(used) + 1 + r.randint(0, 3)
    shuffled = torch.randperm(pages, generator=torch.Generator().manual_seed(p.seed)).int()
    width = max(used, default=0) + r.randint(1, 3)
    stray = torch.tensor([-1, pages, 2**31 - 1, -(2**31)], dtype=torch.int32)
    table = stray[torch.arange(batch * (width + 3)) % 4].view(batch, width + 3)
    first = 0
    for i, n in enumerate(used):
        table[i, :n] = shuffled[first : first + n]
        first += n
    page = table[request, positions // p.page_size].long()
    slots = (page.to(device), (positions % p.page_size).to(device))
    return table.to(device)[:, :width], pages, slots  # a row stride wider than the table


def _caches(p: Problem, pages: int, device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both caches and the scales of groups, all poison."""
    rows = p.page_size or max(p.lengths, default=0) + 2

    def poisoned(n: int, dtype: torch.dtype) -> Tensor:
        if dtype == torch.float8_e4m3fn:  # NaN with either sign
            byte = {True: (0x7F, 0xFF)[p.seed % 2], False: 0}[math.isnan(p.poison)]
            return torch.full((n,), byte, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        return torch.full((n,), p.poison, dtype=dtype, device=device)

    latent = torch.float8_e4m3fn if p.e4m3 else p.dtype
    rope = p.dtype if p.rope16 else latent
    if p.cache_layout == "views" and p.rope16 and p.groups is not None:  # 656 bytes a token
        buffer = torch.empty(pages, rows, tokens.TOKEN_BYTES, dtype=torch.uint8, device=device)
        ckv, arr, kpe = tokens.split_token_cache(buffer, p.dtype)
        _bits(ckv).copy_(_bits(poisoned(1, latent)).expand(ckv.shape))
        return ckv, kpe.fill_(p.poison), arr.fill_(p.poison)
    if p.cache_layout == "views" and not p.rope16:
        buffer = poisoned(pages * rows * 576, latent).view(pages, rows, 576)
        arr = poisoned(pages * rows * 4, torch.float32).view(pages, rows, 4) if p.groups is not None else None
        return buffer[..., :512], buffer[..., 512:], arr
    wide = {"separate": 0, "views": 0, "padded": 16, "odd": 1}[p.cache_layout]  # 1: rows are not 16-byte aligned

    def cache(width: int, after_page: int, dtype: torch.dtype) -> Tensor:
        extra = wide // (dtype.itemsize if wide > 1 else 1)
        row = width + extra
        page = rows * row + after_page * extra
        return poisoned(pages * page, dtype).as_strided((pages, rows, width), (page, row, 1))

    arr = cache(4, 7, torch.float32) if p.groups is not None else None
    return cache(512, 3, latent), cache(64, 5, rope), arr


def _queries(p: Problem, q: Tensor) -> tuple[Tensor, Tensor]:
    """q (tokens, heads, 576) as q_nope and q_rope in the problem's layout and shape."""
    if p.query_layout == "misaligned":
        q = torch.nn.functional.pad(q, (1, 0))[..., 1:]
    parts = q[..., :512], q[..., 512:]
    if p.query_layout == "contiguous":
        parts = parts[0].contiguous(), parts[1].contiguous()
    elif p.query_layout == "offset":  # contiguous, but one element past an aligned address
        parts = tuple(torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in parts)
    elif p.query_layout == "transposed":
        parts = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in parts)
    if p.q_lens is not None:
        return parts
    return tuple(x.unflatten(0, (len(p.lengths), p.sq)) for x in parts)


def default_p_parts(problem: Problem, sms: int = 132) -> int:
    """16-bit parts of P where `precise` does not say (csrc/etap/launch.h)."""
    if problem.precise is not None:
        return 2 if problem.precise else 1
    return 1 if sms == 78 or problem.e4m3 else 2


def gpu_p_parts(problem: Problem) -> int:
    """The same on the GPU at hand."""
    return default_p_parts(problem, torch.cuda.get_device_properties(0).multi_processor_count)


def judge(built: Built, out: Tensor, lse: Tensor | None, p_parts: int, rounded: Tensor | None = None) -> None:
    """Asserts that `out` and `lse` are as good as a kernel's should be that computes P in `p_parts` 16-bit parts.

    Against fp64: everything finite; the largest error at most twice, and RMS at most 1.5 times (1.1 times with two
    parts), that of `rounded_reference`, plus P's own rounding where the reference happens to have none; a tenth of that
    for two parts and float32 output, where nothing but P is rounded; each row's largest error likewise, plus half an
    ulp of the output, and with one part twice what P's rounding moves such a row by; LSE within 1e-5, -inf exactly
    where no key is seen.
    """
    p = built.problem
    exact, exact_lse = built.reference()
    if rounded is None:
        rounded = built.reference(numerics.rounded_reference, out_dtype=p.out_dtype)[0]
    assert out.dtype == (p.out_dtype or p.dtype) and out.shape == exact.shape, (out.dtype, out.shape, p)
    if out.numel():
        bad = ~out.isfinite()
        assert not bad.any(), f"{int(bad.sum())} of {out.numel()} outputs not finite, first {_first(bad)}: {p}"
        part = 2.0**-9 if p.dtype == torch.bfloat16 and not p.e4m3 else 2.0**-12
        if p.groups is not None:  # P x scale is rounded, to half an ulp, where P alone is 1 and exact
            part = 2.0**-11
        # wgmma truncates where it adds: at most 2^-23 of a score in each of 36 steps, some quarter of that seen (by one
        # row in 4,032, at logits of 100); it goes through exp.
        own = (part if p_parts == 1 else 4 * part * part) + 2.0**-20 * (1 + built.logit_bound)
        ours, theirs = (out.double() - exact).abs(), (rounded.double() - exact).abs()
        size = exact.abs()
        rms = [x.pow(2).mean().sqrt().item() for x in (ours, theirs, size)]
        by_rms, by_max = (1.5, 2.0) if p_parts == 1 else (0.1, 0.2) if out.dtype == torch.float32 else (1.1, 2.0)
        limit = by_rms * rms[1] + own * rms[2] + 1e-30
        assert rms[0] <= limit, f"RMSE {rms[0]:.3e} > {limit:.3e}, reference's {rms[1]:.3e}: {p}"
        limit = by_max * theirs.max() + own * size.max() + 1e-30
        assert ours.max() <= limit, f"error {ours.max():.3e} > {limit:.3e} at {_first(ours == ours.max())}: {p}"
        row_limit = by_max * theirs.amax(-1) + (own + HALF_ULP[out.dtype]) * size.amax(-1) + 1e-30
        if p_parts == 1:
            row_limit += 2 * part * built.reference(_sway)[0].amax(-1)
        over = ours.amax(-1) > row_limit
        assert not over.any(), f"{int(over.sum())} rows of {over.numel()} too far off, first {_first(over)}: {p}"
    if lse is not None:
        assert lse.dtype == torch.float32 and lse.shape == exact_lse.shape, (lse.dtype, lse.shape, p)
        unseen = exact_lse == -math.inf
        assert torch.equal(lse == -math.inf, unseen), f"LSE -inf in the wrong place: {p}"
        error = torch.where(unseen, 0.0, lse.double() - exact_lse).abs()
        limit = 1e-5 * (1 + exact_lse.abs()) + 2.0**-22 * built.logit_bound
        over = ~unseen & ~(error <= limit)
        assert not over.any(), f"LSE off by {error.nan_to_num(math.inf).max():.3e}, first {_first(over)}: {p}"


def _sway(*problem: Any, cu_seqlens_q: list[int] | None, softmax_scale: float | None, causal: bool) -> tuple:
    """Root of the sum over keys of (p v)^2: how far errors of 1 in each p, relative and independent, move an output.

    The output itself is no measure of that: values of unlike sign cancel in it.
    """
    scale = numerics.DEFAULT_SCALE if softmax_scale is None else softmax_scale

    def attend(q: Tensor, k: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
        k = k.double()
        scores = numerics._masked(q.double() @ k.T * scale, limits)
        lse = scores.logsumexp(-1)
        p = torch.exp(scores - numerics._finite(lse)[:, None])
        return (p**2 @ k[:, : numerics.D_LATENT] ** 2).sqrt(), lse

    return numerics._per_request(*problem, cu_seqlens_q, causal, attend, torch.float64)


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())
