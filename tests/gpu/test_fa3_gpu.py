"""FlashAttention-3 with ETAP on a Hopper GPU, in both ways: the patched library, and the monkeypatch.

Needs FlashAttention-3 installed: `flash_attn_interface` and `flash_attn_3`. Where that is a library without the patch,
the tests of the patched library are skipped; in a patched one the switch is off wherever upstream is meant. Upstream's
own tests run from the pinned source, whose test files are looked for in ETAP_FA3_TESTS, or in the fetched tree.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from dispatch_fixtures import E4M3, SGL, SIGNATURES, VLLM, clean_modules, from_signature, stub, unscaled
from operator_run import NEEDS_HOPPER
from torch import Tensor

from etap_integration import dispatch, numerics

pytestmark = NEEDS_HOPPER

BF16, FP16, I32 = torch.bfloat16, torch.float16, torch.int32
FA3 = "flash_attn_interface"
ETAP_KERNEL, UPSTREAM_KERNEL = "mla_decode_kernel", "flash::"  # in the names of CUDA kernels
AUTO, ALWAYS, NEVER = range(3)


@pytest.fixture(scope="module")
def fa3() -> ModuleType:
    return pytest.importorskip(FA3, reason="not run: FlashAttention-3 is not installed", exc_type=ImportError)


@pytest.fixture(scope="module")
def extension(fa3: ModuleType) -> ctypes.CDLL | None:
    """The C interface of a patched library, None where it has none."""
    library = ctypes.CDLL(sys.modules["flash_attn_3._C"].__file__)
    if not hasattr(library, "etap_fa3_mode"):
        return None
    library.etap_fa3_reason.restype, library.etap_fa3_count.restype = ctypes.c_char_p, ctypes.c_uint64
    return library


class Way:
    """One of the ways. `etap()`, `upstream()`: who computes inside them; `taken()`: how many calls ETAP took."""

    def __init__(self, extension: ctypes.CDLL | None) -> None:
        self.extension = extension

    @contextlib.contextmanager
    def _mode(self, mode: int) -> Iterator[None]:
        if self.extension is None:
            yield
            return
        before = self.extension.etap_fa3_set_mode(mode)
        try:
            yield
        finally:
            self.extension.etap_fa3_set_mode(before)

    def upstream(self) -> contextlib.AbstractContextManager[None]:
        return self._mode(NEVER)

    def etap(self, strict: bool = False) -> contextlib.AbstractContextManager[None]:
        """strict: whatever ETAP can compute, be it slower, and nothing else."""
        raise NotImplementedError

    def taken(self) -> int:
        raise NotImplementedError


class Patched(Way):
    def etap(self, strict: bool = False) -> contextlib.AbstractContextManager[None]:
        return self._mode(ALWAYS if strict else AUTO)

    def taken(self) -> int:
        return self.extension.etap_fa3_count(0)


class Monkeypatched(Way):
    @contextlib.contextmanager
    def etap(self, strict: bool = False, target: str = FA3) -> Iterator[None]:
        with self._mode(NEVER), dispatch.patched(target, strict=strict, only_where_faster=not strict):
            yield

    def taken(self) -> int:
        return dispatch.status().etap_calls


@pytest.fixture(params=["patched", "monkeypatch"])
def way(request: pytest.FixtureRequest, extension: ctypes.CDLL | None) -> Way:
    if request.param == "monkeypatch":
        return Monkeypatched(extension)
    if extension is None:
        pytest.skip("not run: the installed FlashAttention-3 is not patched")
    return Patched(extension)


@pytest.fixture(autouse=True)
def prepared() -> None:
    torch.manual_seed(0)
    dispatch.reset_counts()


# ---------------------------------------------------------------------------------------------------------------------
# Calls, and what they should give
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A call of flash_attn_with_kvcache. page_size 0: not paged; q_lens: ragged queries; rows: of the cache, where
    cache_batch_idx picks them; fused: K and V are views of one 576-wide buffer; e4m3: the cache's dtype, with these
    descales, of all requests or of each; more: further keywords."""

    lengths: tuple[int, ...]
    heads: int = 16
    sq: int = 1
    q_lens: tuple[int, ...] | None = None
    page_size: int = 64
    rows: int | None = None
    fused: bool = True
    dtype: torch.dtype = BF16
    causal: bool = False
    e4m3: tuple[str, ...] | None = None
    more: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        kind = f"q_lens={self.q_lens}" if self.q_lens else f"sq={self.sq}"
        rest = [name for name, _ in self.more] + (["e4m3", *self.e4m3] if self.e4m3 is not None else [])
        return f"{max(self.lengths)}x{len(self.lengths)}-h{self.heads}-{kind}-page{self.page_size}" + "".join(
            f"-{name}" for name in rest
        )

    def build(self) -> tuple[dict[str, Any], Callable[[], tuple[Tensor, Tensor]]]:
        """The call's keywords, and a function that computes output and LSE in fp64."""
        batch, longest = len(self.lengths), max(self.lengths)
        draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=self.dtype)  # noqa: E731
        kept = lambda *shape: draw(*shape) if self.e4m3 is None else draw(*shape).to(E4M3)  # noqa: E731
        table = index = None
        if self.page_size:
            width = -(-longest // self.page_size) + 1
            pages = torch.randperm(batch * width, device="cuda", dtype=I32)
            table, cache = pages.view(batch, width), (batch * width, self.page_size, 1)
        else:
            cache = (self.rows or batch, longest + 3, 1)
            if self.rows:
                index = torch.randperm(self.rows, device="cuda", dtype=I32)[:batch]
        if self.fused:
            kv = kept(*cache, 576)
            v, k = kv[..., :512], kv[..., 512:]
        else:
            v, k = kept(*cache, 512), kept(*cache, 64)
        queries = (sum(self.q_lens), self.heads) if self.q_lens else (batch, self.sq, self.heads)
        arguments: dict[str, Any] = {
            "q": draw(*queries, 64), "qv": draw(*queries, 512), "k_cache": k, "v_cache": v, "page_table": table,
            "cache_seqlens": torch.tensor(self.lengths, dtype=I32, device="cuda"), "causal": self.causal,
            "softmax_scale": 192**-0.5, "return_softmax_lse": True, "cache_batch_idx": index,
        }  # fmt: skip
        if self.q_lens:
            ends = torch.tensor([0, *itertools.accumulate(self.q_lens)], dtype=I32, device="cuda")
            arguments |= {"cu_seqlens_q": ends, "max_seqlen_q": max(self.q_lens)}
        if self.e4m3 is not None:
            for name in self.e4m3:
                kind = name.removeprefix("one ")
                scale = 0.25 + 1.5 * torch.rand(1 if name != kind else batch, 1, device="cuda")
                arguments[kind] = scale.expand(batch, 1)
        arguments |= dict(self.more)

        def exact() -> tuple[Tensor, Tensor]:
            wide = [x.squeeze(2) if self.e4m3 is None else x.squeeze(2).double() for x in (v, k)]
            caches = [x if index is None else x[index.long()] for x in wide]
            ends = arguments.get("cu_seqlens_q")
            operands, factor = unscaled(
                (arguments["qv"], arguments["q"], *caches, table, self.lengths),
                {
                    "cu_seqlens_q": ends,
                    "ckv_scale": arguments.get("v_descale"),
                    "kpe_scale": arguments.get("k_descale"),
                },
            )
            out, lse = numerics.reference(
                *operands, cu_seqlens_q=ends, softmax_scale=arguments["softmax_scale"], causal=self.causal
            )
            return out * factor, lse

        return arguments, exact


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def lse_error(lse: Tensor, exact: Tensor) -> float:
    """Largest difference; infinities must be the same."""
    finite = exact.isfinite()
    assert torch.equal(lse[~finite].double(), exact[~finite])
    return (lse - exact)[finite].abs().max().item() if finite.any() else 0.0


def no_worse(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], exact: tuple[Tensor, Tensor]) -> None:
    """The error of output and LSE is at most upstream's. Tiny problems may round the same way or the other."""
    assert len(ours) == len(theirs)
    for mine, upstreams in zip(ours[:2], theirs[:2], strict=True):
        assert mine.shape == upstreams.shape and mine.dtype == upstreams.dtype
    assert ours[0].isfinite().all()
    assert rms(ours[0] - exact[0]) <= 1.01 * rms(theirs[0] - exact[0])
    assert lse_error(ours[1], exact[1]) <= lse_error(theirs[1], exact[1]) + 2e-6 * max(1.0, exact[1].abs().max().item())


