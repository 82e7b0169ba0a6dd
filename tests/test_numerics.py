"""The tile-accurate models against fp64: ETAP with P in two parts is as exact as fp32, with one part as a query-major
kernel, and masks, empty rows and merges are right."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from problems import PAGE_SIZES, Built, Problem, build, default_p_parts, draw, draw_e4m3, draw_groups, judge

from etap_integration import numerics


def rmse(model, problem: tuple, exact: torch.Tensor, **options) -> float:
    return numerics.error(model(*problem, **options)[0], exact)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("length", [100, 1000, 3000])
def test_two_parts_beat_one(dtype: torch.dtype, length: int) -> None:
    problem = numerics.draw(2, length, 16, dtype=dtype)
    exact = numerics.reference(*problem)[0]
    wide = {"out_dtype": torch.float32}
    one, two = (rmse(numerics.etap_model, problem, exact, p_parts=n, **wide) for n in (1, 2))
    usual = rmse(numerics.query_major_model, problem, exact, **wide)
    assert two < 0.01 * one, (one, two)
    assert one < 1.25 * usual, "a reference maximum up to 8 too low must not cost P its bits"
    rounded = rmse(numerics.etap_model, problem, exact)
    assert rounded < rmse(numerics.query_major_model, problem, exact)
    assert rounded < 1.01 * numerics.error(exact.to(dtype), exact)[0], "only the output's own rounding should be left"


def test_splits_cost_nothing_in_fp32() -> None:
    problem = numerics.draw(2, 3000, 16)
    exact = numerics.reference(*problem)[0]
    whole, split = (rmse(numerics.etap_model, problem, exact, num_parts=n) for n in (1, 7))
    assert split < 1.01 * whole
    usual = numerics.query_major_model
    in_fp32, in_bf16 = (rmse(usual, problem, exact, num_parts=7, partial_dtype=d) for d in (torch.float32, None))
    assert in_bf16 > 1.1 * in_fp32, "partials kept in 16 bits are what this project avoids"


@pytest.mark.parametrize("seed", range(100))
def test_drawn_problems(seed: int) -> None:
    problem = draw(seed)
    lengths = tuple(min(n, 700) for n in problem.lengths)
    problem = problem.with_(lengths=lengths, heads=min(problem.heads, 17))
    built = build(problem, "cpu")
    parts = 1 if problem.precise is False else 2
    options = {"p_parts": parts, "num_parts": 1 + seed % 4, "out_dtype": problem.out_dtype}
    judge(built, *built.reference(numerics.etap_model, **options), parts)


@pytest.mark.parametrize("page_size", (0, *PAGE_SIZES))
def test_page_edges(page_size: int) -> None:
    p = page_size or 64
    lengths = tuple(sorted({0, 1, p - 1, p, p + 1, 2 * p + 1, 63, 64, 65}))
    built = build(Problem(lengths=lengths, page_size=page_size, sq=3, causal=True, heads=5), "cpu")
    judge(built, *built.reference(numerics.etap_model), 2)


@pytest.mark.parametrize("logits", ["extreme", "rising", "falling"])
@pytest.mark.parametrize("p_parts", [1, 2])
def test_hard_logits(logits: str, p_parts: int) -> None:
    built = build(Problem(lengths=(700, 64, 129), logits=logits), "cpu")
    for num_parts in (1, 3):
        judge(built, *built.reference(numerics.etap_model, p_parts=p_parts, num_parts=num_parts), p_parts)


def test_reference_against_plain_attention() -> None:
    """fp64 softmax attention written out, paged, causal, one request longer than the other."""
    built = build(Problem(lengths=(130, 5), sq=4, heads=3, page_size=16, causal=True), "cpu")
    out, lse = built.reference()
    q_nope, q_rope, ckv, kpe, table, _ = built.args
    for i, n in enumerate((130, 5)):
        slots = [(int(table[i, j // 16]), j % 16) for j in range(n)]
        c, r = (torch.stack([x[s] for s in slots]).double() for x in (ckv, kpe))
        for t in range(4):
            seen = n - 4 + t + 1
            s = (q_nope[i, t].double() @ c[:seen].T + q_rope[i, t].double() @ r[:seen].T) / 24
            assert torch.allclose(out[i, t], s.softmax(-1) @ c[:seen], rtol=1e-12)
            assert torch.allclose(lse[i, :, t], s.logsumexp(-1), rtol=1e-12)


@pytest.mark.parametrize(
    "model", [numerics.reference, numerics.rounded_reference, numerics.etap_model, numerics.query_major_model]
)
def test_rows_that_see_nothing(model) -> None:
    built = build(Problem(lengths=(0, 2, 1), sq=4, heads=2, causal=True), "cpu")
    out, lse = built.reference(model)
    visible = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 2], [0, 0, 0, 1]])
    assert torch.equal(lse == -math.inf, (visible == 0)[:, None].expand(3, 2, 4))
    assert (out[visible == 0] == 0).all() and out.isfinite().all()


def test_ragged_layout() -> None:
    built = build(Problem(lengths=(70, 0, 9), q_lens=(2, 1, 3), sq=3, heads=5), "cpu")
    out, lse = built.reference(numerics.etap_model)
    assert out.shape == (6, 5, 512) and lse.shape == (5, 6)
    assert (lse[:, 2] == -math.inf).all() and (out[2] == 0).all()
    judge(built, out, lse, 2)


def test_a_stale_reference_maximum_is_bounded() -> None:
    """With a maximum that creeps up by less than 8 a tile, P stays under 2^8 and l and O stay exact."""
    built = build(Problem(lengths=(640,), logits="rising", out_dtype=torch.float32), "cpu")
    exact, exact_lse = built.reference()
    for raise_by in (0.0, 8.0):
        out, lse = built.reference(numerics.etap_model, raise_by=raise_by, out_dtype=torch.float32)
        assert (out.double() - exact).abs().max() < 1e-4 * exact.abs().max()
        assert (lse.double() - exact_lse).abs().max() < 1e-4


def test_judge_catches_a_dropped_key() -> None:
    built = build(Problem(lengths=(200, 65)), "cpu")
    fewer = built.reference(lambda *args, **options: numerics.etap_model(*args[:5], (199, 65), **options))
    with pytest.raises(AssertionError):
        judge(built, *fewer, 2)


def test_judge_catches_nan() -> None:
    built = build(Problem(lengths=(200, 65)), "cpu")
    out, lse = built.reference(numerics.etap_model)
    out[1, 0, 3, 7] = math.nan
    with pytest.raises(AssertionError, match=r"not finite, first \(1, 0, 3, 7\)"):
        judge(built, out, lse, 2)


@pytest.mark.parametrize("drawn", [draw_e4m3, draw_groups])
@pytest.mark.parametrize("seed", range(60))
def test_drawn_e4m3_problems(seed: int, drawn: Callable[[int], Problem]) -> None:
    problem = drawn(seed)
    lengths = tuple(min(n, 700) for n in problem.lengths)
    problem = problem.with_(lengths=lengths, heads=min(problem.heads, 17))
    built = build(problem, "cpu")
    parts = default_p_parts(problem)
    options = {"p_parts": parts, "num_parts": 1 + seed % 4, "out_dtype": problem.out_dtype}
    judge(built, *built.reference(numerics.etap_e4m3_model, **options), parts)


@pytest.mark.parametrize("power", [-60, 0, 70])
def test_scales_of_any_magnitude(power: int) -> None:
    """Scales of groups far from 1, of either sign and 0: no fp16 overflows, and their ratio alone matters."""
    built = build(Problem(lengths=(500, 70), e4m3=True, groups=8, rope16=True, out_dtype=torch.float32), "cpu")
    arr = built.options["ckv_scale_arr"]
    arr[..., 1] *= -1
    arr[..., 3] = torch.where(arr[..., 3].isnan(), math.nan, 0.0)
    exact = built.reference()[0]
    arr *= 2.0**power
    q_nope, *rest = built.args
    scaled = Built(built.problem, ((q_nope.float() * 2.0**-power).to(q_nope.dtype), *rest), built.options, 40.0)
    out, lse = scaled.reference(numerics.etap_e4m3_model, out_dtype=torch.float32)
    assert out.isfinite().all() and lse.isfinite().all()
    assert (out.double() * 2.0**-power - exact).abs().max() < 2.0**-10 * exact.abs().max()


@pytest.mark.parametrize("power", [-140, -126, -60, 0, 60, 125])
def test_no_finite_query_overflows_fp16(power: int) -> None:
    """Q in fp16: below 2^15 for any row, and nothing but the last of 22 bits is lost."""
    generator = torch.Generator().manual_seed(power)
    q = (torch.randn(40, 576, generator=generator, dtype=torch.float64) * 2.0**power).to(torch.bfloat16)
    q[0] = torch.finfo(torch.bfloat16).max
    q[1] = 0
    q[2, 1:] *= 2.0**-20  # one large element
    for ratio in (1.0, 0.3, 3.0):
        exact = q.double()
        exact[:, 512:] *= torch.tensor(ratio, dtype=torch.float32).double()
        q16, down = numerics._query_in_fp16(q.float(), torch.tensor(ratio))
        assert q16.abs().max() < 2**15
        assert down.isfinite().all() and (down >= torch.finfo(torch.float32).tiny).all()
        error = (q16.double() * down.double()[:, None] - exact).abs().amax(1)
        largest = exact.abs().amax(1)
        normal = largest > 2.0**-111  # below, the power of two is at its limit
        assert (error <= largest * 2.0**-22)[normal].all()
        assert (q16.abs().amax(1) >= 2**13)[normal].all()


def test_e4m3_with_the_largest_queries() -> None:
    problem = Problem(lengths=(500, 70), e4m3=True, q_scale=2.0**125, softmax_scale=numerics.DEFAULT_SCALE * 2.0**-121)
    built = build(problem, "cpu")
    assert built.args[0].abs().max() > 1e38
    exact = built.reference()[0]
    judge(built, *built.reference(numerics.etap_e4m3_model), 2, rounded=exact.to(torch.bfloat16))


def test_e4m3_is_as_exact_as_the_same_values_in_bf16() -> None:
    built = build(Problem(lengths=(3000, 900), e4m3=True), "cpu")
    wide = [x.float().to(torch.bfloat16) for x in built.args[2:4]]
    exact = built.reference()[0]
    problem = (*built.args[:2], *wide, built.args[4], built.problem.lengths)
    of_bf16 = numerics.error(numerics.etap_model(*problem)[0], exact)[0]
    of_e4m3 = numerics.error(built.reference(numerics.etap_e4m3_model)[0], exact)[0]
    assert of_e4m3 < 1.02 * of_bf16, (of_e4m3, of_bf16)
