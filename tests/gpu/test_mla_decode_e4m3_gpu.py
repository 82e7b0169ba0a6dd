"""mla_decode over a float8_e4m3fn cache on a Hopper GPU, against fp64 on the dequantised cache.

As test_mla_decode_gpu.py, whose docstring applies. Slots that no kernel may use hold e4m3's NaN, of either sign.
"""

from __future__ import annotations

import math

import pytest
import torch
from operator_run import DRAWN, NEEDS_HOPPER, check, run
from problems import (
    CACHE_LAYOUTS,
    HEADS,
    PAGE_SIZES,
    QUERY_LAYOUTS,
    Built,
    Problem,
    build,
    draw_e4m3,
    draw_groups,
    gpu_p_parts,
    judge,
)

from etap_integration import mla_decode, numerics, ops

pytestmark = NEEDS_HOPPER


def e4m3(**fields) -> Problem:
    return Problem(e4m3=True, **fields)


@pytest.mark.parametrize("seed", range(DRAWN))
def test_drawn(seed: int) -> None:
    check(draw_e4m3(seed))


# Scales of each key and 128 latent columns, with an e4m3 or a 16-bit rope part; a 16-bit rope part with one scale.
FORMS = {"groups": {"groups": 4}, "both": {"groups": 4, "rope16": True}, "rope16": {"rope16": True}}


@pytest.mark.parametrize("seed", range(DRAWN))
def test_drawn_groups(seed: int) -> None:
    check(draw_groups(seed))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("page_size", (0, *PAGE_SIZES))
