"""`etap::mla_decode` for CPU tensors: the kernels' PTX, interpreted."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class Interpreted:
    """The operator's implementation. `seed` sets the schedule of warps and copies; each call draws another.

    Raises RuntimeError for a deadlock, a race in shared memory, an access out of bounds, a missing proxy fence.
    """

    def __init__(self, module: ModuleType, *, seed: int = 0, sms: int = 4, check_races: bool = True) -> None:
        self.module, self.seed, self.sms, self.check_races = module, seed, sms, check_races
        self.changes: dict[str, Any] = {}  # to the kernel's parameters: what only the upstream adapters set
        self.workspaces: dict[tuple[int, int], Tensor] = {}

    def workspace(self, num_ctas: int, row_tile: int) -> Tensor:
        """As the operator's: kept from launch to launch."""
        key = num_ctas, row_tile
        if key not in self.workspaces:
            made = torch.full((self.module.workspace_bytes(*key) + 256,), 0xFF, dtype=torch.uint8)
            made = made[-made.data_ptr() % 256 :][: self.module.workspace_bytes(*key)]
            made[: self.module.header_bytes()] = 0
            self.workspaces[key] = made
        return self.workspaces[key]

    def __call__(
        self, q_nope: Tensor, q_rope: Tensor, ckv: Tensor, kpe: Tensor, page_table: Tensor | None,
        cache_seqlens: Tensor, cu_seqlens_q: Tensor | None, max_seqlen_q: int, softmax_scale: float, causal: bool,
        out: Tensor, lse: Tensor | None, num_ctas: int, p_parts: int, ckv_scale: Tensor | None = None,
        kpe_scale: Tensor | None = None, ckv_scale_value: float = 1.0, kpe_scale_value: float = 1.0,
        cache_batch_idx: Tensor | None = None, ckv_scale_arr: Tensor | None = None,
    ) -> None:  # fmt: skip
        batch, heads, ragged = cache_seqlens.numel(), q_nope.shape[-2], cu_seqlens_q is not None
        if batch == 0 or q_nope.numel() == 0:
            return
        q_len = max_seqlen_q if ragged else q_nope.shape[1]
        q_nope, q_rope = (
            x if _aligned(x) else x.clone(memory_format=torch.contiguous_format) for x in (q_nope, q_rope)
        )
        e4m3 = ckv.dtype == torch.float8_e4m3fn
        rope16 = e4m3 and kpe.dtype != torch.float8_e4m3fn
        cache_format = 3 if rope16 else 2 if ckv_scale_arr is not None else int(e4m3)  # CacheFormat
        row_tile = self.module.row_tile_for(q_len * heads, cache_format)
        ctas = min(num_ctas or self.sms, self.sms)
        parts = p_parts or self.module.default_p_parts(cache_format, self.sms)
        fields: dict[str, Any] = {
            "batch": batch, "num_heads": heads, "q_len": q_len, "causal": causal and q_len > 1,
            "scale_log2": softmax_scale * math.log2(math.e) or 1.1754943508222875e-38,
            "num_pages": ckv.shape[0], "page_size": ckv.shape[1],
            "capacity": min(page_table.shape[1] * ckv.shape[1] if page_table is not None else ckv.shape[1], 2**31 - 1),
            "page_table_stride": 0 if page_table is None else page_table.stride(0),
            "max_pages": 0 if page_table is None else page_table.shape[1],
            "page_indptr": None, "out_fp32": out.dtype == torch.float32, "lse_unit": math.log(2),
            "ckv_scale": ckv_scale_value, "kpe_scale": kpe_scale_value,
            "lse_stride": (0, 0, 0) if lse is None else (0, lse.stride(1), lse.stride(0)) if ragged
            else (lse.stride(0), lse.stride(2), lse.stride(1)),
        }  # fmt: skip
        for name, cache in (("ckv", ckv), ("kpe", kpe)):
            fields |= {f"{name}_page_stride": cache.stride(0), f"{name}_row_stride": cache.stride(1)}
        for name, x in (("q_nope", q_nope), ("q_rope", q_rope), ("out", out)):
            fields[f"{name}_stride"] = (0, x.stride(0), x.stride(1)) if ragged else tuple(x.stride()[:3])
        for name, scale in (("ckv", ckv_scale), ("kpe", kpe_scale)):
            if scale is not None and scale.numel() == 0:
                scale = None
            fields[f"{name}_scale_stride"] = scale.stride(0) if scale is not None and scale.numel() > 1 else 0
            fields[f"{name}_scale_data"] = scale
        fields |= {
            "q_nope": q_nope, "q_rope": q_rope, "ckv": ckv, "kpe": kpe, "page_table": page_table, "out": out,
            "lse": lse, "cache_seqlens": cache_seqlens, "cu_seqlens_q": cu_seqlens_q,
            "cache_batch_idx": cache_batch_idx, "group_scale": ckv_scale_arr,
            "group_scale_page_stride": 0 if ckv_scale_arr is None else ckv_scale_arr.stride(0),
            "group_scale_row_stride": 0 if ckv_scale_arr is None else ckv_scale_arr.stride(1),
        }  # fmt: skip
        fields |= self.changes
        memory = []
        for name, value in fields.items():
            if isinstance(value, Tensor):
                memory.append((*_extent(value), name in ("out", "lse")))
                fields[name] = value.data_ptr()
        self.seed += 1
        self.module.mla_decode(
            fields, q_nope.dtype == torch.float16, cache_format, row_tile, parts, ctas,
            self.workspace(ctas, row_tile).data_ptr(), _joined(memory), self.seed, self.check_races,
        )  # fmt: skip


def _aligned(x: Tensor) -> bool:
    size = x.element_size()
    return x.data_ptr() % 16 == 0 and all(
        s * size % 16 == 0 for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1
    )


def _extent(x: Tensor) -> tuple[int, int]:
    """Address and bytes from a tensor's first to its last element."""
    if x.numel() == 0:
        return x.data_ptr(), 0
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), (last + 1) * x.element_size()


def _joined(regions: list[tuple[int, int, bool]]) -> list[tuple[int, int, bool]]:
    """Regions of memory without overlaps: two views of one buffer become one."""
    made: list[tuple[int, int, bool]] = []
    for begin, size, writable in sorted(regions):
        if made and begin <= made[-1][0] + made[-1][1] and writable == made[-1][2]:
            made[-1] = made[-1][0], max(made[-1][1], begin + size - made[-1][0]), writable
        else:
            made.append((begin, size, writable))
    return made
