"""The operator: MLA decode attention over a paged or contiguous latent cache, on Hopper GPUs.

Checks are plain Python over shapes, strides and dtypes, so they run on tensors of any device, meta included, and raise
before anything is launched. TypeError: wrong type or dtype. ValueError: wrong shape, stride or value. RuntimeError:
wrong device, GPU or build.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from etap_integration import _library

D_LATENT = 512  # width of q_nope, ckv_cache and the output
D_ROPE = 64  # width of q_rope and kpe_cache
SCALE_GROUP = 128  # columns of ckv_cache that share an entry of ckv_scale_arr
MAX_HEADS = 128
DEFAULT_SCALE = (D_LATENT + D_ROPE) ** -0.5
INT32_MAX = 2**31 - 1

_LOAD_FAILURE = _library.load()
_OP = torch.ops.etap.mla_decode.default
_CHECK = os.environ.get("ETAP_CHECK", "0") not in ("", "0")
_DTYPES = (torch.bfloat16, torch.float16)


def mla_decode(
    q_nope: Tensor,
    q_rope: Tensor,
    ckv_cache: Tensor,
    kpe_cache: Tensor,
    page_table: Tensor | None,
    cache_seqlens: Tensor | Sequence[int] | int,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    out: Tensor | None = None,
    return_lse: bool = False,
    num_ctas: int | None = None,
    precise: bool | None = None,
    ckv_scale: Tensor | float | None = None,
    kpe_scale: Tensor | float | None = None,
    cache_batch_idx: Tensor | None = None,
    ckv_scale_arr: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few query tokens per request over one shared latent KV head (MLA decode, weights absorbed).

    out = softmax(softmax_scale * (q_nope @ ckv^T + q_rope @ kpe^T)) @ ckv, for every query token and head of a request,
    over the first `cache_seqlens[i]` keys of request i. A request of length 0 gives output 0 and LSE -inf.

    Args:
      q_nope: (batch, sq, heads, 512), or ragged (total_q, heads, 512) with `cu_seqlens_q`; bfloat16 or float16; heads
        1 to 128. Any strides; copied where rows are not contiguous and 16-byte aligned.
      q_rope: the same with 64 in place of 512, same dtype.
      ckv_cache: (pages, page_size, 512), or (batch, seqlen, 512) where `page_table` is None; the dtype of q_nope, or
        float8_e4m3fn. Last dimension contiguous, other strides any, so two views of one 576-wide buffer are fine.
        Fastest where base and strides are multiples of 16 bytes.
      kpe_cache: the same with 64 in place of 512, in the dtype of ckv_cache; beside a float8_e4m3fn ckv_cache, also in
        that of q_nope. In both, slots past a request's length may hold anything, NaN included.
      page_table: (batch, max_pages) int32, any row stride, last dimension contiguous; or None. Entries past a request's
        last used page are never read.
      cache_seqlens: keys of each request: int32 tensor (batch,) on the device of q_nope, which is not read on the host;
        or an int for all requests, a list or a CPU tensor, which are checked (0 to the cache's capacity) and copied.
      cu_seqlens_q: (batch + 1,) int32 on the device: request i owns query rows cu_seqlens_q[i] to cu_seqlens_q[i + 1].
      max_seqlen_q: longest query of the batch; required with `cu_seqlens_q`, otherwise sq.
      softmax_scale: default 576 ** -0.5.
      causal: query token j of sq sees keys up to cache_seqlens - sq + j (bottom-right aligned); a token that sees none
        gives output 0 and LSE -inf.
      out: written and returned: the shape of q_nope, its dtype or float32, rows contiguous and 16-byte aligned.
        Default: new, in the dtype of q_nope.
      return_lse: return (out, lse) too.
      num_ctas: how many SMs to use, 1 to all; default all.
      precise: split P into a high and a low 16-bit part. Default: yes, but not on H20-class GPUs, where the tensor
        cores are the limit; nor for a float8_e4m3fn cache, where P is float16 whatever the dtype of q_nope. With more
        than 32 query rows (max_seqlen_q x heads), False is 10 to 20% faster.
      ckv_scale: float8_e4m3fn cache only: what ckv_cache is multiplied by, as keys and as values, so that a cache entry
        means ckv_scale * ckv_cache. A positive float; or a float32 tensor on the device of q_nope, read there, with 1
        element or one per request, (batch,); None or an empty tensor: 1.
      kpe_scale: the same for kpe_cache, where that is float8_e4m3fn.
      ckv_scale_arr: in place of ckv_scale, a scale for each key and each 128 latent columns, (pages, page_size, 4)
        float32, or (batch, seqlen, 4), on the device: what those columns of ckv_cache are multiplied by. Any strides
        but the last; fastest where base and strides are multiples of 16 bytes. Finite, of any sign; entries of slots
        past a request's length may hold anything. `split_token_cache` gives it as a view of a FlashMLA-style cache.
      cache_batch_idx: (batch,) int32 on the device, where `page_table` is None: the row of the caches that holds
        request i; the caches then may have any number of rows. Default: row i.

    Returns:
      out, or (out, lse) with lse float32, natural logarithm, (batch, heads, sq) or (heads, total_q) when ragged.

    Raises:
      TypeError, ValueError, RuntimeError: as the module says, before any launch. Contents of tensors on the device
      (lengths, page table, indices, cu_seqlens_q) are read and checked only under ETAP_CHECK=1, which synchronises.
    """
    batch, max_q, lengths, p_parts = _check_arguments(
        q_nope, q_rope, ckv_cache, kpe_cache, page_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, softmax_scale,
        causal, out, return_lse, num_ctas, precise, ckv_scale, kpe_scale, cache_batch_idx, ckv_scale_arr,
    )  # fmt: skip
    device = q_nope.device
    if not q_nope.is_meta:
        _check_device(device, num_ctas)
        if _LOAD_FAILURE is not None:
            raise RuntimeError(_LOAD_FAILURE)
        if _CHECK:
            _check_contents(q_nope, ckv_cache, page_table, cache_seqlens, cu_seqlens_q, max_q, cache_batch_idx)

    if out is None:
        out = torch.empty(q_nope.shape, dtype=q_nope.dtype, device=device)
    lse = None
    if return_lse:
        shape = (q_nope.shape[1], q_nope.shape[0]) if cu_seqlens_q is not None else (batch, q_nope.shape[2], max_q)
        lse = torch.empty(shape, dtype=torch.float32, device=device)
    if batch > 0 and out.shape[0] > 0:
        if lengths is not None:
            cache_seqlens = _to_device(lengths, batch, device)
        _OP(
            q_nope, q_rope, ckv_cache, kpe_cache, page_table, cache_seqlens, cu_seqlens_q, max_q,
            DEFAULT_SCALE if softmax_scale is None else float(softmax_scale), causal, out, lse,
            0 if num_ctas is None else num_ctas, p_parts,
            *_rare_arguments(ckv_scale, kpe_scale, cache_batch_idx, ckv_scale_arr),
        )  # fmt: skip
    return out if lse is None else (out, lse)


