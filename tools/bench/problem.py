"""MLA decode problems: their shapes, their tensors, and an fp64 reference.

Sizes are counted in tokens, pages and elements unless a name says bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from etap_integration import tokens
from etap_integration.numerics import SCALE_GROUP

DIM_LATENT = 512
DIM_ROPE = 64
DIM_QK = DIM_LATENT + DIM_ROPE

KV_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn}
"""Caches whose elements are all of one type."""

FP8_DS_MLA = "fp8_ds_mla"
"""A token of 656 bytes, as vLLM calls it: see `etap_integration.split_token_cache`."""

TOKEN_BYTES = {name: DIM_QK * dtype.itemsize for name, dtype in KV_DTYPES.items()} | {FP8_DS_MLA: tokens.TOKEN_BYTES}


@dataclass(frozen=True, order=True)
class Problem:
    """One decode step: `batch` requests of `q_len` new tokens each, over `kv_len` cached tokens each, or fewer.

    Attributes:
        batch: number of requests.
        kv_len: cached tokens of every request, the new ones included; of the longest, where they are drawn.
        heads: query heads; all share the one latent KV head.
        q_len: query tokens per request; above 1 the mask is causal, aligned to the end of the cache.
        page_size: tokens per cache page; pages are scattered over the cache in random order.
        kv_dtype: `bf16`, `fp16`, `e4m3` or `fp8_ds_mla` (queries stay 16-bit, bf16 beside the last two).
        seed: seed of the random values, of the page order and of drawn lengths.
        shortest: 0, or least of the cached tokens that requests have: `lengths` are drawn from here to `kv_len`.
    """

    batch: int
    kv_len: int
    heads: int = 16
    q_len: int = 1
    page_size: int = 64
    kv_dtype: str = "bf16"
    seed: int = 0
    shortest: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "kv_len", "heads", "q_len", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.kv_dtype not in TOKEN_BYTES:
            raise ValueError(f"kv_dtype must be one of {', '.join(TOKEN_BYTES)}, got {self.kv_dtype!r}")
        if self.shortest and not self.q_len <= self.shortest <= self.kv_len:
            raise ValueError(f"shortest must be 0 or from q_len {self.q_len} to {self.kv_len}, got {self.shortest}")

    @property
    def rows(self) -> int:
        """Query rows that share one pass over a request's cache: query tokens times heads."""
        return self.q_len * self.heads

    @property
    def causal(self) -> bool:
        """Whether the mask is causal; with one query token it would mask nothing."""
        return self.q_len > 1

    @property
    def softmax_scale(self) -> float:
        """Factor of the logits before the softmax."""
        return DIM_QK**-0.5

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Cached tokens of each request, int32 (batch,) on the host: evenly distributed where they are drawn."""
        generator = torch.Generator().manual_seed(self.seed + 2)
        first = self.shortest or self.kv_len
        return torch.randint(first, self.kv_len + 1, (self.batch,), generator=generator, dtype=torch.int32)

    @cached_property
    def cached_tokens(self) -> int:
        """Cached tokens of all requests."""
        return int(self.lengths.sum())

    @property
    def pages_per_request(self) -> int:
        """Pages that hold the longest request's cached tokens, the last one possibly in part."""
        return -(-self.kv_len // self.page_size)

    @property
    def cache_tokens(self) -> int:
        """Token slots of the whole cache, the unused tail of last pages included."""
        return self.batch * self.pages_per_request * self.page_size

    @property
    def kv_bytes(self) -> int:
        """Bytes of cache that any kernel has to read at least once."""
        return self.cached_tokens * TOKEN_BYTES[self.kv_dtype]

    @property
    def memory_bytes(self) -> int:
        """Bytes of device memory that the tensors take: the cache twice (fused and split), and the page table."""
        cache = self.cache_tokens * TOKEN_BYTES[self.kv_dtype]
        return 2 * cache + 4 * self.batch * self.pages_per_request

    @property
    def flops(self) -> int:
        """Useful floating-point operations of both matrix products, masked positions counted too."""
        return 2 * self.rows * self.cached_tokens * (DIM_QK + DIM_LATENT)

    def __str__(self) -> str:
        lengths = f"{self.shortest}..{self.kv_len}" if self.shortest else f"{self.kv_len}"
        return f"b={self.batch} kv={lengths} h={self.heads} sq={self.q_len} page={self.page_size} {self.kv_dtype}"


class KvPool:
    """Random token rows that every problem of a run takes a prefix of, so that no cache is filled twice.

    Args:
        tokens: token rows to hold.
        kv_dtype: type of the cache, see `Problem.kv_dtype`.
        device: torch device.
        seed: seed of the values.

    Attributes:
        rows: uint8 (tokens, bytes), see `columns`.
    """

    _CHUNK = 1 << 20

    def __init__(self, tokens: int, kv_dtype: str, device: str = "cuda", seed: int = 0) -> None:
        self.tokens, self.kv_dtype = tokens, kv_dtype
        generator = torch.Generator(device).manual_seed(seed)
        self.rows = torch.empty(tokens, TOKEN_BYTES[kv_dtype], dtype=torch.uint8, device=device)
        for start in range(0, tokens, self._CHUNK):
            latent, rope, scales = columns(self.rows[None, start : start + self._CHUNK], kv_dtype)
            values = torch.randn(latent.shape[1], DIM_QK, device=device, generator=generator)
            latent.copy_(values[:, :DIM_LATENT])
            rope.copy_(values[:, DIM_LATENT:])
            if scales is not None:
                scales.uniform_(0.5, 1.5, generator=generator)

    @cached_property
    def split(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same rows as two contiguous tensors: latent (tokens, 512) and rope (tokens, 64)."""
        latent, rope, _ = columns(self.rows[None], self.kv_dtype)
        return latent[0].contiguous(), rope[0].contiguous()

    def widened(self, slots: torch.Tensor) -> torch.Tensor:
        """The values of the tokens in some slots (any shape of indices) in fp64, (..., 576)."""
        latent, rope, scales = columns(self.rows[slots.flatten()][None], self.kv_dtype)
        wide = latent.double()
        if scales is not None:
            wide *= scales.repeat_interleave(SCALE_GROUP, -1)
        return torch.cat([wide, rope.double()], -1)[0].unflatten(0, slots.shape)


Columns = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def columns(rows: torch.Tensor, kv_dtype: str) -> Columns:
    """Rows of bytes (pages, page_size, bytes) as what they hold: latent (..., 512), rope (..., 64), and where there are
    some scales (..., 4)."""
    if kv_dtype == FP8_DS_MLA:
        latent, scales, rope = tokens.split_token_cache(rows)
        return latent, rope, scales
    latent, rope = rows.view(KV_DTYPES[kv_dtype]).split([DIM_LATENT, DIM_ROPE], -1)
    return latent, rope, None


class Inputs:
    """The tensors of one problem, drawn from a pool.

    Attributes:
        q_nope, q_rope: queries, (batch, q_len, heads, 512) and (batch, q_len, heads, 64).
        page_table: int32 (batch, pages_per_request), a permutation of all pages.
        cache_seqlens: int32 (batch,), cached tokens of each request.
        page_indptr: int32 (batch + 1,) on the host, where each request's pages begin in `page_indices`.
        page_indices: int32, the pages in use, request by request.
    """

    def __init__(self, problem: Problem, pool: KvPool) -> None:
        if pool.kv_dtype != problem.kv_dtype or pool.tokens < problem.cache_tokens:
            raise ValueError(f"a pool of {pool.tokens} {pool.kv_dtype} tokens does not serve {problem}")
        self.problem, self.pool = problem, pool
        device = pool.rows.device
        generator = torch.Generator(device).manual_seed(problem.seed + 1)
        dtype = torch.float16 if problem.kv_dtype == "fp16" else torch.bfloat16
        shape = (problem.batch, problem.q_len, problem.heads)
        self.q_nope = torch.randn(*shape, DIM_LATENT, device=device, generator=generator).to(dtype)
        self.q_rope = torch.randn(*shape, DIM_ROPE, device=device, generator=generator).to(dtype)
        pages = problem.batch * problem.pages_per_request
        order = torch.randperm(pages, device=device, generator=generator, dtype=torch.int32)
        self.page_table = order.view(problem.batch, problem.pages_per_request)
        self.cache_seqlens = problem.lengths.to(device)
        counts = (problem.lengths + problem.page_size - 1) // problem.page_size
        self.page_indptr = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        used = torch.arange(problem.pages_per_request) < counts[:, None]
        self.page_indices = self.page_table[used.to(device)]

    def _paged(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[: self.problem.cache_tokens].unflatten(0, (-1, self.problem.page_size))

    @property
    def fused_caches(self) -> Columns:
        """Latent (pages, page_size, 512), rope (pages, page_size, 64) and scales (pages, page_size, 4) or None, as
        views of one buffer."""
        return columns(self._paged(self.pool.rows), self.problem.kv_dtype)

    @property
    def split_caches(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Latent and rope as two contiguous tensors."""
        latent, rope = self.pool.split
        return self._paged(latent), self._paged(rope)

    def reference(self, chunk_bytes: int = 1 << 30) -> tuple[torch.Tensor, torch.Tensor]:
        """fp64 attention: output (batch, q_len, heads, 512) and natural-log LSE (batch, heads, q_len).

        Args:
            chunk_bytes: most bytes of widened cache held at once.
        """
        parts = list(self.reference_chunks(chunk_bytes))
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])

    def reference_chunks(self, chunk_bytes: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """`reference` of some requests at a time, of one at least."""
        p = self.problem
        requests = max(1, chunk_bytes // (8 * DIM_QK * p.pages_per_request * p.page_size))
        queries = torch.cat([self.q_nope, self.q_rope], -1)
        of_page = torch.arange(p.page_size, device=queries.device)
        for start in range(0, p.batch, requests):
            part = slice(start, start + requests)
            slots = self.page_table[part].long()[..., None] * p.page_size + of_page
            kv = self.pool.widened(slots.flatten(1)[:, : p.kv_len])
            logits = queries[part].double().flatten(1, 2) @ kv.transpose(1, 2) * p.softmax_scale
            logits = logits.unflatten(1, (p.q_len, p.heads))
            token = torch.arange(p.q_len, device=kv.device)  # sees the cache up to itself, aligned at the end
            limits = self.cache_seqlens[part, None] - (p.q_len - 1 - token)
            keep = torch.arange(p.kv_len, device=kv.device) < limits[..., None]
            logits = logits.masked_fill(~keep[:, :, None], float("-inf"))
            lse = logits.logsumexp(-1)
            weights = (logits - lse[..., None]).exp()
            out = (weights.flatten(1, 2) @ kv[..., :DIM_LATENT]).unflatten(1, (p.q_len, p.heads))
            yield out, lse.transpose(1, 2)
