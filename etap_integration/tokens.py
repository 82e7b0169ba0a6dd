"""Caches that keep all of a token in one run of bytes. Importing this loads no operator library."""

from __future__ import annotations

import torch
from torch import Tensor

from etap_integration.numerics import D_LATENT, D_ROPE, SCALE_GROUP

TOKEN_BYTES = D_LATENT + 4 * (D_LATENT // SCALE_GROUP) + 2 * D_ROPE  # of a FlashMLA-style e4m3 cache


def split_token_cache(cache: Tensor, rope_dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """(ckv_cache, ckv_scale_arr, kpe_cache) for `mla_decode`: views of a FlashMLA-style cache of 656 bytes a token.

    A token is 512 float8_e4m3fn latent values, 4 float32 scales of 128 of them each, and 64 rope values of
    `rope_dtype`, the dtype of the queries.

    Args:
      cache: (pages, page_size, 656), or (pages, page_size, 1, 656), of a dtype of one byte; the last dimension
        contiguous, other strides multiples of 4 bytes, base at a multiple of 4; 16 is fastest.

    Raises:
      TypeError, ValueError: the message names the argument, its value and what is allowed.
    """
    if not isinstance(cache, Tensor):
        raise TypeError(f"cache: expected a torch.Tensor, got {type(cache).__name__}")
    if cache.element_size() != 1:
        raise TypeError(f"cache: dtype {cache.dtype}, expected one of one byte, such as torch.uint8")
    if rope_dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"rope_dtype: {rope_dtype}, expected torch.bfloat16 or torch.float16")
    if cache.dim() == 4 and cache.shape[2] == 1:
        cache = cache.squeeze(2)
    if cache.dim() != 3 or cache.shape[2] != TOKEN_BYTES:
        raise ValueError(f"cache: shape {tuple(cache.shape)}, expected (pages, page_size, {TOKEN_BYTES})")
    if cache.stride(2) != 1 or cache.stride(0) % 4 or cache.stride(1) % 4 or cache.storage_offset() % 4:
        where = f"strides {cache.stride()} and offset {cache.storage_offset()}"
        raise ValueError(f"cache: {where}, expected a contiguous last dimension and multiples of 4 otherwise")
    rope = D_LATENT + 4 * (D_LATENT // SCALE_GROUP)
    ckv, scales, kpe = cache[..., :D_LATENT], cache[..., D_LATENT:rope], cache[..., rope:]
    return ckv.view(torch.float8_e4m3fn), scales.view(torch.float32), kpe.view(rope_dtype)