def test_page_edges_of_groups(page_size: int, form: str) -> None:
    p = page_size or 64
    edges = sorted({0, 1, 63, 64, 65, 127, 128, 129, p - 1, p, p + 1, 2 * p - 1, 2 * p, 2 * p + 1, 5 * p + 1})
    for causal in (False, True):
        check(e4m3(lengths=tuple(edges), page_size=page_size, sq=2, causal=causal, heads=8, **FORMS[form]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("heads", HEADS)
def test_heads_and_query_tokens_of_groups(heads: int, dtype: torch.dtype, form: str) -> None:
    for sq in (1, 3):
        for precise in (False, True):
            lengths = (77, 3, 200, 0, 130)
            check(e4m3(lengths=lengths, heads=heads, sq=sq, causal=True, dtype=dtype, precise=precise, **FORMS[form]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("page_size", [0, 1, 64])
def test_long_requests_of_groups(page_size: int, form: str) -> None:
    for heads in (8, 16, 32, 64):
        check(e4m3(lengths=(40000,), page_size=page_size, heads=heads, **FORMS[form]))
        check(e4m3(lengths=(5, 20011, 0, 64, 700), page_size=page_size, heads=heads, **FORMS[form]))


@pytest.mark.parametrize("form", ["groups", "both"])
@pytest.mark.parametrize("page_size", [1, 64])
def test_graph_replay_with_new_lengths_and_scales_of_groups(page_size: int, form: str) -> None:
    full = build(e4m3(lengths=(2048,) * 4, page_size=page_size, **FORMS[form]), "cuda")
    *tensors, lengths = full.args
    arr, out = full.options["ckv_scale_arr"], full.new_out()
    options = {"out": out, "return_lse": True, "ckv_scale_arr": arr}
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        mla_decode(*tensors, lengths, **options)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, lse = mla_decode(*tensors, lengths, **options)
    for case in ((64, 1, 0, 65), (2048,) * 4, (0,) * 4, (1, 0, 2047, 63)):
        lengths.copy_(torch.tensor(case))
        arr *= 0.75
        out.fill_(math.nan)
        lse.fill_(math.nan)
        graph.replay()
        problem = full.problem.with_(lengths=case)
        judge(Built(problem, full.args, full.options, full.logit_bound), out, lse, gpu_p_parts(problem))


def test_one_scale_is_as_many_equal_ones() -> None:
    built = build(e4m3(lengths=(900, 70, 64), rope16=True), "cuda")
    expected, expected_lse = run(built, ckv_scale=0.5)
    each, each_lse = run(built, ckv_scale=torch.full((3,), 0.5, device="cuda"))
    assert torch.equal(each, expected) and torch.equal(each_lse, expected_lse)
    arr = torch.full((*built.args[2].shape[:2], 4), 0.5, device="cuda")
    out, lse = run(built, ckv_scale_arr=arr)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("page_size", (0, *PAGE_SIZES))
def test_page_edges(page_size: int, causal: bool) -> None:
    p = page_size or 64
    edges = sorted({0, 1, 63, 64, 65, 127, 128, 129, p - 1, p, p + 1, 2 * p - 1, 2 * p, 2 * p + 1, 5 * p + 1})
    for seed in (page_size, page_size + 1):
        check(e4m3(lengths=tuple(edges), page_size=page_size, sq=2, causal=causal, heads=8, seed=seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("heads", HEADS)
def test_heads_and_query_tokens(heads: int, dtype: torch.dtype) -> None:
    for sq in (1, 2, 5, 8):
        for causal in (False, True):
            check(e4m3(lengths=(77, 3, 200, 0, 130), heads=heads, sq=sq, causal=causal, dtype=dtype, page_size=16))


@pytest.mark.parametrize("layout", sorted(set(CACHE_LAYOUTS)))
@pytest.mark.parametrize("page_size", [0, 1, 16, 64])
def test_layouts(page_size: int, layout: str) -> None:
    for query_layout in QUERY_LAYOUTS:
        check(e4m3(lengths=(300, 65, 1), page_size=page_size, cache_layout=layout, query_layout=query_layout, sq=2))


@pytest.mark.parametrize("logits", ["extreme", "rising", "falling"])
@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_hard_logits(logits: str, precise: bool, dtype: torch.dtype) -> None:
    for heads in (8, 16, 32):
        for out_dtype in (None, torch.float32):
            check(
                e4m3(
                    lengths=(1000, 4000, 64), heads=heads, logits=logits, precise=precise, dtype=dtype,
                    out_dtype=out_dtype, scales=(0.5, 0.75),
                )
            )  # fmt: skip


@pytest.mark.parametrize("heads", [8, 16, 32])
def test_the_largest_queries(heads: int) -> None:
    """bfloat16 queries up to 3e38 do not overflow fp16: the softmax scale keeps the logits moderate."""
    problem = e4m3(lengths=(500, 70, 2000), heads=heads, q_scale=2.0**125, softmax_scale=2.0**-121 / 24)
    built = build(problem, "cuda")
    assert built.args[0].abs().max() > 1e38
    out, lse = run(built)
    judge(built, out, lse, gpu_p_parts(problem), rounded=built.reference()[0].to(torch.bfloat16))


def test_the_smallest_queries() -> None:
    """bfloat16 queries below fp16's range keep their logits."""
    scales = (2.0**60, 2.0**60)
    check(e4m3(lengths=(500, 70), q_scale=2.0**-60, scales=scales))


def test_nan_in_the_cache_is_not_hidden() -> None:
    built = build(e4m3(lengths=(100, 100), page_size=0, poison=0.0), "cuda")
    built.args[2].view(torch.uint8)[0, 50, 7] = 0x7F
    out, lse = run(built)
    assert out[0].isnan().all()
    assert out[1].isfinite().all() and lse[1].isfinite().all()


@pytest.mark.parametrize("page_size", [1, 64])
def test_ragged_queries_with_zeros(page_size: int) -> None:
    q_lens, lengths = (0, 3, 1, 0, 8, 2, 0), (100, 0, 640, 5, 65, 2, 0)
    for causal in (False, True):
        for heads in (5, 16, 64):
            check(e4m3(lengths=lengths, q_lens=q_lens, sq=8, heads=heads, causal=causal, page_size=page_size))


@pytest.mark.parametrize("page_size", [0, 1, 64])
@pytest.mark.parametrize("heads", [8, 16, 32, 64])
def test_one_long_request_among_short_ones(page_size: int, heads: int) -> None:
    check(e4m3(lengths=(40000,), page_size=page_size, heads=heads))
    check(e4m3(lengths=(5, 20011, 0, 64, 700), page_size=page_size, heads=heads))


@pytest.mark.parametrize("num_ctas", [1, 2, 3, 64, 78, 131, None])
def test_num_ctas(num_ctas: int | None) -> None:
    check(e4m3(lengths=(3000, 64, 0, 777), num_ctas=num_ctas))
    check(e4m3(lengths=(9000,), num_ctas=num_ctas, heads=64))


@pytest.mark.parametrize("page_size", [1, 64])
def test_more_requests_than_sms(page_size: int) -> None:
    check(e4m3(lengths=tuple(i * 7 % 203 for i in range(400)), page_size=page_size))
    check(e4m3(lengths=(0,) * 399 + (70,), page_size=page_size))


def test_precise_beats_single_part() -> None:
    errors = []
    for precise in (False, True):
        built = build(e4m3(lengths=(4096, 4096), out_dtype=torch.float32, precise=precise), "cuda")
        errors.append((run(built)[0].double() - built.reference()[0]).pow(2).mean().sqrt().item())
    assert errors[1] < 0.05 * errors[0], errors


def test_as_exact_as_the_same_values_in_bf16() -> None:
    built = build(e4m3(lengths=(4096, 1000, 70)), "cuda")
    exact = built.reference()[0]
    wide = [c.float().to(torch.bfloat16) for c in built.args[2:4]]
    of_bf16 = mla_decode(*built.args[:2], *wide, *built.args[4:])
    errors = [(x.double() - exact).pow(2).mean().sqrt().item() for x in (run(built)[0], of_bf16)]
    assert errors[0] < 1.1 * errors[1], errors


@pytest.mark.parametrize("form", ["float", "tensor", "scalar", "each"])
def test_forms_of_scales(form: str) -> None:
    """A float, one element, no dimension, or one per request: the same bits for the same values."""
    built = build(e4m3(lengths=(900, 900, 64)), "cuda")
    expected, expected_lse = run(built, ckv_scale=0.75, kpe_scale=1.5)
    device = {"device": "cuda", "dtype": torch.float32}
    make = {
        "float": float,
        "tensor": lambda x: torch.tensor([x], **device),
        "scalar": lambda x: torch.tensor(x, **device),
        "each": lambda x: torch.tensor([x, 1.0, x, 1.0, x], **device)[::2],
    }[form]
    out, lse = run(built, ckv_scale=make(0.75), kpe_scale=make(1.5))
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    plain, plain_lse = run(built)
    same, same_lse = run(built, ckv_scale=torch.empty(0, **device), kpe_scale=None)
    assert torch.equal(same, plain) and torch.equal(same_lse, plain_lse)


def test_each_request_has_its_scale() -> None:
    built = build(e4m3(lengths=(900, 900)), "cuda")
    scales = torch.tensor([0.5, 3.0], device="cuda")
    out, lse = run(built, ckv_scale=scales, kpe_scale=scales.flip(0).contiguous())
    for i, (ckv, kpe) in enumerate(((0.5, 3.0), (3.0, 0.5))):
        alone, alone_lse = run(built, ckv_scale=ckv, kpe_scale=kpe)
        assert torch.equal(out[i], alone[i]) and torch.equal(lse[i], alone_lse[i])


def test_no_host_synchronisation() -> None:
    built = build(e4m3(lengths=(1000, 30)), "cuda")
    scale = torch.tensor([0.5], device="cuda")
    run(built, ckv_scale=scale)
    out = built.new_out()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mla_decode(*built.args, **built.options, out=out, return_lse=True, ckv_scale=scale, kpe_scale=scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("page_size", [1, 64])
def test_graph_replay_with_new_lengths_and_scales(page_size: int) -> None:
    batch, capacity = 6, 2048
    cases = [(64, 1, 0, 0, 7, 65), (2048,) * 6, (0,) * 6, (1, 0, 2047, 63, 64, 65), (500,) * 6]
    full = build(e4m3(lengths=(capacity,) * batch, page_size=page_size), "cuda")
    *tensors, lengths = full.args
    out, static, scale = full.new_out(), torch.empty_like(lengths), torch.ones(1, device="cuda")
    static.copy_(torch.tensor(cases[0]))
    options = {"out": out, "return_lse": True, "ckv_scale": scale, "kpe_scale": scale}
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        mla_decode(*tensors, static, **options)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, lse = mla_decode(*tensors, static, **options)
    for i, case in enumerate([*cases, *cases]):
        value = (1.0, 0.5, 2.0)[i % 3]
        static.copy_(torch.tensor(case))
        scale.fill_(value)
        out.fill_(math.nan)
        lse.fill_(math.nan)
        graph.replay()
        problem = full.problem.with_(lengths=case, scales=(value, value))
        judge(Built(problem, (*tensors, static), {}, full.logit_bound), out, lse, gpu_p_parts(problem))


def test_mixed_with_bf16_on_one_workspace() -> None:
    """Kernels for both cache formats leave the workspace as they found it."""
    problems = [e4m3(lengths=(5000, 900), seed=3), Problem(lengths=(5000, 900), seed=4)]
    built = [build(p, "cuda") for p in problems]
    expected = [run(b) for b in built]
    for _ in range(5):
        for b, (out, lse) in zip(built, expected, strict=True):
            again, lse_again = run(b)
            assert torch.equal(again, out) and torch.equal(lse_again, lse)


@pytest.mark.parametrize("page_size", [1, 64])
def test_cache_past_2_31_bytes(page_size: int) -> None:
    slots = 70000 * 64
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of free GPU memory")
    buffer = torch.empty(slots // page_size, page_size, 576, dtype=torch.uint8, device="cuda")
    assert buffer.numel() > 2**31
    length = 1000
    pages = -(-length // page_size)
    table = torch.stack([torch.arange(pages), torch.arange(buffer.shape[0] - pages, buffer.shape[0])]).int().cuda()
    keys = torch.randn(2 * pages, page_size, 576, device="cuda").to(torch.float8_e4m3fn)
    buffer[table.flatten().long()] = keys.view(torch.uint8)
    q = torch.randn(2, 1, 16, 576, device="cuda").bfloat16()
    lengths = torch.full((2,), length, dtype=torch.int32, device="cuda")
    cache = buffer.view(torch.float8_e4m3fn)
    out, lse = mla_decode(
        q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:], table, lengths, return_lse=True
    )
    local = torch.arange(2 * pages, device="cuda").int().view(2, pages)
    args = (q[..., :512], q[..., 512:], keys[..., :512], keys[..., 512:], local, lengths)
    problem = e4m3(lengths=(length, length), page_size=page_size)
    judge(Built(problem, args, {}, logit_bound=40.0), out, lse, gpu_p_parts(problem))


def test_registration() -> None:
    built = build(e4m3(lengths=(100, 30), poison=0.0), "cuda")
    out, lse = built.new_out().zero_(), torch.zeros(2, 16, 1, device="cuda")
    scale = torch.ones(1, device="cuda")
    args = (*built.args, None, 1, numerics.DEFAULT_SCALE, False, out, lse, 0, 1, scale, None, 1.0, 2.0)
    # not test_schema: torch cannot compare float8 tensors
    torch.library.opcheck(torch.ops.etap.mla_decode.default, args, test_utils="test_faketensor")


def test_operator_refuses_scales_without_e4m3() -> None:
    built = build(Problem(lengths=(100, 30)), "cuda")
    out = built.new_out()
    with pytest.raises(RuntimeError, match="float8_e4m3fn"):
        torch.ops.etap.mla_decode(*built.args, None, 1, ops.DEFAULT_SCALE, False, out, None, 0, 1, None, None, 2.0, 1.0)
