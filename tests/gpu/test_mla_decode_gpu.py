"""mla_decode on a Hopper GPU, against fp64 and beside a reference that rounds as a query-major kernel does.

Runs by plain pytest from the repository's root; nothing needs to be installed. Without a Hopper GPU everything is
skipped; with one, a library that does not load is a failure. ETAP_TEST_PROBLEMS sets how many problems are drawn
(320), for runs under compute-sanitizer.
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
    draw,
    gpu_p_parts,
    judge,
)

from etap_integration import mla_decode, ops

pytestmark = NEEDS_HOPPER


@pytest.mark.parametrize("seed", range(DRAWN))
def test_drawn(seed: int) -> None:
    check(draw(seed))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("page_size", (0, *PAGE_SIZES))
def test_page_edges(page_size: int, causal: bool) -> None:
    p = page_size or 64
    edges = sorted(
        {0, 1, 63, 64, 65, 127, 128, 129, p - 1, p, p + 1, 2 * p - 1, 2 * p, 2 * p + 1, 5 * p - 1, 5 * p + 1}
    )
    check(Problem(lengths=tuple(edges), page_size=page_size, sq=2, causal=causal, heads=8, seed=page_size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("heads", HEADS)
def test_heads_and_query_tokens(heads: int, dtype: torch.dtype) -> None:
    for sq in range(1, 9):
        for causal in (False, True):
            check(Problem(lengths=(77, 3, 200, 0, 130), heads=heads, sq=sq, causal=causal, dtype=dtype, page_size=16))


@pytest.mark.parametrize("layout", sorted(set(CACHE_LAYOUTS)))
@pytest.mark.parametrize("page_size", [0, 1, 16, 64])
def test_layouts(page_size: int, layout: str) -> None:
    for query_layout in QUERY_LAYOUTS:
        check(Problem(lengths=(300, 65, 1), page_size=page_size, cache_layout=layout, query_layout=query_layout, sq=2))


def test_strided_output() -> None:
    built = build(Problem(lengths=(300, 65), sq=2), "cuda")
    expected = run(built)[0]
    wide = torch.full((2, 2, 16, 576), math.nan, dtype=torch.bfloat16, device="cuda")
    mla_decode(*built.args, **built.options, out=wide[..., :512])
    assert torch.equal(wide[..., :512], expected) and wide[..., 512:].isnan().all()


@pytest.mark.parametrize("log2", [-100, -20, -13, 10, 17, 100])
def test_caches_in_and_out_of_fp16_range(log2: int) -> None:
    for heads, precise in ((16, None), (16, False), (24, None), (32, None), (64, None)):
        check(Problem(lengths=(3000, 64, 1000, 0), heads=heads, cache_scale=2.0**log2, precise=precise))
        check(Problem(lengths=(70, 500), heads=heads, sq=2, causal=True, cache_scale=2.0**log2, precise=precise))


@pytest.mark.parametrize("logits", ["extreme", "rising", "falling"])
@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_hard_logits(logits: str, precise: bool, dtype: torch.dtype) -> None:
    for heads in (16, 32, 64):
        check(Problem(lengths=(1000, 4000, 64), heads=heads, logits=logits, precise=precise, dtype=dtype))
        check(
            Problem(lengths=(3000,), heads=heads, logits=logits, precise=precise, dtype=dtype, out_dtype=torch.float32)
        )


def test_precise_beats_single_part() -> None:
    problem = Problem(lengths=(4096, 4096), out_dtype=torch.float32)
    errors = []
    for precise in (False, True):
        built = build(problem.with_(precise=precise), "cuda")
        errors.append((run(built)[0].double() - built.reference()[0]).pow(2).mean().sqrt().item())
    assert errors[1] < 0.05 * errors[0], errors


@pytest.mark.parametrize("page_size", [1, 64])
def test_ragged_queries_with_zeros(page_size: int) -> None:
    q_lens = (0, 3, 1, 0, 8, 2, 0)
    lengths = (100, 0, 640, 5, 65, 2, 0)
    for causal in (False, True):
        for heads in (5, 16, 64):
            check(Problem(lengths=lengths, q_lens=q_lens, sq=8, heads=heads, causal=causal, page_size=page_size))


def test_causal_with_fewer_keys_than_queries() -> None:
    """Query tokens before the first key see nothing."""
    for heads in (8, 32):
        check(Problem(lengths=(3, 1, 8, 0, 64), sq=8, heads=heads, causal=True))


@pytest.mark.parametrize("page_size", [1, 64])
def test_more_requests_than_sms(page_size: int) -> None:
    check(Problem(lengths=tuple(i * 7 % 203 for i in range(400)), page_size=page_size))
    check(Problem(lengths=(0,) * 399 + (70,), page_size=page_size))


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("heads", [8, 16, 32])
def test_one_to_two_requests_an_sm(page_size: int, heads: int) -> None:
    """Of drawn lengths: dealt whole, by length; some have none."""
    batch = torch.cuda.get_device_properties(0).multi_processor_count * 3 // 2
    for most in (300, 2500):
        lengths = tuple(most // 4 + (137 * i * i + 5 * i) % (3 * most // 4) for i in range(batch))
        check(Problem(lengths=lengths, heads=heads, page_size=page_size))
        some = tuple(0 if i % 7 == 1 else n for i, n in enumerate(lengths))
        check(Problem(lengths=some, heads=heads, page_size=page_size))


@pytest.mark.parametrize("page_size", [0, 1, 64])
@pytest.mark.parametrize("heads", [8, 16, 32, 64])
def test_one_long_request_among_short_ones(page_size: int, heads: int) -> None:
    check(Problem(lengths=(40000,), page_size=page_size, heads=heads))
    check(Problem(lengths=(5, 20011, 0, 64, 700), page_size=page_size, heads=heads))


@pytest.mark.parametrize("num_ctas", [1, 2, 3, 64, 78, 131, None])
def test_num_ctas(num_ctas: int | None) -> None:
    check(Problem(lengths=(3000, 64, 0, 777), num_ctas=num_ctas))
    check(Problem(lengths=(9000,), num_ctas=num_ctas, heads=64))


def test_empty_batches() -> None:
    for problem in (Problem(lengths=()), Problem(lengths=(), page_size=0), Problem(lengths=(10, 0), q_lens=(0, 0))):
        out, lse = run(build(problem, "cuda"))
        assert out.numel() == 0 and lse.numel() == 0, problem
    check(Problem(lengths=(0, 0, 0), sq=2, causal=True))


def test_lengths_on_the_host() -> None:
    built = build(Problem(lengths=(100, 100, 100)), "cuda")
    expected, expected_lse = run(built)
    for lengths in (100, [100, 100, 100], torch.tensor([100, 100, 100])):
        built.args = (*built.args[:5], lengths)
        out, lse = run(built)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse), lengths


def test_default_output_and_no_lse() -> None:
    built = build(Problem(lengths=(100, 30)), "cuda")
    expected, _ = run(built)
    out = mla_decode(*built.args, **built.options)
    assert isinstance(out, torch.Tensor) and torch.equal(out, expected)


def test_no_host_synchronisation() -> None:
    built = build(Problem(lengths=(1000, 30)), "cuda")
    run(built)
    out = built.new_out()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mla_decode(*built.args, **built.options, out=out, return_lse=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("heads", [16, 64])
def test_graph_replay_with_new_lengths_and_pages(page_size: int, heads: int) -> None:
    """One graph, captured on short lengths and padded requests, replayed on longer, shorter and empty ones."""
    batch, capacity = 6, 2048
    cases = [
        (64, 1, 0, 0, 7, 65), (2048,) * 6, (0,) * 6, (1, 0, 2047, 63, 64, 65), (0, 0, 0, 0, 0, 1500), (500,) * 6,
    ]  # fmt: skip
    full = build(Problem(lengths=(capacity,) * batch, page_size=page_size, heads=heads), "cuda")
    q_nope, q_rope, ckv, kpe, table, lengths = full.args
    table = table[:, : capacity // page_size].clone()
    out, static = full.new_out(), torch.empty_like(lengths)
    args = (q_nope, q_rope, ckv, kpe, table, static)
    static.copy_(torch.tensor(cases[0]))
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        mla_decode(*args, out=out, return_lse=True)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, lse = mla_decode(*args, out=out, return_lse=True)
    generator = torch.Generator().manual_seed(1)
    pages = table.flatten().cpu()
    for case in [*cases, *cases]:
        shuffled = pages[torch.randperm(pages.numel(), generator=generator)].view(batch, -1)
        table.copy_(shuffled)
        static.copy_(torch.tensor(case))
        out.fill_(math.nan)
        lse.fill_(math.nan)
        graph.replay()
        replayed = Built(full.problem.with_(lengths=case), (*args[:5], static), {}, full.logit_bound)
        judge(replayed, out, lse, gpu_p_parts(full.problem))


@pytest.mark.parametrize("heads", [8, 16, 32, 64])
def test_what_launches_leave_in_the_workspace(heads: int) -> None:
    """Launches that use a slot, then leave it alone once, twice, three times, then use it again."""
    whole, cut, other = (
        build(Problem(lengths=n, heads=heads, num_ctas=12), "cuda") for n in ((64, 0, 30), (5000,), (900, 2000, 1))
    )
    expected = {id(b): run(b) for b in (whole, cut, other)}
    for built in (cut, other):
        judge(built, *expected[id(built)], gpu_p_parts(built.problem))
    for order in ([cut] * 5, [cut, whole] * 3, [cut, whole, whole] * 4, [cut, whole, whole, whole, other, cut] * 3):
        for built in order:
            for found, right in zip(run(built), expected[id(built)], strict=True):
                assert torch.equal(found, right), built.problem


def test_two_streams_at_once() -> None:
    problems = [
        Problem(lengths=(5000, 64, 0, 900), seed=1),
        Problem(lengths=(3000,) * 9, heads=32, page_size=1, seed=2),
    ]
    built = [build(p, "cuda") for p in problems]
    expected = [run(b) for b in built]
    streams = [torch.cuda.Stream() for _ in built]
    outs = [[b.new_out() for _ in range(30)] for b in built]
    torch.cuda.synchronize()
    lses: list[list[torch.Tensor]] = [[], []]
    for i in range(30):
        for j, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                lses[j].append(mla_decode(*built[j].args, **built[j].options, out=outs[j][i], return_lse=True)[1])
    torch.cuda.synchronize()
    for j, (out, lse) in enumerate(expected):
        for i in range(30):
            assert torch.equal(outs[j][i], out) and torch.equal(lses[j][i], lse), (
                f"call {i} on stream {j}: {problems[j]}"
            )


def test_back_to_back_calls_of_different_shapes() -> None:
    """Counters left over from one call must not reach the next."""
    built = [build(draw(1000 + i), "cuda") for i in range(12)]
    expected = [run(b) for b in built]
    for _ in range(5):
        for b, (out, lse) in zip(built, expected, strict=True):
            again, lse_again = run(b)
            assert torch.equal(again, out) and torch.equal(lse_again, lse), b.problem


@pytest.mark.parametrize("page_size", [1, 64])
def test_cache_past_2_31_elements(page_size: int) -> None:
    slots = 70000 * 64
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    buffer = torch.empty(slots // page_size, page_size, 576, dtype=torch.bfloat16, device="cuda")
    assert buffer[..., :512].stride(0) * buffer.shape[0] > 2**31
    length = 1000
    pages = -(-length // page_size)
    table = torch.stack([torch.arange(pages), torch.arange(buffer.shape[0] - pages, buffer.shape[0])]).int().cuda()
    buffer[table.flatten().long()] = torch.randn(2 * pages, page_size, 576, device="cuda").bfloat16()
    q = torch.randn(2, 1, 16, 576, device="cuda").bfloat16()
    problem = Problem(lengths=(length, length), page_size=page_size)
    lengths = torch.tensor(problem.lengths, dtype=torch.int32, device="cuda")
    args = (q[..., :512], q[..., 512:], buffer[..., :512], buffer[..., 512:], table, lengths)
    built = Built(problem, args, {}, logit_bound=40.0)
    judge(built, *run(built), gpu_p_parts(problem))


def test_current_device_is_not_the_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    built = build(Problem(lengths=(700, 64)), "cuda:1")
    with torch.cuda.device(0):
        out, lse = run(built)
    judge(built, out, lse, gpu_p_parts(built.problem))


def test_compiles_without_a_graph_break() -> None:
    built = build(Problem(lengths=(300, 0), poison=0.0), "cuda")
    expected, expected_lse = run(built)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(*args):
        out, lse = mla_decode(*args, return_lse=True)
        return out * 1, lse

    out, lse = step(*built.args)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_registration() -> None:
    """Schema (what is mutated) and fake implementation agree with the kernel."""
    built = build(Problem(lengths=(100, 30), poison=0.0), "cuda")
    out, lse = built.new_out().zero_(), torch.zeros(2, 16, 1, device="cuda")
    args = (*built.args, None, 1, ops.DEFAULT_SCALE, False, out, lse, 0, 2)
    torch.library.opcheck(torch.ops.etap.mla_decode.default, args, test_utils=("test_schema", "test_faketensor"))


def test_errors_on_the_device() -> None:
    built = build(Problem(lengths=(100, 30)), "cuda")
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    with pytest.raises(ValueError, match=rf"num_ctas: {sms + 1}, expected 1 to {sms}"):
        mla_decode(*built.args, num_ctas=sms + 1)
    with pytest.raises(RuntimeError, match="page_table: on cpu"):
        mla_decode(*built.args[:4], built.args[4].cpu(), built.args[5])


def test_contents_are_checked_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_CHECK", True)
    built = build(Problem(lengths=(100, 30)), "cuda")
    mla_decode(*built.args)
    *rest, table, lengths = built.args
    with pytest.raises(ValueError, match=r"cache_seqlens\[1\]: -1"):
        mla_decode(*rest, table, lengths - torch.tensor([0, 31], device="cuda").int())
    broken = table.clone()
    broken[0, 1] = -1
    with pytest.raises(ValueError, match=r"page_table\[0, 1\]: -1"):
        mla_decode(*rest, broken, lengths)