def mla_decode_checked(
    q_nope: Tensor,
    q_rope: Tensor,
    ckv_cache: Tensor,
    kpe_cache: Tensor,
    page_table: Tensor | None,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    out: Tensor | None,
    lse_shape: tuple[int, ...] | None,
    num_ctas: int,
    cache_batch_idx: Tensor | None,
    ckv_scale: Tensor | float | None = None,
    kpe_scale: Tensor | float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`mla_decode` for a caller that knows the arguments to be good, as a call of the same shapes was.

    Arguments as `mla_decode`'s, but: the caches may be (pages, page_size, 1, width) too, all lengths lie on the device,
    `max_seqlen_q` is given for any queries, `lse_shape` is the LSE's where it is wanted, `num_ctas` 0 stands for all.
    """
    if out is None:
        out = torch.empty(q_nope.shape, dtype=q_nope.dtype, device=q_nope.device)
    lse = None if lse_shape is None else torch.empty(lse_shape, dtype=torch.float32, device=q_nope.device)
    _OP(
        q_nope, q_rope, ckv_cache, kpe_cache, page_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, softmax_scale,
        causal, out, lse, num_ctas, 0, *_rare_arguments(ckv_scale, kpe_scale, cache_batch_idx),
    )  # fmt: skip
    return out if lse is None else (out, lse)


def checks_contents() -> bool:
    """Whether ETAP_CHECK asks for the contents of tensors to be checked at each call."""
    return _CHECK


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def _check_arguments(
    q_nope, q_rope, ckv_cache, kpe_cache, page_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, softmax_scale, causal,
    out, return_lse, num_ctas, precise, ckv_scale=None, kpe_scale=None, cache_batch_idx=None, ckv_scale_arr=None,
) -> tuple[int, int, list[int] | int | None, int]:  # fmt: skip
    """Everything that can be said of a call without a GPU. Arguments as `mla_decode`'s, all of them given.

    Returns (batch, max_seqlen_q, lengths, p_parts): `lengths` is the host's copy of cache_seqlens, an int for all
    requests or a list, None where they lie on the device; p_parts is 1 or 2, 0 where it is left to the GPU.
    Raises as `mla_decode` does, the message naming the argument, its value and what is allowed.
    """
    for name, value in (("q_nope", q_nope), ("q_rope", q_rope), ("ckv_cache", ckv_cache), ("kpe_cache", kpe_cache)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    dtype, device = q_nope.dtype, q_nope.device
    if dtype not in _DTYPES:
        raise TypeError(f"q_nope: dtype {dtype}, expected torch.bfloat16 or torch.float16")
    if q_rope.dtype != dtype:
        raise TypeError(f"q_rope: dtype {q_rope.dtype}, expected {dtype}, as q_nope")
    e4m3 = ckv_cache.dtype == torch.float8_e4m3fn
    if ckv_cache.dtype != dtype and not e4m3:
        raise TypeError(f"ckv_cache: dtype {ckv_cache.dtype}, expected {dtype}, as q_nope, or torch.float8_e4m3fn")
    if kpe_cache.dtype != ckv_cache.dtype and not (e4m3 and kpe_cache.dtype == dtype):
        either = f" or {dtype}, as q_nope" if e4m3 else ""
        raise TypeError(f"kpe_cache: dtype {kpe_cache.dtype}, expected {ckv_cache.dtype}, as ckv_cache{either}")
    for name, value in (("q_rope", q_rope), ("ckv_cache", ckv_cache), ("kpe_cache", kpe_cache)):
        if value.device != device:
            raise RuntimeError(f"{name}: on {value.device}, expected {device}, as q_nope")

    # queries
    ragged = cu_seqlens_q is not None
    q_shape = q_nope.shape
    if len(q_shape) != (3 if ragged else 4) or q_shape[-1] != D_LATENT:
        layout = f"(total_q, heads, {D_LATENT}) with cu_seqlens_q" if ragged else f"(batch, sq, heads, {D_LATENT})"
        raise ValueError(f"q_nope: shape {tuple(q_shape)}, expected {layout}")
    heads = q_shape[-2]
    if not 1 <= heads <= MAX_HEADS:
        raise ValueError(f"q_nope: {heads} heads, expected 1 to {MAX_HEADS}")
    if q_rope.shape != (*q_shape[:-1], D_ROPE):
        raise ValueError(f"q_rope: shape {tuple(q_rope.shape)}, expected {(*q_shape[:-1], D_ROPE)}, as q_nope's")
    if ragged:
        _check_int32(cu_seqlens_q, "cu_seqlens_q", 1, device)
        batch = cu_seqlens_q.shape[0] - 1
        if batch < 0:
            raise ValueError("cu_seqlens_q: empty, expected batch + 1 entries")
        if max_seqlen_q is None:
            raise ValueError("max_seqlen_q: None, expected the longest query of the batch, as cu_seqlens_q is given")
        max_q = _check_int(max_seqlen_q, "max_seqlen_q", 1, INT32_MAX)
    else:
        batch, max_q = q_shape[0], q_shape[1]
        if max_q < 1:
            raise ValueError(f"q_nope: sq is {max_q}, expected at least 1")
        if max_seqlen_q is not None and max_seqlen_q != max_q:
            raise ValueError(f"max_seqlen_q: {max_seqlen_q}, expected {max_q}, q_nope's sq, or None")

    # caches
    cache_shape = ckv_cache.shape
    if len(cache_shape) != 3 or cache_shape[2] != D_LATENT:
        layout = f"(batch, seqlen, {D_LATENT})" if page_table is None else f"(pages, page_size, {D_LATENT})"
        raise ValueError(f"ckv_cache: shape {tuple(cache_shape)}, expected {layout}")
    if kpe_cache.shape != (*cache_shape[:2], D_ROPE):
        raise ValueError(
            f"kpe_cache: shape {tuple(kpe_cache.shape)}, expected {(*cache_shape[:2], D_ROPE)}, as ckv_cache's"
        )
    for name, value in (("ckv_cache", ckv_cache), ("kpe_cache", kpe_cache)):
        if value.stride(2) != 1:
            raise ValueError(f"{name}: strides {value.stride()}, expected a contiguous last dimension")
    capacity = cache_shape[1]
    if cache_batch_idx is not None:
        _check_int32(cache_batch_idx, "cache_batch_idx", 1, device)
        if page_table is not None:
            raise ValueError("cache_batch_idx: given with a page_table, expected one of the two")
        if cache_batch_idx.shape[0] != batch:
            raise ValueError(f"cache_batch_idx: shape {tuple(cache_batch_idx.shape)}, expected ({batch},), q's batch")
    elif page_table is None and cache_shape[0] < batch:
        raise ValueError(f"ckv_cache: {cache_shape[0]} requests, expected q's {batch}, as page_table is None")
    if page_table is not None:
        _check_int32(page_table, "page_table", 2, device)
        if page_table.shape[0] != batch:
            raise ValueError(f"page_table: shape {tuple(page_table.shape)}, expected ({batch}, max_pages)")
        if capacity < 1:
            raise ValueError(f"ckv_cache: page_size {capacity}, expected at least 1")
        capacity *= page_table.shape[1]

    lengths = _check_lengths(cache_seqlens, batch, capacity, device)

    # the rest
    if softmax_scale is not None:
        if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float)):
            raise TypeError(f"softmax_scale: expected a float or None, got {type(softmax_scale).__name__}")
        if not (0 < softmax_scale < math.inf):
            raise ValueError(f"softmax_scale: {softmax_scale}, expected a positive finite number")
    for name, value in (("causal", causal), ("return_lse", return_lse)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    if precise is not None and not isinstance(precise, bool):
        raise TypeError(f"precise: expected a bool or None, got {type(precise).__name__}")
    if num_ctas is not None:
        _check_int(num_ctas, "num_ctas", 1, INT32_MAX)
    if out is not None:
        _check_out(out, q_shape, dtype, device)
    for name, value, cache in (("ckv_scale", ckv_scale, ckv_cache), ("kpe_scale", kpe_scale, kpe_cache)):
        if value is not None:
            _check_scale(value, name, cache.dtype, batch, device)
    if ckv_scale_arr is not None:
        _check_scale_arr(ckv_scale_arr, ckv_scale, ckv_cache)
    if torch.is_grad_enabled() and (
        q_nope.requires_grad or q_rope.requires_grad or ckv_cache.requires_grad or kpe_cache.requires_grad
    ):
        raise RuntimeError("mla_decode has no backward: call it under torch.no_grad(), or detach its inputs")
    if precise is None:
        return batch, max_q, lengths, 0
    return batch, max_q, lengths, 2 if precise else 1


def _check_int(value, name: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}: {value}, expected {low} to {high}")
    return value


def _check_int32(value, name: str, dims: int, device: torch.device) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype != torch.int32:
        raise TypeError(f"{name}: dtype {value.dtype}, expected torch.int32")
    if value.device != device:
        raise RuntimeError(f"{name}: on {value.device}, expected {device}, as q_nope")
    shape = value.shape
    if len(shape) != dims:
        raise ValueError(f"{name}: shape {tuple(shape)}, expected {dims} dimension{'s' if dims > 1 else ''}")
    if shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(f"{name}: strides {value.stride()}, expected a contiguous last dimension")


def _check_lengths(value, batch: int, capacity: int, device: torch.device) -> list[int] | int | None:
    """cache_seqlens: the host's copy where there is one, else None."""
    if isinstance(value, Tensor):
        on_host = value.is_cpu and not torch.compiler.is_compiling()
        if not on_host:
            _check_int32(value, "cache_seqlens", 1, device)
        elif value.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cache_seqlens: dtype {value.dtype}, expected torch.int32")
        if value.shape != (batch,):
            raise ValueError(f"cache_seqlens: shape {tuple(value.shape)}, expected ({batch},), for q's batch")
        if not on_host:
            return None
        value = value.tolist()
    elif isinstance(value, int) and not isinstance(value, bool):
        _check_length(value, "cache_seqlens", capacity)
        return value
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        if len(value) != batch:
            raise ValueError(f"cache_seqlens: {len(value)} entries, expected {batch}, q's batch")
        value = list(value)
    else:
        raise TypeError(f"cache_seqlens: expected an int, ints or an int32 tensor, got {type(value).__name__}")
    for i, n in enumerate(value):
        if not isinstance(n, int) or isinstance(n, bool):
            raise TypeError(f"cache_seqlens[{i}]: expected an int, got {type(n).__name__}")
        _check_length(n, f"cache_seqlens[{i}]", capacity)
    return value


def _check_length(n: int, name: str, capacity: int) -> None:
    if not 0 <= n <= min(capacity, INT32_MAX):
        raise ValueError(f"{name}: {n}, expected 0 to {capacity}, what the cache holds of a request")


def _check_out(out, q_shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out: expected a torch.Tensor or None, got {type(out).__name__}")
    if out.dtype != dtype and out.dtype != torch.float32:
        raise TypeError(f"out: dtype {out.dtype}, expected {dtype}, as q_nope, or torch.float32")
    if out.device != device:
        raise RuntimeError(f"out: on {out.device}, expected {device}, as q_nope")
    if out.shape != q_shape:
        raise ValueError(f"out: shape {tuple(out.shape)}, expected {tuple(q_shape)}, as q_nope's")
    unit = 16 // out.element_size()
    *outer, last = out.stride()
    rows = all(n <= 1 or (s > 0 and s % unit == 0) for n, s in zip(q_shape, outer, strict=False))
    if last != 1 or not rows or out.storage_offset() % unit:
        where = f"strides {out.stride()} and offset {out.storage_offset()}"
        raise ValueError(f"out: {where}, expected contiguous rows at multiples of {unit} elements (16 bytes)")


def _check_scale(value, name: str, cache_dtype: torch.dtype, batch: int, device: torch.device) -> None:
    if isinstance(value, Tensor):
        if value.dtype != torch.float32:
            raise TypeError(f"{name}: dtype {value.dtype}, expected torch.float32")
        if value.device != device:
            raise RuntimeError(f"{name}: on {value.device}, expected {device}, as q_nope")
        if value.numel() > 1 and value.shape != (batch,):
            raise ValueError(f"{name}: shape {tuple(value.shape)}, expected 0 or 1 elements, or ({batch},), q's batch")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, a torch.Tensor or None, got {type(value).__name__}")
    elif not 0 < value < math.inf:
        raise ValueError(f"{name}: {value}, expected a positive finite number")
    if cache_dtype != torch.float8_e4m3fn:
        raise ValueError(f"{name}: for a cache of torch.float8_e4m3fn alone, expected None for one of {cache_dtype}")


def _check_scale_arr(value, ckv_scale, ckv_cache: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"ckv_scale_arr: expected a torch.Tensor or None, got {type(value).__name__}")
    if value.dtype != torch.float32:
        raise TypeError(f"ckv_scale_arr: dtype {value.dtype}, expected torch.float32")
    if value.device != ckv_cache.device:
        raise RuntimeError(f"ckv_scale_arr: on {value.device}, expected {ckv_cache.device}, as q_nope")
    shape = (*ckv_cache.shape[:2], D_LATENT // SCALE_GROUP)
    if value.shape != shape:
        raise ValueError(f"ckv_scale_arr: shape {tuple(value.shape)}, expected {shape}, for ckv_cache's")
    if value.stride(2) != 1:
        raise ValueError(f"ckv_scale_arr: strides {value.stride()}, expected a contiguous last dimension")
    if ckv_scale is not None:
        raise ValueError("ckv_scale_arr: given with a ckv_scale, expected one of the two")
    if ckv_cache.dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"ckv_scale_arr: for a cache of torch.float8_e4m3fn alone, expected None for one of {ckv_cache.dtype}"
        )


def _rare_arguments(ckv_scale, kpe_scale, cache_batch_idx, ckv_scale_arr=None) -> tuple[Tensor | float | None, ...]:
    """The operator's last arguments; nothing where all have their defaults, which saves host time.

    Scales: tensors or None, then values for where there is no tensor.
    """
    if ckv_scale is None and kpe_scale is None and cache_batch_idx is None and ckv_scale_arr is None:
        return ()
    scales = (ckv_scale, kpe_scale)
    tensors = [s if isinstance(s, Tensor) and s.numel() > 0 else None for s in scales]
    values = [1.0 if s is None or isinstance(s, Tensor) else float(s) for s in scales]
    return (*tensors, *values, cache_batch_idx, ckv_scale_arr)


def _check_contents(q_nope, ckv_cache, page_table, cache_seqlens, cu_seqlens_q, max_q: int, cache_batch_idx) -> None:
    """ETAP_CHECK=1: reads lengths, page table and indices on the host (a sync) and raises ValueError."""
    capacity = ckv_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
    if isinstance(cache_seqlens, Tensor):
        lengths = cache_seqlens.tolist()
        for i, n in enumerate(lengths):
            _check_length(n, f"cache_seqlens[{i}]", capacity)
        if page_table is not None:
            table, page_size, pages = page_table.tolist(), ckv_cache.shape[1], ckv_cache.shape[0]
            for i, n in enumerate(lengths):
                for j, page in enumerate(table[i][: -(-n // page_size)]):
                    if not 0 <= page < pages:
                        raise ValueError(f"page_table[{i}, {j}]: {page}, expected 0 to {pages - 1}")
    if cache_batch_idx is not None:
        for i, row in enumerate(cache_batch_idx.tolist()):
            if not 0 <= row < ckv_cache.shape[0]:
                raise ValueError(f"cache_batch_idx[{i}]: {row}, expected 0 to {ckv_cache.shape[0] - 1}")
    if cu_seqlens_q is not None:
        ends = cu_seqlens_q.tolist()
        if ends[0] != 0 or ends[-1] != q_nope.shape[0]:
            raise ValueError(f"cu_seqlens_q: runs from {ends[0]} to {ends[-1]}, expected 0 to {q_nope.shape[0]}")
        for i, (a, b) in enumerate(itertools.pairwise(ends)):
            if not 0 <= b - a <= max_q:
                raise ValueError(f"cu_seqlens_q: request {i} has {b - a} tokens, expected 0 to max_seqlen_q = {max_q}")


# ---------------------------------------------------------------------------------------------------------------------
# The device
# ---------------------------------------------------------------------------------------------------------------------


def _check_device(device: torch.device, num_ctas: int | None) -> None:
    """Raises RuntimeError unless `device` is a Hopper GPU, ValueError unless it has `num_ctas` SMs."""
    if device.type != "cuda":
        raise RuntimeError(f"q_nope: on {device}, expected a Hopper GPU: mla_decode has no other implementation")
    name, major, minor, sms = _device(device.index)
    if major != 9:
        raise RuntimeError(f"{device} is {name} with compute capability {major}.{minor}, expected 9.0: Hopper only")
    if num_ctas is not None and num_ctas > sms:
        raise ValueError(f"num_ctas: {num_ctas}, expected 1 to {sms}, the SMs of {name}")


def _device(index: int) -> tuple[str, int, int, int]:
    """Name, compute capability and number of SMs of a GPU, asked for once."""
    found = _DEVICES.get(index)
    if found is None:
        p = torch.cuda.get_device_properties(index)
        found = _DEVICES[index] = (p.name, p.major, p.minor, p.multi_processor_count)
    return found


_DEVICES: dict[int, tuple[str, int, int, int]] = {}
_device._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile calls it while tracing


def _to_device(lengths: list[int] | int, batch: int, device: torch.device) -> Tensor:
    """int32 (batch,); an int needs no copy from the host and can be captured in a graph."""
    if isinstance(lengths, int):
        return torch.full((batch,), lengths, dtype=torch.int32, device=device)
    return torch.tensor(lengths, dtype=torch.int32, device=device)