LENGTHS = (1, 63, 64, 65, 700, 1000, 128, 2049)
MIXED = (5, 0, 1300, 64)  # with a request of a padded batch

CASES = [
    Case(LENGTHS),
    Case((1024,) * 16),
    Case((4096,) * 16),
    Case(LENGTHS, heads=8),
    Case(LENGTHS, heads=32),
    Case((300, 9), heads=64),
    Case(LENGTHS, heads=3),
    Case(LENGTHS, page_size=1),
    Case(LENGTHS, page_size=16),
    Case(LENGTHS, page_size=128),
    Case(LENGTHS, page_size=7, fused=False),
    Case(LENGTHS, page_size=0),
    Case(LENGTHS, page_size=0, rows=11),
    Case(LENGTHS, page_size=0, rows=5 + len(LENGTHS), fused=False, sq=2, causal=True),
    Case(LENGTHS, fused=False, sq=2, causal=True),
    Case(LENGTHS, heads=8, sq=4, causal=True),
    Case(LENGTHS, sq=2),
    Case(MIXED, q_lens=(1, 1, 1, 1), causal=True),
    Case(MIXED, q_lens=(2, 1, 2, 1), page_size=1, causal=True),
    Case((300, 40), q_lens=(0, 2), page_size=16),
    Case((20_000,), heads=16),
    Case(LENGTHS, more=(("num_splits", 1),)),
    Case(LENGTHS, more=(("num_splits", 3), ("pack_gqa", True))),
    Case(LENGTHS, more=(("sm_margin", 32),)),
    Case(LENGTHS, more=(("softmax_scale", 0.5),)),
    Case((640,) * 3, more=(("cache_seqlens", 640),)),
    Case(LENGTHS, dtype=FP16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_beside_upstream(case: Case, way: Way, fa3: ModuleType) -> None:
    arguments, exact = case.build()
    before = way.taken()
    with way.etap(strict=True):
        ours = fa3.flash_attn_with_kvcache(**arguments)
        again = fa3.flash_attn_with_kvcache(**arguments)  # by the short way, in the monkeypatch
    assert way.taken() == before + 2
    assert all(torch.equal(x, y) for x, y in zip(ours[:2], again[:2], strict=True))
    reference = exact()
    try:
        with way.upstream():
            theirs = fa3.flash_attn_with_kvcache(**arguments)
    except RuntimeError as failure:
        if case.dtype != FP16 or "FP16" not in str(failure).upper():
            raise
        # a build without upstream's float16 kernels: the output's own rounding is the measure
        assert rms(ours[0] - reference[0]) <= 1.1 * rms(reference[0].to(FP16) - reference[0])
        return
    no_worse(ours, theirs, reference)


BOTH = ("k_descale", "v_descale")
E4M3_CASES = [
    Case(LENGTHS, e4m3=BOTH),
    Case(LENGTHS, e4m3=("one k_descale", "one v_descale")),
    Case(LENGTHS, e4m3=("v_descale",)),
    Case(LENGTHS, e4m3=("k_descale",)),
    Case(LENGTHS, e4m3=()),
    Case(LENGTHS, e4m3=BOTH, dtype=FP16),
    Case(LENGTHS, e4m3=BOTH, heads=8),
    Case(LENGTHS, e4m3=BOTH, heads=32),
    Case((300, 9), e4m3=BOTH, heads=64),
    Case(LENGTHS, e4m3=BOTH, page_size=1),
    Case(LENGTHS, e4m3=BOTH, page_size=7, fused=False),
    Case(LENGTHS, e4m3=BOTH, page_size=0, rows=11),
    Case(LENGTHS, e4m3=BOTH, heads=8, sq=4, causal=True),
    Case(MIXED, e4m3=BOTH, q_lens=(2, 1, 2, 1), page_size=1, causal=True),
]
REFUSED = "query and key must have the same dtype"  # upstream's error


@pytest.mark.parametrize("case", E4M3_CASES, ids=str)
def test_e4m3_cache(case: Case, way: Way, fa3: ModuleType) -> None:
    """Upstream has no kernel for it: the output's own rounding is the measure. ETAP takes it however many rows."""
    arguments, exact = case.build()
    before = way.taken()
    with way.etap():
        ours = fa3.flash_attn_with_kvcache(**arguments)
    with way.etap(strict=True):
        again = fa3.flash_attn_with_kvcache(**arguments)
    assert way.taken() == before + 2
    assert all(torch.equal(x, y) for x, y in zip(ours[:2], again[:2], strict=True))
    out, lse = exact()
    assert ours[0].dtype == case.dtype and ours[0].isfinite().all()
    assert rms(ours[0] - out) <= 1.5 * rms(out.to(case.dtype) - out)
    assert lse_error(ours[1], lse) <= 1e-5 * (1 + lse[lse.isfinite()].abs().max().item())
    with way.upstream(), pytest.raises(RuntimeError, match=REFUSED):
        fa3.flash_attn_with_kvcache(**arguments)


@pytest.mark.parametrize(
    "more",
    [
        {"cache_leftpad": torch.tensor([3, 0], dtype=I32)},
        {"k_descale": torch.ones(2, 1, dtype=BF16)},
        {"q_descale": torch.ones(2, 1)},
        {"heads": 65},
    ],
    ids=lambda more: next(iter(more)),
)
def test_e4m3_that_etap_cannot_run_ends_in_upstreams_error(more: dict[str, Any], way: Way, fa3: ModuleType) -> None:
    """And in none of its kernels."""
    arguments, _ = Case((500, 70), e4m3=BOTH, heads=more.get("heads", 16)).build()
    arguments |= {name: x.cuda() for name, x in more.items() if isinstance(x, Tensor)}
    before = way.taken()
    with way.etap(), pytest.raises(RuntimeError, match=REFUSED):
        fa3.flash_attn_with_kvcache(**arguments)
    assert way.taken() == before
    torch.cuda.synchronize()


def test_metadata_of_upstream_is_accepted(way: Way, fa3: ModuleType) -> None:
    arguments, exact = Case(LENGTHS).build()
    arguments["scheduler_metadata"] = fa3.get_scheduler_metadata(
        len(LENGTHS), 1, 64 * arguments["page_table"].shape[1], 16, 1, 64, arguments["cache_seqlens"], BF16,
        headdim_v=512, page_size=64,
    )  # fmt: skip
    before = way.taken()
    with way.etap(strict=True):
        ours = fa3.flash_attn_with_kvcache(**arguments)
    assert way.taken() == before + 1
    with way.upstream():
        theirs = fa3.flash_attn_with_kvcache(**arguments)  # still good for upstream
    no_worse(ours, theirs, exact())


FALLS_BACK = [
    Case((500, 70), heads=65),
    Case((500,) * 5, heads=16, sq=3, causal=True),
    Case((500, 70), more=(("cache_leftpad", (3, 0)),)),
]


@pytest.mark.parametrize("case", FALLS_BACK, ids=str)
def test_the_rest_is_upstreams(case: Case, way: Way, fa3: ModuleType) -> None:
    """Bit for bit, and by upstream's kernels."""
    arguments, _ = case.build()
    if "cache_leftpad" in arguments:
        arguments["cache_leftpad"] = torch.tensor(arguments["cache_leftpad"], dtype=I32, device="cuda")
    before = way.taken()
    with way.etap():
        got = fa3.flash_attn_with_kvcache(**arguments)
        names = kernels(lambda: fa3.flash_attn_with_kvcache(**arguments))
    with way.upstream():
        expected = fa3.flash_attn_with_kvcache(**arguments)
    assert way.taken() == before
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert any(UPSTREAM_KERNEL in n for n in names) and not any(ETAP_KERNEL in n for n in names), names


def test_no_mla_call(way: Way, fa3: ModuleType) -> None:
    q = torch.randn(2, 1, 4, 64, device="cuda", dtype=BF16)
    k, v = (torch.randn(2, 300, 4, 64, device="cuda", dtype=BF16) for _ in range(2))
    lengths = torch.tensor([300, 17], dtype=I32, device="cuda")
    before = way.taken()
    with way.etap(strict=True):  # which is about MLA calls
        got = fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)
    assert way.taken() == before
    with way.upstream():
        assert torch.equal(got, fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths))


