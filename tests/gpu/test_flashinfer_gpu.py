"""FlashInfer's wrapper on a Hopper GPU: patched beside unpatched beside fp64, and the routed, unpatched wrapper.

Needs an installed FlashInfer of a supported release. The first run compiles two modules a dtype (minutes); they stay in
FlashInfer's cache.
"""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from operator_run import NEEDS_HOPPER
from problems import Built, Problem, build, cumulative, gpu_p_parts, judge

import etap_integration
from etap_integration.flashinfer import activation, switch

pytestmark = [
    *NEEDS_HOPPER,
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs FlashInfer"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
MAX_ROWS = 64
LN2 = math.log(2.0)


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """64 rows allowed, the switch at auto."""
    switch.set_mode("auto")
    switch.set_max_rows(MAX_ROWS)
    yield
    activation.deactivate()


class Case:
    """A problem of tests/problems.py in FlashInfer's form: ragged queries, a page list per request."""

    def __init__(self, problem: Problem) -> None:
        p = self.problem = problem
        self.built: Built = build(p, "cuda")
        q_nope, q_rope, self.ckv, self.kpe, table, self.kv_len = self.built.args
        ragged = p.q_lens is not None
        self.q_nope, self.q_pe = (q_nope, q_rope) if ragged else (q_nope.flatten(0, 1), q_rope.flatten(0, 1))
        used = [-(-n // p.page_size) for n in p.lengths]
        self.kv_indptr = torch.tensor(cumulative(tuple(used)), dtype=torch.int32)
        rows = [table[i, :n] for i, n in enumerate(used)]
        self.kv_indices = torch.cat(rows) if sum(used) else torch.zeros(1, dtype=torch.int32, device="cuda")
        self.qo_indptr = torch.tensor(cumulative(p.query_lengths), dtype=torch.int32)
        self.scale = p.softmax_scale or 576**-0.5

    def plan(self, wrapper: Any, **changed: Any) -> None:
        p = self.problem
        arguments = {
            "qo_indptr": self.qo_indptr, "kv_indptr": self.kv_indptr, "kv_indices": self.kv_indices,
            "kv_len_arr": self.kv_len.cpu(), "num_heads": p.heads, "head_dim_ckv": 512, "head_dim_kpe": 64,
            "page_size": p.page_size, "causal": p.causal, "sm_scale": self.scale, "q_data_type": p.dtype,
            "kv_data_type": self.ckv.dtype,
        }  # fmt: skip
        wrapper.plan(**{**arguments, **changed})

    def run(self, wrapper: Any, base_e: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and LSE (natural) in the shape of the problem's reference; the output buffer holds NaN before."""
        out = torch.full_like(self.q_nope, math.nan)
        lse = torch.full(self.q_nope.shape[:2], math.nan, dtype=torch.float32, device="cuda")
        scales = dict(zip(("ckv_scale", "kpe_scale"), self.problem.scales, strict=True)) if self.problem.e4m3 else {}
        lse_options = {"lse": lse, "return_lse": True, "return_lse_base_on_e": base_e}
        result = wrapper.run(self.q_nope, self.q_pe, self.ckv, self.kpe, out=out, **lse_options, **scales)
        assert result[0] is out and result[1].shape == lse.shape
        return self.shaped(out, lse if base_e else lse * LN2)

    def shaped(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        p = self.problem
        if p.q_lens is not None:
            return out, lse.t()
        shape = (len(p.lengths), p.sq)
        return out.unflatten(0, shape), lse.unflatten(0, shape).transpose(1, 2)


def new_wrapper(**options: Any) -> Any:
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    return BatchMLAPagedAttentionWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device="cuda"), backend="fa3", **options
    )


def taken() -> int:
    return sum(module.taken for module in switch.status().values())


def patched_wrapper(case: Case) -> Any:
    activation.activate()
    wrapper = new_wrapper()
    case.plan(wrapper)
    return wrapper


def unpatched_wrapper(case: Case) -> Any:
    activation.deactivate()
    wrapper = new_wrapper()
    case.plan(wrapper)
    return wrapper


PROBLEMS = [
    *(Problem(lengths=(0, 1, 65, 300, 1025), page_size=page, heads=16, seed=page)
      for page in (1, 2, 16, 24, 64, 100, 128)),
    *(Problem(lengths=(700, 64, 0, 3), heads=heads, sq=sq, causal=True, page_size=16)
      for heads, sq in ((8, 1), (8, 4), (16, 2), (5, 3), (32, 1), (32, 2), (16, 4), (64, 1))),
    *(Problem(lengths=(900, 65, 4000, 17), heads=16, sq=2, dtype=torch.float16, page_size=page) for page in (1, 64)),
    *(Problem(lengths=(900, 65, 0, 3), q_lens=(0, 3, 1, 2), sq=4, heads=16, causal=causal, page_size=8)
      for causal in (False, True)),
    Problem(lengths=(4096,) * 4, heads=16),
    Problem(lengths=(1024,) * 16, heads=16, cache_layout="separate"),
    Problem(lengths=(40000,), heads=16, page_size=1),
    Problem(lengths=(333, 5), heads=16, query_layout="views", cache_layout="odd", page_size=32),
    Problem(lengths=tuple(i * 7 % 203 for i in range(400)), heads=16, page_size=4),
]  # fmt: skip
PROBLEMS_E4M3 = [
    Problem(lengths=(0, 1, 65, 300, 1025), e4m3=True, page_size=page, scales=(0.375, 1.875), seed=page)
    for page in (1, 16, 64)
]
PROBLEMS_E4M3 += [
    Problem(lengths=(700, 64, 0, 3), e4m3=True, heads=heads, sq=sq, causal=True, page_size=16)
    for heads, sq in ((8, 1), (16, 2), (32, 1), (16, 4), (64, 1))
]


def run_64_rows_of_e4m3() -> None:
    case = Case(Problem(lengths=(700, 64), e4m3=True, heads=64, page_size=16))
    judge(case.built, *case.run(patched_wrapper(case)), gpu_p_parts(case.problem))
    assert taken() == 1


def test_rows_that_an_e4m3_module_takes_by_default() -> None:
    """64, in a process that sets no limit: upstream's kernel takes several times as long."""
    script = f"import sys; sys.path[:0] = {sys.path!r}; import {__name__} as tests; tests.run_64_rows_of_e4m3()"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("problem", PROBLEMS + PROBLEMS_E4M3, ids=str)
def test_patched_wrapper(problem: Problem) -> None:
    """Right against fp64 with NaN in every slot that is nobody's; the same bits twice; ETAP's kernel ran."""
    case = Case(problem)
    wrapper = patched_wrapper(case)
    before = taken()
    out, lse = case.run(wrapper)
    assert taken() == before + 1
    judge(case.built, out, lse, gpu_p_parts(problem))
    again, other = case.run(wrapper, base_e=False)
    assert torch.equal(out, again)
    finite = lse.isfinite()
    assert torch.equal(lse == -math.inf, other == -math.inf)
    assert torch.allclose(lse[finite], other[finite], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("problem", [p for p in PROBLEMS + PROBLEMS_E4M3 if p.cache_layout != "odd"], ids=str)
def test_error_is_not_upstreams(problem: Problem) -> None:
    """The patched wrapper is at least as close to fp64 as the unpatched one, which runs no patched module."""
    case = Case(problem.with_(poison=0.0))
    exact, _ = case.built.reference()
    before = taken()
    upstream, _ = case.run(unpatched_wrapper(case))
    assert taken() == before
    ours, _ = case.run(patched_wrapper(case))
    assert taken() == before + 1
    rmse = [(x.double() - exact).pow(2).mean().sqrt().item() for x in (ours, upstream)]
    assert rmse[0] <= rmse[1] * (1 + 1e-3) + 1e-12, rmse


def test_cuda_graph_and_new_plans() -> None:
    """A captured graph follows later plans of the same batch size, longer queries among them."""
    activation.activate()
    first = Case(Problem(lengths=(100, 0, 700), q_lens=(1, 1, 2), sq=2, causal=True, page_size=16, seed=1))
    later = [
        Case(Problem(lengths=(3, 2000, 64), q_lens=(2, 1, 1), sq=2, causal=True, page_size=16, seed=2)),
        Case(Problem(lengths=(0, 0, 5), q_lens=(1, 2, 1), sq=2, causal=True, page_size=16, seed=3)),
        Case(Problem(lengths=(900, 80, 70), q_lens=(0, 0, 4), sq=4, causal=True, page_size=16, seed=4)),
    ]
    ints = lambda n: torch.zeros(n, dtype=torch.int32, device="cuda")  # noqa: E731
    wrapper = new_wrapper(
        use_cuda_graph=True, qo_indptr=ints(4), kv_indptr=ints(4), kv_indices=ints(4096), kv_len_arr=ints(3)
    )
    case = first
    ckv, kpe = (torch.zeros(512, 16, n, dtype=torch.bfloat16, device="cuda") for n in (512, 64))
    q_nope, q_pe = torch.empty_like(case.q_nope), torch.empty_like(case.q_pe)
    out = torch.empty_like(q_nope)
    lse = torch.empty(q_nope.shape[:2], dtype=torch.float32, device="cuda")

    def load(case: Case) -> None:
        for target, source in ((q_nope, case.q_nope), (q_pe, case.q_pe)):
            target.copy_(source)
        ckv[: len(case.ckv)].copy_(case.ckv)
        kpe[: len(case.kpe)].copy_(case.kpe)
        case.plan(wrapper)

    def call() -> None:
        wrapper.run(q_nope, q_pe, ckv, kpe, out=out, lse=lse, return_lse=True, return_lse_base_on_e=True)

    load(first)
    call()
    torch.cuda.synchronize()
    before, graph = taken(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    assert taken() == before + 1
    for case in (first, *later, first):
        load(case)
        out.fill_(math.nan), lse.fill_(math.nan)
        graph.replay()
        judge(case.built, *case.shaped(out, lse), gpu_p_parts(case.problem))
    assert taken() == before + 1


def test_more_rows_are_upstreams() -> None:
    case = Case(Problem(lengths=(300, 40), heads=128, poison=0.0))
    wrapper = patched_wrapper(case)
    switch.reset_counts()
    out, _ = case.run(wrapper)
    (calls,) = [module.calls for module in switch.status().values() if module.calls]
    assert list(calls) == ["rows: num_heads x the longest query above the limit"]
    exact, _ = case.built.reference()
    assert (out.double() - exact).abs().max() < 2e-2
    switch.set_mode("always")
    with pytest.raises(Exception, match=r"ETAP_FLASHINFER=always.*rows"):
        case.run(wrapper)


def test_switch() -> None:
    case = Case(Problem(lengths=(300, 40), poison=0.0))
    wrapper = patched_wrapper(case)
    case.run(wrapper)
    before = taken()
    switch.set_mode("never")
    case.run(wrapper)
    assert taken() == before


@pytest.mark.parametrize("problem", PROBLEMS[::3] + PROBLEMS_E4M3, ids=str)
def test_routed_unpatched_wrapper(problem: Problem) -> None:
    """enable() without patches: `run` goes to the operator, the result as FlashInfer returns it."""
    case = Case(problem)
    before = taken()
    with etap_integration.patched("flashinfer.mla", max_rows=MAX_ROWS, only_where_faster=False, strict=True):
        etap_integration.dispatch.reset_counts()
        wrapper = unpatched_wrapper(case)
        out, lse = case.run(wrapper)
        other = case.run(wrapper, base_e=False)
        assert etap_integration.status().etap_calls == 2
    judge(case.built, out, lse, gpu_p_parts(problem))
    assert torch.equal(out, other[0])
    assert taken() == before


def test_routed_graph_wrapper_is_upstreams() -> None:
    case = Case(Problem(lengths=(300, 40), poison=0.0))
    ints = lambda n: torch.zeros(n, dtype=torch.int32, device="cuda")  # noqa: E731
    with etap_integration.patched("flashinfer.mla"), warnings.catch_warnings():
        etap_integration.dispatch.reset_counts()
        activation.deactivate()
        wrapper = new_wrapper(
            use_cuda_graph=True, qo_indptr=ints(3), kv_indptr=ints(3), kv_indices=ints(64), kv_len_arr=ints(2)
        )
        case.plan(wrapper)
        out, _ = case.run(wrapper)
        assert any("CUDA graph" in reason for reason in etap_integration.status().fallbacks)
    exact, _ = case.built.reference()
    assert (out.double() - exact).abs().max() < 2e-2
