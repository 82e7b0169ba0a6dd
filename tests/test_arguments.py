"""Every bad argument of mla_decode raises before anything is launched, and the message names it. No GPU needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from etap_integration import mla_decode, ops

BF16, I32 = torch.bfloat16, torch.int32
DEFAULTS = {
    "page_table": None, "cu_seqlens_q": None, "max_seqlen_q": None, "softmax_scale": None, "causal": False, "out": None,
    "return_lse": False, "num_ctas": None, "precise": None, "ckv_scale": None, "kpe_scale": None,
    "cache_batch_idx": None, "ckv_scale_arr": None,
}  # fmt: skip


def empty(*shape: int, dtype: torch.dtype = BF16, device: str = "meta") -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=device)


def paged(**changes: Any) -> dict[str, Any]:
    """A good call: batch 3, 2 query tokens, 16 heads, pages of 64, 10 pages a request at most."""
    return DEFAULTS | {
        "q_nope": empty(3, 2, 16, 512), "q_rope": empty(3, 2, 16, 64),
        "ckv_cache": empty(40, 64, 512), "kpe_cache": empty(40, 64, 64),
        "page_table": empty(3, 10, dtype=I32), "cache_seqlens": empty(3, dtype=I32),
    } | changes  # fmt: skip


def e4m3(**changes: Any) -> dict[str, Any]:
    caches = {name: empty(40, 64, n, dtype=torch.float8_e4m3fn) for name, n in (("ckv_cache", 512), ("kpe_cache", 64))}
    return paged() | caches | changes


def groups(**changes: Any) -> dict[str, Any]:
    """As e4m3(), with scales of groups and a rope part of 16 bits."""
    return e4m3(kpe_cache=empty(40, 64, 64), ckv_scale_arr=empty(40, 64, 4, dtype=torch.float32)) | changes


def ragged(**changes: Any) -> dict[str, Any]:
    good = {
        "q_nope": empty(5, 16, 512), "q_rope": empty(5, 16, 64), "cu_seqlens_q": empty(4, dtype=I32), "max_seqlen_q": 3,
    }  # fmt: skip
    return paged() | good | changes


def unpaged(**changes: Any) -> dict[str, Any]:
    return paged(page_table=None, ckv_cache=empty(3, 100, 512), kpe_cache=empty(3, 100, 64)) | changes


GOOD = [
    paged(),
    paged(cache_seqlens=640),
    paged(cache_seqlens=[0, 640, 7]),
    paged(cache_seqlens=torch.tensor([0, 640, 7])),
    paged(out=empty(3, 2, 16, 512, dtype=torch.float32), return_lse=True, causal=True, precise=False, num_ctas=78),
    paged(out=empty(3, 2, 16, 576)[..., :512], max_seqlen_q=2),
    paged(page_table=empty(3, 20, dtype=I32)[:, :10], ckv_cache=empty(40, 64, 577)[..., :512]),
    paged(q_nope=empty(3, 2, 16, 577)[..., 1:513], q_rope=empty(3, 16, 2, 64).transpose(1, 2)),
    ragged(),
    ragged(q_nope=empty(0, 16, 512), q_rope=empty(0, 16, 64)),
    unpaged(),
    unpaged(cache_seqlens=[0, 100, 99]),
    e4m3(),
    e4m3(ckv_scale=0.5, kpe_scale=2),
    e4m3(ckv_scale=empty(1, 1, dtype=torch.float32), kpe_scale=empty(1, dtype=torch.float32), precise=False),
    e4m3(ckv_scale=empty(0, dtype=torch.float32), kpe_scale=empty(3, dtype=torch.float32)),
    e4m3(q_nope=empty(3, 2, 16, 512, dtype=torch.float16), q_rope=empty(3, 2, 16, 64, dtype=torch.float16)),
    groups(),
    groups(kpe_cache=empty(40, 64, 64, dtype=torch.float8_e4m3fn), kpe_scale=0.5),
    groups(ckv_scale_arr=empty(40, 64, 5, dtype=torch.float32)[..., :4], precise=False),
    groups(ckv_scale_arr=None, ckv_scale=0.5),
    unpaged(cache_batch_idx=empty(3, dtype=I32)),
    unpaged(
        cache_batch_idx=empty(3, dtype=I32),
        ckv_cache=empty(2, 100, 512),
        kpe_cache=empty(2, 100, 64),
        cache_seqlens=100,
    ),
    paged(q_nope=empty(0, 2, 16, 512), q_rope=empty(0, 2, 16, 64), page_table=empty(0, 0, dtype=I32), cache_seqlens=[]),
]

BAD = [
    # types
    (paged(q_nope=[1.0]), TypeError, "q_nope: expected a torch.Tensor, got list"),
    (paged(kpe_cache=None), TypeError, "kpe_cache: expected a torch.Tensor, got NoneType"),
    (paged(page_table=[[0]]), TypeError, "page_table: expected a torch.Tensor, got list"),
    (ragged(cu_seqlens_q=[0, 1, 2, 5]), TypeError, "cu_seqlens_q: expected a torch.Tensor, got list"),
    (ragged(max_seqlen_q=2.0), TypeError, "max_seqlen_q: expected an int, got float"),
    (paged(cache_seqlens="abc"), TypeError, "cache_seqlens: expected an int, ints or an int32 tensor, got str"),
    (paged(cache_seqlens=None), TypeError, "cache_seqlens: .*got NoneType"),
    (paged(cache_seqlens=[1, 2.0, 3]), TypeError, r"cache_seqlens\[1\]: expected an int, got float"),
    (paged(softmax_scale="1"), TypeError, "softmax_scale: expected a float or None, got str"),
    (paged(causal=1), TypeError, "causal: expected a bool, got int"),
    (paged(return_lse=None), TypeError, "return_lse: expected a bool, got NoneType"),
    (paged(precise=2), TypeError, "precise: expected a bool or None, got int"),
    (paged(num_ctas=True), TypeError, "num_ctas: expected an int, got bool"),
    (paged(out=3), TypeError, "out: expected a torch.Tensor or None, got int"),
    # dtypes
    (paged(q_nope=empty(3, 2, 16, 512, dtype=torch.float32)), TypeError, "q_nope: dtype torch.float32, expected"),
    (paged(q_rope=empty(3, 2, 16, 64, dtype=torch.float16)), TypeError, "q_rope: dtype torch.float16, expected"),
    (paged(ckv_cache=empty(40, 64, 512, dtype=torch.float16)), TypeError, "ckv_cache: dtype torch.float16"),
    (paged(kpe_cache=empty(40, 64, 64, dtype=torch.float8_e4m3fn)), TypeError, "kpe_cache: dtype torch.float8_e4m3fn"),
    (
        e4m3(kpe_cache=empty(40, 64, 64, dtype=torch.float16)), TypeError,
        "kpe_cache: dtype torch.float16, expected torch.float8_e4m3fn, as ckv_cache or torch.bfloat16, as q_nope",
    ),
    (groups(ckv_scale_arr=[1.0]), TypeError, "ckv_scale_arr: expected a torch.Tensor or None, got list"),
    (groups(ckv_scale_arr=empty(40, 64, 4)), TypeError, "ckv_scale_arr: dtype torch.bfloat16, expected torch.float32"),
    (e4m3(ckv_cache=empty(40, 64, 512, dtype=torch.float8_e5m2)), TypeError, "ckv_cache: dtype torch.float8_e5m2, exp"),
    (e4m3(ckv_scale="1"), TypeError, "ckv_scale: expected a float, a torch.Tensor or None, got str"),
    (e4m3(kpe_scale=True), TypeError, "kpe_scale: expected a float, a torch.Tensor or None, got bool"),
    (e4m3(ckv_scale=empty(1)), TypeError, "ckv_scale: dtype torch.bfloat16, expected torch.float32"),
    (paged(page_table=empty(3, 10, dtype=torch.int64)), TypeError, "page_table: dtype torch.int64, expected"),
    (paged(cache_seqlens=empty(3, dtype=torch.int64)), TypeError, "cache_seqlens: dtype torch.int64, expected"),
    (paged(cache_seqlens=torch.ones(3)), TypeError, "cache_seqlens: dtype torch.float32, expected torch.int32"),
    (ragged(cu_seqlens_q=empty(4, dtype=torch.int64)), TypeError, "cu_seqlens_q: dtype torch.int64"),
    (paged(out=empty(3, 2, 16, 512, dtype=torch.float16)), TypeError, "out: dtype torch.float16, expected torch.bf"),
    # shapes
    (paged(q_nope=empty(3, 2, 16, 576)), ValueError, r"q_nope: shape \(3, 2, 16, 576\), expected \(batch, sq"),
    (paged(q_nope=empty(3, 16, 512)), ValueError, r"q_nope: shape \(3, 16, 512\)"),
    (ragged(q_nope=empty(3, 2, 16, 512)), ValueError, r"q_nope: shape .*expected \(total_q, heads, 512\)"),
    (paged(q_nope=empty(3, 2, 0, 512)), ValueError, "q_nope: 0 heads, expected 1 to 128"),
    (paged(q_nope=empty(3, 2, 129, 512)), ValueError, "q_nope: 129 heads, expected 1 to 128"),
    (paged(q_nope=empty(3, 0, 16, 512), q_rope=empty(3, 0, 16, 64)), ValueError, "q_nope: sq is 0"),
    (paged(q_rope=empty(3, 2, 8, 64)), ValueError, r"q_rope: shape \(3, 2, 8, 64\), expected \(3, 2, 16, 64\)"),
    (paged(ckv_cache=empty(40, 64, 576)), ValueError, r"ckv_cache: shape .*expected \(pages, page_size, 512\)"),
    (paged(ckv_cache=empty(40, 64, 1, 512)), ValueError, r"ckv_cache: shape \(40, 64, 1, 512\)"),
    (unpaged(ckv_cache=empty(3, 100, 576)), ValueError, r"ckv_cache: shape .*expected \(batch, seqlen, 512\)"),
    (paged(kpe_cache=empty(40, 32, 64)), ValueError, r"kpe_cache: shape \(40, 32, 64\), expected \(40, 64, 64\)"),
    (unpaged(ckv_cache=empty(2, 9, 512), kpe_cache=empty(2, 9, 64)), ValueError, "ckv_cache: 2 requests, expected"),
    (paged(ckv_cache=empty(4, 0, 512), kpe_cache=empty(4, 0, 64)), ValueError, "ckv_cache: page_size 0"),
    (paged(page_table=empty(30, dtype=I32)), ValueError, r"page_table: shape \(30,\), expected 2 dimensions"),
    (paged(page_table=empty(4, 10, dtype=I32)), ValueError, r"page_table: shape \(4, 10\), expected \(3, max_pages\)"),
    (paged(cache_seqlens=empty(4, dtype=I32)), ValueError, r"cache_seqlens: shape \(4,\), expected \(3,\)"),
    (paged(cache_seqlens=empty(3, 1, dtype=I32)), ValueError, r"cache_seqlens: shape \(3, 1\)"),
    (paged(cache_seqlens=torch.tensor([1, 2])), ValueError, r"cache_seqlens: shape \(2,\), expected \(3,\)"),
    (paged(cache_seqlens=[1, 2]), ValueError, "cache_seqlens: 2 entries, expected 3"),
    (ragged(cu_seqlens_q=empty(0, dtype=I32)), ValueError, "cu_seqlens_q: empty"),
    (ragged(cu_seqlens_q=empty(5, dtype=I32)), ValueError, r"page_table: shape \(3, 10\), expected \(4, max_pages\)"),
    (paged(out=empty(3, 2, 16, 576)), ValueError, r"out: shape \(3, 2, 16, 576\), expected \(3, 2, 16, 512\)"),
    # strides
    (paged(ckv_cache=empty(40, 512, 64).mT), ValueError, r"ckv_cache: strides \(32768, 1, 64\), expected a contig"),
    (paged(kpe_cache=empty(40, 64, 128)[..., ::2]), ValueError, "kpe_cache: strides"),
    (paged(page_table=empty(3, 20, dtype=I32)[:, ::2]), ValueError, r"page_table: strides \(20, 2\)"),
    (paged(cache_seqlens=empty(6, dtype=I32)[::2]), ValueError, r"cache_seqlens: strides \(2,\)"),
    (ragged(cu_seqlens_q=empty(8, dtype=I32)[::2]), ValueError, r"cu_seqlens_q: strides \(2,\)"),
    (paged(out=empty(3, 2, 16, 1024)[..., ::2]), ValueError, "out: strides .*expected contiguous rows"),
    (paged(out=empty(3, 2, 16, 513)[..., 1:]), ValueError, "out: strides .* multiples of 8 elements"),
    (paged(out=empty(3, 1, 16, 512).expand(3, 2, 16, 512)), ValueError, "out: strides"),
    # values
    (paged(max_seqlen_q=3), ValueError, "max_seqlen_q: 3, expected 2"),
    (ragged(max_seqlen_q=None), ValueError, "max_seqlen_q: None"),
    (ragged(max_seqlen_q=0), ValueError, "max_seqlen_q: 0, expected 1 to"),
    (paged(cache_seqlens=-1), ValueError, "cache_seqlens: -1, expected 0 to 640"),
    (paged(cache_seqlens=641), ValueError, "cache_seqlens: 641, expected 0 to 640"),
    (paged(cache_seqlens=[0, -5, 1]), ValueError, r"cache_seqlens\[1\]: -5, expected 0 to 640"),
    (paged(cache_seqlens=torch.tensor([0, 5, 700])), ValueError, r"cache_seqlens\[2\]: 700, expected 0 to 640"),
    (unpaged(cache_seqlens=[0, 101, 1]), ValueError, r"cache_seqlens\[1\]: 101, expected 0 to 100"),
    (paged(softmax_scale=0.0), ValueError, "softmax_scale: 0.0, expected a positive finite number"),
    (paged(softmax_scale=float("nan")), ValueError, "softmax_scale: nan"),
    (paged(softmax_scale=float("inf")), ValueError, "softmax_scale: inf"),
    (e4m3(ckv_scale=0.0), ValueError, "ckv_scale: 0.0, expected a positive finite number"),
    (e4m3(kpe_scale=-1.0), ValueError, "kpe_scale: -1.0, expected a positive finite number"),
    (e4m3(kpe_scale=float("inf")), ValueError, "kpe_scale: inf, expected"),
    (e4m3(ckv_scale=empty(2, dtype=torch.float32)), ValueError, r"ckv_scale: shape \(2,\), expected 0 or 1 elements"),
    (paged(ckv_scale=1.0), ValueError, "ckv_scale: for a cache of torch.float8_e4m3fn alone"),
    (paged(kpe_scale=empty(1, dtype=torch.float32)), ValueError, "kpe_scale: for a cache of torch.float8_e4m3fn alone"),
    (groups(ckv_scale=1.0), ValueError, "ckv_scale_arr: given with a ckv_scale, expected one of the two"),
    (groups(kpe_scale=1.0), ValueError, "kpe_scale: for a cache of torch.float8_e4m3fn alone, expected None"),
    (
        groups(ckv_scale_arr=empty(40, 64, 512, dtype=torch.float32)), ValueError,
        r"ckv_scale_arr: shape \(40, 64, 512\), expected \(40, 64, 4\), for ckv_cache's",
    ),
    (
        groups(ckv_scale_arr=empty(40, 64, 8, dtype=torch.float32)[..., ::2]), ValueError,
        r"ckv_scale_arr: strides \(512, 8, 2\), expected a contiguous last dimension",
    ),
    (
        paged(ckv_scale_arr=empty(40, 64, 4, dtype=torch.float32)), ValueError,
        "ckv_scale_arr: for a cache of torch.float8_e4m3fn alone, expected None for one of torch.bfloat16",
    ),
    (paged(num_ctas=0), ValueError, "num_ctas: 0, expected 1 to"),
    (paged(cache_batch_idx=empty(3, dtype=I32)), ValueError, "cache_batch_idx: given with a page_table"),
    (unpaged(cache_batch_idx=empty(4, dtype=I32)), ValueError, r"cache_batch_idx: shape \(4,\), expected \(3,\)"),
    (unpaged(cache_batch_idx=empty(3, dtype=torch.int64)), TypeError, "cache_batch_idx: dtype torch.int64"),
    (unpaged(cache_batch_idx=[0, 1, 2]), TypeError, "cache_batch_idx: expected a torch.Tensor, got list"),
    (unpaged(cache_batch_idx=empty(3, dtype=I32, device="cpu")), RuntimeError, "cache_batch_idx: on cpu"),
    # devices and autograd
    (paged(q_rope=empty(3, 2, 16, 64, device="cpu")), RuntimeError, "q_rope: on cpu, expected meta, as q_nope"),
    (paged(ckv_cache=empty(40, 64, 512, device="cpu")), RuntimeError, "ckv_cache: on cpu, expected meta"),
    (paged(page_table=empty(3, 10, dtype=I32, device="cpu")), RuntimeError, "page_table: on cpu, expected meta"),
    (ragged(cu_seqlens_q=empty(4, dtype=I32, device="cpu")), RuntimeError, "cu_seqlens_q: on cpu, expected meta"),
    (groups(ckv_scale_arr=torch.ones(40, 64, 4)), RuntimeError, "ckv_scale_arr: on cpu, expected meta, as q_nope"),
    (e4m3(ckv_scale=torch.ones(1)), RuntimeError, "ckv_scale: on cpu, expected meta"),
    (paged(out=empty(3, 2, 16, 512, device="cpu")), RuntimeError, "out: on cpu, expected meta"),
    (paged(q_nope=empty(3, 2, 16, 512).requires_grad_()), RuntimeError, "no backward"),
]  # fmt: skip


@pytest.mark.parametrize("call", GOOD, ids=range(len(GOOD)))
def test_good_calls_pass(call: dict[str, Any]) -> None:
    batch, max_q, lengths, parts = ops._check_arguments(**call)
    q, ragged_ = call["q_nope"], call["cu_seqlens_q"] is not None
    assert batch == (3 if ragged_ else q.shape[0]) and max_q == (3 if ragged_ else q.shape[1])
    on_device = isinstance(call["cache_seqlens"], torch.Tensor) and call["cache_seqlens"].device.type == "meta"
    assert (lengths is None) == on_device
    assert parts == (0 if call["precise"] is None else 1)  # 0: the launch decides


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[f"{i}-{b[2][:30]}" for i, b in enumerate(BAD)])
def test_bad_argument_is_named(call: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mla_decode(**call)


def test_every_argument_has_a_bad_case() -> None:
    named = {message.split(":")[0].split(r"\[")[0] for _, _, message in BAD}
    assert set(paged()) <= named, set(paged()) - named


def on_cpu(call: dict[str, Any]) -> dict[str, Any]:
    return {k: torch.zeros_like(v, device="cpu") if isinstance(v, torch.Tensor) else v for k, v in call.items()}


def test_the_device_is_checked_last() -> None:
    with pytest.raises(RuntimeError, match="q_nope: on cpu, expected a Hopper GPU"):
        mla_decode(**on_cpu(paged()))
    with pytest.raises(ValueError, match="softmax_scale: -1"):
        mla_decode(**on_cpu(paged(softmax_scale=-1)))


def test_other_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(ops, "_device", lambda _: ("NVIDIA A100", 8, 0, 108))
    with pytest.raises(RuntimeError, match=r"cuda:0 is NVIDIA A100 with compute capability 8.0, expected 9.0"):
        ops._check_device(device, None)
    monkeypatch.setattr(ops, "_device", lambda _: ("NVIDIA H200", 9, 0, 132))
    with pytest.raises(ValueError, match="num_ctas: 133, expected 1 to 132, the SMs of NVIDIA H200"):
        ops._check_device(device, 133)


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_check_device", lambda *_: None)
    monkeypatch.setattr(ops, "_LOAD_FAILURE", "the operator library is not built")
    with pytest.raises(RuntimeError, match="is not built"):
        mla_decode(**on_cpu(paged()))