# ---------------------------------------------------------------------------------------------------------------------
# Which kernels ran
# ---------------------------------------------------------------------------------------------------------------------


def kernels(call: Callable[[], Any]) -> list[str]:
    """Names of the CUDA kernels that `call` launches, by the profiler."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("case", [CASES[0], Case((70, 900), page_size=1, heads=8, sq=2, causal=True)], ids=str)
def test_which_kernel_runs(case: Case, way: Way, fa3: ModuleType) -> None:
    arguments, _ = case.build()
    call = lambda: fa3.flash_attn_with_kvcache(**arguments)  # noqa: E731
    with way.etap(strict=True):
        ours = kernels(call)
    with way.upstream():
        theirs = kernels(call)
    assert [ETAP_KERNEL in name for name in ours] == [True], ours  # one launch, and nothing else
    assert any(UPSTREAM_KERNEL in name for name in theirs) and not any(ETAP_KERNEL in name for name in theirs), theirs


def test_the_switch(fa3: ModuleType, extension: ctypes.CDLL | None) -> None:
    if extension is None:
        pytest.skip("not run: the installed FlashAttention-3 is not patched")
    covered, _ = CASES[0].build()
    refused, _ = FALLS_BACK[0].build()
    before = extension.etap_fa3_set_mode(ALWAYS)
    try:
        fa3.flash_attn_with_kvcache(**covered)
        with pytest.raises(RuntimeError, match="rows: heads x max_seqlen_q above the limit"):
            fa3.flash_attn_with_kvcache(**refused)
        extension.etap_fa3_set_mode(NEVER)
        fa3.flash_attn_with_kvcache(**covered)
        assert extension.etap_fa3_reason(extension.etap_fa3_last_reason()) == b"switched off"
    finally:
        extension.etap_fa3_set_mode(before)


@pytest.mark.parametrize("e4m3", [None, BOTH], ids=["16-bit", "e4m3"])
@pytest.mark.parametrize("page_size", [1, 64])
def test_cuda_graph(page_size: int, e4m3: tuple[str, ...] | None, way: Way, fa3: ModuleType) -> None:
    """Captured once, replayed with other queries, lengths and descales."""
    arguments, _ = Case((900, 64, 700, 3), page_size=page_size, e4m3=e4m3).build()
    call = lambda: fa3.flash_attn_with_kvcache(**arguments)  # noqa: E731
    with way.etap(strict=True):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for lengths in ((900, 64, 700, 3), (1, 0, 899, 65)):
            arguments["cache_seqlens"].copy_(torch.tensor(lengths))
            arguments["qv"].normal_()
            for name in e4m3 or ():
                arguments[name].mul_(1.25)
            graph.replay()
            eager = call()
            assert torch.equal(captured[0], eager[0]) and torch.equal(captured[1], eager[1])


# ---------------------------------------------------------------------------------------------------------------------
# The engines' calls
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sglang(fa3: ModuleType) -> Iterator[Callable[..., Any]]:
    """sgl_kernel's function: its signature over FlashAttention-3's, through its module as SGLang calls it."""
    original = fa3.flash_attn_with_kvcache
    names = SIGNATURES[FA3, "flash_attn_with_kvcache"]
    taken = {part.split("=")[0].strip() for part in names.replace("(-1, -1)", "0").split(",")}

    def forward(arguments: dict[str, Any]) -> Any:
        assert arguments["sinks"] is None and arguments["ver"] == 3
        arguments["attention_chunk"] = arguments["attention_chunk"] or 0
        return original(**{name: value for name, value in arguments.items() if name in taken})

    with clean_modules():
        module = stub(SGL, flash_attn_with_kvcache=forwarding(SGL, "flash_attn_with_kvcache", forward))
        yield lambda **arguments: module.flash_attn_with_kvcache(**arguments)


@pytest.fixture
def vllm(fa3: ModuleType) -> Iterator[Callable[..., Any]]:
    """vLLM's function: its signature over the operator, as its interface calls it for version 3."""

    def forward(a: dict[str, Any]) -> Any:
        assert a["fa_version"] == 3 and a["cu_seqlens_k"] is None and a["alibi_slopes"] is None
        out, lse, *_ = torch.ops.flash_attn_3.fwd(
            a["q"], a["k"], a["v"], None, None, a["q_v"], a["out"], a["cu_seqlens_q"], None, None, None, a["seqused_k"],
            a["max_seqlen_q"], a["max_seqlen_k"], a["block_table"], None, None, None, None, None, a["q_descale"],
            a["k_descale"], a["v_descale"], a["softmax_scale"], a["causal"], -1, -1, 0, a["softcap"], True,
            a["scheduler_metadata"], a["num_splits"], None, 0,
        )  # fmt: skip
        return (out, lse) if a["return_softmax_lse"] else out

    with clean_modules():
        module = stub(VLLM, flash_attn_varlen_func=forwarding(VLLM, "flash_attn_varlen_func", forward))
        yield lambda **arguments: module.flash_attn_varlen_func(**arguments)


