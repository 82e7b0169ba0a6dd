"""Problems: their sizes, their tensors, and the fp64 reference."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tools.bench.problem import DIM_LATENT, DIM_QK, DIM_ROPE, Inputs, KvPool, Problem


def _inputs(problem: Problem) -> Inputs:
    return Inputs(problem, KvPool(problem.cache_tokens + 100, problem.kv_dtype, "cpu"))


def test_sizes():
    p = Problem(16, 65536)
    assert p.kv_bytes == 16 * 65536 * 576 * 2
    assert p.pages_per_request == 1024
    assert p.rows == 16
    assert not p.causal
    assert p.flops == 2 * 16 * 16 * 65536 * (576 + 512)
    ragged = Problem(3, 65, heads=8, q_len=4, page_size=64, kv_dtype="e4m3")
    assert (ragged.pages_per_request, ragged.cache_tokens, ragged.rows, ragged.causal) == (2, 384, 32, True)
    assert ragged.kv_bytes == 3 * 65 * 576


@pytest.mark.parametrize("field", ["batch", "kv_len", "heads", "q_len", "page_size"])
def test_sizes_below_one_are_refused(field):
    with pytest.raises(ValueError, match=field):
        Problem(**{"batch": 1, "kv_len": 1, field: 0})
    with pytest.raises(ValueError, match="kv_dtype"):
        Problem(1, 1, kv_dtype="fp32")


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_caches_hold_the_same_values_in_both_layouts(page_size):
    p = Problem(3, 100, page_size=page_size)
    inputs = _inputs(p)
    pages = 3 * p.pages_per_request
    latent, rope, scales = inputs.fused_caches
    assert scales is None
    assert latent.shape == (pages, page_size, DIM_LATENT)
    assert rope.shape == (pages, page_size, DIM_ROPE)
    assert latent.stride(1) == rope.stride(1) == DIM_QK
    assert rope.data_ptr() - latent.data_ptr() == 2 * DIM_LATENT
    split_latent, split_rope = inputs.split_caches
    assert split_latent.is_contiguous()
    assert split_rope.is_contiguous()
    assert torch.equal(latent, split_latent)
    assert torch.equal(rope, split_rope)
    assert inputs.page_table.dtype == inputs.cache_seqlens.dtype == torch.int32
    assert sorted(inputs.page_table.flatten().tolist()) == list(range(pages))
    assert inputs.page_table.flatten().tolist() != list(range(pages)), "pages are scattered"


@pytest.mark.parametrize(
    "problem",
    [Problem(3, 100), Problem(2, 65, heads=5, q_len=4), Problem(2, 3, heads=8, q_len=2, page_size=1, kv_dtype="fp16")],
    ids=str,
)
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30])
def test_reference_is_attention(problem, chunk_bytes):
    inputs = _inputs(problem)
    out, lse = inputs.reference(chunk_bytes)
    for i in range(problem.batch):
        kv = torch.cat(inputs.split_caches, -1)[inputs.page_table[i].long()].flatten(0, 1)[: problem.kv_len].double()
        q = torch.cat([inputs.q_nope[i], inputs.q_rope[i]], -1).double().transpose(0, 1)
        keep = torch.ones(problem.q_len, problem.kv_len, dtype=torch.bool).tril(problem.kv_len - problem.q_len)
        k, v = kv.expand(problem.heads, -1, -1), kv[:, :DIM_LATENT].expand(problem.heads, -1, -1)
        expected = scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=problem.softmax_scale)
        torch.testing.assert_close(out[i].transpose(0, 1), expected)
        logits = (q @ kv.T * problem.softmax_scale).masked_fill(~keep, float("-inf"))
        torch.testing.assert_close(lse[i], logits.logsumexp(-1))


def test_reference_of_an_e4m3_cache_uses_its_widened_values():
    p = Problem(2, 70, kv_dtype="e4m3")
    narrow = _inputs(p)
    assert narrow.q_nope.dtype == torch.bfloat16
    wide_pool = KvPool(narrow.pool.tokens, "bf16", "cpu")
    wide_pool.rows.view(torch.bfloat16).copy_(narrow.pool.rows.view(torch.float8_e4m3fn))
    wide = Inputs(Problem(2, 70), wide_pool)
    for a, b in zip(narrow.reference(), wide.reference(), strict=True):
        torch.testing.assert_close(a, b)


def test_tokens_of_656_bytes_hold_scales_between_latent_and_rope():
    p = Problem(2, 70, kv_dtype="fp8_ds_mla")
    inputs = _inputs(p)
    latent, rope, scales = inputs.fused_caches
    assert [x.stride(1) * x.element_size() for x in (latent, rope, scales)] == [656] * 3
    assert [x.data_ptr() - latent.data_ptr() for x in (scales, rope)] == [512, 528]
    assert p.kv_bytes == 2 * 70 * 656
    slots = inputs.page_table[1, 0].long() * 64 + torch.arange(64)
    kv = inputs.pool.widened(slots)
    page = inputs.page_table[1, 0]
    torch.testing.assert_close(kv[:, 130], latent[page, :, 130].double() * scales[page, :, 1].double())
    torch.testing.assert_close(kv[:, DIM_LATENT:], rope[page].double())
    assert scales.unique().numel() > 500, "each group has a scale of its own"
    for result in inputs.reference():
        assert result.isfinite().all()


@pytest.mark.parametrize("q_len", [1, 3])
def test_drawn_lengths(q_len):
    p = Problem(5, 200, heads=4, q_len=q_len, shortest=25)
    lengths = p.lengths.tolist()
    assert min(lengths) >= 25 and max(lengths) <= 200 and len(set(lengths)) > 1
    assert p.kv_bytes == sum(lengths) * 1152
    inputs = _inputs(p)
    assert inputs.cache_seqlens.tolist() == lengths
    out, lse = inputs.reference(1)
    for i, length in enumerate(lengths):
        pages = inputs.page_indices[inputs.page_indptr[i] : inputs.page_indptr[i + 1]]
        assert pages.numel() == -(-length // 64)
        kv = inputs.pool.widened((pages[:, None] * 64 + torch.arange(64)).flatten()[:length])
        q = torch.cat([inputs.q_nope[i], inputs.q_rope[i]], -1).double().transpose(0, 1)
        keep = torch.ones(q_len, length, dtype=torch.bool).tril(length - q_len)
        logits = (q @ kv.T * p.softmax_scale).masked_fill(~keep, float("-inf"))
        torch.testing.assert_close(lse[i], logits.logsumexp(-1))
        torch.testing.assert_close(out[i].transpose(0, 1), logits.softmax(-1) @ kv[:, :DIM_LATENT])


def test_lengths_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match="shortest must be 0 or from q_len 2 to 64, got 65"):
        Problem(1, 64, q_len=2, shortest=65)
    with pytest.raises(ValueError, match="got 1"):
        Problem(1, 64, q_len=2, shortest=1)


def test_the_same_seed_draws_the_same_inputs():
    a, b = (_inputs(Problem(2, 64, seed=5)) for _ in range(2))
    assert torch.equal(a.q_nope, b.q_nope)
    assert torch.equal(a.page_table, b.page_table)


def test_a_pool_that_does_not_serve_is_refused():
    with pytest.raises(ValueError, match="100 bf16 tokens"):
        Inputs(Problem(2, 64), KvPool(100, "bf16", "cpu"))
    with pytest.raises(ValueError, match="bf16"):
        Inputs(Problem(1, 64, kv_dtype="fp16"), KvPool(100, "bf16", "cpu"))
