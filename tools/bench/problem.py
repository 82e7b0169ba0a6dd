"""MLA decode problems: their shapes, their tensors, and an fp64 reference.

Sizes are counted in tokens, pages and elements unless a name says bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

DIM_LATENT = 512
DIM_ROPE = 64
DIM_QK = DIM_LATENT + DIM_ROPE

KV_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": torch.float8_e4m3fn}
_ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "e4m3": 1}


@dataclass(frozen=True, order=True)
class Problem:
    """One decode step: `batch` requests of `q_len` new tokens each, over `kv_len` cached tokens each.

    Attributes:
        batch: number of requests.
        kv_len: cached tokens of every request, the new ones included.
        heads: query heads; all share the one latent KV head.
        q_len: query tokens per request; above 1 the mask is causal, aligned to the end of the cache.
        page_size: tokens per cache page; pages are scattered over the cache in random order.
        kv_dtype: `bf16`, `fp16` or `e4m3` (queries stay 16-bit, bf16 beside an e4m3 cache).
        seed: seed of the random values and of the page order.
    """

    batch: int
    kv_len: int
    heads: int = 16
    q_len: int = 1
    page_size: int = 64
    kv_dtype: str = "bf16"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "kv_len", "heads", "q_len", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, got {self.kv_dtype!r}")

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

    @property
    def pages_per_request(self) -> int:
        """Pages that hold one request's cached tokens, the last one possibly in part."""
        return -(-self.kv_len // self.page_size)

    @property
    def cache_tokens(self) -> int:
        """Token slots of the whole cache, the unused tail of last pages included."""
        return self.batch * self.pages_per_request * self.page_size

    @property
    def kv_bytes(self) -> int:
        """Bytes of cache that any kernel has to read at least once."""
        return self.batch * self.kv_len * DIM_QK * _ELEMENT_BYTES[self.kv_dtype]

    @property
    def memory_bytes(self) -> int:
        """Bytes of device memory that the tensors take: the cache twice (fused and split), and the page table."""
        cache = self.cache_tokens * DIM_QK * _ELEMENT_BYTES[self.kv_dtype]
        return 2 * cache + 4 * self.batch * self.pages_per_request

    @property
    def flops(self) -> int:
        """Useful floating-point operations of both matrix products, masked positions counted too."""
        return 2 * self.batch * self.rows * self.kv_len * (DIM_QK + DIM_LATENT)

    def __str__(self) -> str:
        return f"b={self.batch} kv={self.kv_len} h={self.heads} sq={self.q_len} page={self.page_size} {self.kv_dtype}"


class KvPool:
    """Random token rows that every problem of a run takes a prefix of, so that no cache is filled twice.

    Args:
        tokens: token rows to hold.
        kv_dtype: element type, see `Problem.kv_dtype`.
        device: torch device.
        seed: seed of the values.
    """

    _CHUNK = 1 << 20

    def __init__(self, tokens: int, kv_dtype: str, device: str = "cuda", seed: int = 0) -> None:
        self.tokens, self.kv_dtype = tokens, kv_dtype
        generator = torch.Generator(device).manual_seed(seed)
        self.fused = torch.empty(tokens, DIM_QK, dtype=KV_DTYPES[kv_dtype], device=device)
        for start in range(0, tokens, self._CHUNK):
            rows = self.fused[start : start + self._CHUNK]
            rows.copy_(torch.randn(rows.shape, device=device, generator=generator))

    @cached_property
    def split(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same rows as two contiguous tensors: latent (tokens, 512) and rope (tokens, 64)."""
        return self.fused[:, :DIM_LATENT].contiguous(), self.fused[:, DIM_LATENT:].contiguous()


class Inputs:
    """The tensors of one problem, drawn from a pool.

    Attributes:
        q_nope, q_rope: queries, (batch, q_len, heads, 512) and (batch, q_len, heads, 64).
        page_table: int32 (batch, pages_per_request), a permutation of all pages.
        cache_seqlens: int32 (batch,), cached tokens of each request.
    """

    def __init__(self, problem: Problem, pool: KvPool) -> None:
        if pool.kv_dtype != problem.kv_dtype or pool.tokens < problem.cache_tokens:
            raise ValueError(f"a pool of {pool.tokens} {pool.kv_dtype} tokens does not serve {problem}")
        self.problem, self.pool = problem, pool
        device = pool.fused.device
        generator = torch.Generator(device).manual_seed(problem.seed + 1)
        dtype = torch.float16 if problem.kv_dtype == "fp16" else torch.bfloat16
        shape = (problem.batch, problem.q_len, problem.heads)
        self.q_nope = torch.randn(*shape, DIM_LATENT, device=device, generator=generator).to(dtype)
        self.q_rope = torch.randn(*shape, DIM_ROPE, device=device, generator=generator).to(dtype)
        pages = problem.batch * problem.pages_per_request
        order = torch.randperm(pages, device=device, generator=generator, dtype=torch.int32)
        self.page_table = order.view(problem.batch, problem.pages_per_request)
        self.cache_seqlens = torch.full((problem.batch,), problem.kv_len, dtype=torch.int32, device=device)

    def _paged(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[: self.problem.cache_tokens].unflatten(0, (-1, self.problem.page_size))

    @property
    def fused_caches(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Latent (pages, page_size, 512) and rope (pages, page_size, 64) as views of one 576-wide buffer."""
        cache = self._paged(self.pool.fused)
        return cache[..., :DIM_LATENT], cache[..., DIM_LATENT:]

    @property
    def split_caches(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same values as two contiguous tensors."""
        latent, rope = self.pool.split
        return self._paged(latent), self._paged(rope)

    def reference(self, chunk_bytes: int = 1 << 30) -> tuple[torch.Tensor, torch.Tensor]:
        """fp64 attention: output (batch, q_len, heads, 512) and natural-log LSE (batch, heads, q_len).

        Args:
            chunk_bytes: most bytes of widened cache held at once.
        """
        parts = list(self._reference_chunks(chunk_bytes))
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])

    def _reference_chunks(self, chunk_bytes: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        p = self.problem
        requests = max(1, chunk_bytes // (8 * DIM_QK * p.pages_per_request * p.page_size))
        cache = self._paged(self.pool.fused)
        if p.kv_dtype == "e4m3":
            cache = cache.view(torch.uint8)  # float8 tensors cannot be gathered
        queries = torch.cat([self.q_nope, self.q_rope], -1)
        for start in range(0, p.batch, requests):
            part = slice(start, start + requests)
            kv = cache[self.page_table[part].long()].flatten(1, 2)[:, : p.kv_len].view(self.pool.fused.dtype).double()
            logits = queries[part].double().flatten(1, 2) @ kv.transpose(1, 2) * p.softmax_scale
            logits = logits.unflatten(1, (p.q_len, p.heads))
            if p.causal:
                keep = torch.ones(p.q_len, p.kv_len, dtype=torch.bool, device=kv.device).tril(p.kv_len - p.q_len)
                logits = logits.masked_fill(~keep[:, None], float("-inf"))
            lse = logits.logsumexp(-1)
            weights = (logits - lse[..., None]).exp()
            out = (weights.flatten(1, 2) @ kv[..., :DIM_LATENT]).unflatten(1, (p.q_len, p.heads))
            yield out, lse.transpose(1, 2)