def forwarding(module: str, name: str, forward: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """A function with the engine's signature that hands its arguments to `forward`."""
    scope = from_signature(module, name, SIGNATURES[module, name]).__globals__
    scope["forward"] = forward
    exec(f"def {name}({SIGNATURES[module, name]}):\n    return forward(dict(locals()))\n", scope)
    return scope[name]


def engine(way: Way, target: str) -> contextlib.AbstractContextManager[None]:
    return way.etap(True, target) if isinstance(way, Monkeypatched) else way.etap(strict=True)


@pytest.mark.parametrize("q_len", [1, 2])
@pytest.mark.parametrize("page_size", [1, 64])
def test_sglang_shaped(page_size: int, q_len: int, way: Way, sglang: Callable[..., Any], fa3: ModuleType) -> None:
    """A token pool, views of 576-wide rows, ragged queries, cu_seqlens_k_new that goes with no new keys."""
    case = Case((700, 1, 333, 64), q_lens=(q_len, 1, q_len, q_len), page_size=page_size, causal=True)
    arguments, exact = case.build()
    ends = torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=I32, device="cuda")
    q = torch.cat([arguments["qv"], arguments["q"]], -1)  # one tensor in SGLang
    arguments |= {
        "q": q[..., 512:], "qv": q[..., :512], "cu_seqlens_k_new": ends, "softcap": 0.0, "k_descale": None,
        "v_descale": None, "num_splits": 0, "ver": 3,
        "scheduler_metadata": fa3.get_scheduler_metadata(
            len(case.lengths), q_len, page_size * arguments["page_table"].shape[1], 16, 1, 64,
            arguments["cache_seqlens"], BF16, headdim_v=512, cu_seqlens_q=arguments["cu_seqlens_q"],
            page_size=page_size, causal=True,
        ),
    }  # fmt: skip
    del arguments["cache_batch_idx"]
    before = way.taken()
    with engine(way, SGL):
        ours = sglang(**arguments)
    assert way.taken() == before + 1
    with way.upstream():
        theirs = sglang(**arguments)
    no_worse(ours, theirs, exact())


@pytest.mark.parametrize("page_size", [16, 64])
def test_vllm_shaped(page_size: int, way: Way, vllm: Callable[..., Any], fa3: ModuleType) -> None:
    """A batch padded for a CUDA graph, with requests of length 0; a given output."""
    case = Case((700, 1, 333, 0, 0), q_lens=(1, 1, 1, 1, 1), page_size=page_size, causal=True)
    made, exact = case.build()
    out = torch.empty_like(made["qv"])
    arguments = {
        "q": made["q"], "k": made["k_cache"], "v": made["v_cache"], "q_v": made["qv"], "out": out, "max_seqlen_q": 1,
        "cu_seqlens_q": made["cu_seqlens_q"], "max_seqlen_k": max(case.lengths), "seqused_k": made["cache_seqlens"],
        "block_table": made["page_table"], "softmax_scale": made["softmax_scale"], "causal": True, "fa_version": 3,
        "return_softmax_lse": True, "num_splits": 0, "cp_world_size": 1, "cp_rank": 0, "cp_tot_seqused_k": None,
        "scheduler_metadata": fa3.get_scheduler_metadata(
            len(case.lengths), 1, max(case.lengths), 16, 1, 64, made["cache_seqlens"], BF16, headdim_v=512,
            cu_seqlens_q=made["cu_seqlens_q"], page_size=page_size, causal=True,
        ),
    }  # fmt: skip
    before = way.taken()
    with engine(way, VLLM):
        ours = vllm(**arguments)
    assert way.taken() == before + 1 and ours[0].data_ptr() == out.data_ptr()
    ours = (ours[0].clone(), ours[1])
    with way.upstream():
        theirs = vllm(**arguments)
    no_worse(ours, theirs, exact())


# ---------------------------------------------------------------------------------------------------------------------
# Upstream's own tests
# ---------------------------------------------------------------------------------------------------------------------

PINNED = {
    "test_flash_attn.py": "ed2f53c3b8b7c24e513f5b3257d3b61aff0075806881b57791eaa9b274d7a9db",
    "test_util.py": "b8f874b60ba1a01fe9f282528d562b200119eb34a0f912938e0a50351c56ca30",
    "padding.py": "828925b355f3d901943ea9bd58c476586d884363dbb63755a4950f37a6695559",
}


def upstream_folder() -> Path:
    if given := os.environ.get("ETAP_FA3_TESTS"):
        return Path(given)
    from etap_integration.patching import fetching
    from etap_integration.patching.manifest import load_manifest

    return fetching.locate_tree(load_manifest("flash-attention-3").release()) / "hopper"


@pytest.fixture(scope="module")
def upstreams_test(fa3: ModuleType) -> Iterator[Callable[..., None]]:
    """test_flash_attn_kvcache of the pinned source, byte for byte."""
    pytest.importorskip("einops", reason="not run: upstream's tests need einops")
    try:
        folder = upstream_folder()
    except (ImportError, OSError, RuntimeError, ValueError) as reason:
        pytest.skip(f"not run: {reason}")
    for name, digest in PINNED.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, f"{name} is not the pinned one"
    # Upstream's switch for builds without windows, which its test would else draw attention chunks for.
    before = os.environ.get("FLASH_ATTENTION_DISABLE_LOCAL")
    os.environ["FLASH_ATTENTION_DISABLE_LOCAL"] = "TRUE"
    sys.path.append(str(folder))
    try:
        yield importlib.import_module("test_flash_attn").test_flash_attn_kvcache
    finally:
        sys.path.remove(str(folder))
        if before is None:
            del os.environ["FLASH_ATTENTION_DISABLE_LOCAL"]
        else:
            os.environ["FLASH_ATTENTION_DISABLE_LOCAL"] = before


CALLS_PER_HEAD_DIM = 9  # 3 numbers of splits, once without scheduler metadata and twice with


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("page_size", [None, 1, 4, 128])
@pytest.mark.parametrize("has_batch_idx", [False, True])
@pytest.mark.parametrize("varlen_q", [False, True])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 128), (1, 339), (3, 1024), (3, 799), (64, 256)])
def test_upstreams_kvcache_test(
    seqlen_q: int, seqlen_k: int, varlen_q: bool, has_batch_idx: bool, page_size: int | None, causal: bool,
    way: Way, upstreams_test: Callable[..., None],
) -> None:  # fmt: skip
    """Its MLA cases: head dimension 64 with V of 64, 256 and 512, one KV head, 6 heads, 5 requests. 512 is ETAP's."""
    if page_size is not None and seqlen_k % page_size:
        pytest.skip("upstream skips it")
    before = way.taken()
    with way.etap():
        upstreams_test(
            seqlen_q=seqlen_q, seqlen_k=seqlen_k, d=64, varlen_q=varlen_q, has_batch_idx=has_batch_idx,
            has_leftpad=False, page_size=page_size, rotary_fraction=0.0, rotary_interleaved=False,
            has_rotary_seqlens=False, seqlen_new_eq_seqlen_q=True, causal=causal, local=False, new_kv=False,
            mha_type="mqa", dtype=BF16,
        )  # fmt: skip
    covered = 6 * seqlen_q <= 32 and not (has_batch_idx and page_size is not None)
    assert way.taken() - before == (CALLS_PER_HEAD_DIM if covered else 0)


def test_cases_are_told_apart() -> None:
    """A check of this file's own judge: a wrong output is not accepted."""
    _, exact = replace(CASES[0], lengths=(70, 80)).build()
    out, lse = (x.to(torch.float32) for x in exact())
    good = (out.to(BF16), lse, None, None)
    no_worse(good, good, (out.double(), lse.double()))
    bad = (good[0] + 1e-2, lse, None, None)
    with pytest.raises(AssertionError):
        no_worse(bad, good, (out.double(), lse.double()))
