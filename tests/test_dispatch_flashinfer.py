"""enable() and FlashInfer's wrapper: a stand-in class on the CPU, the fp64 reference in the place of the kernel."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from dispatch_fixtures import BF16, E4M3, I32, Recorder, clean_modules, hopper, stub

import etap_integration
from etap_integration import numerics
from etap_integration.dispatch import FallbackError, TargetError, disable, enable, patched, reset_counts, status
from etap_integration.dispatch.wrappers import CUDA_GRAPH, NOT_FA3
from etap_integration.flashinfer import jit, switch

NAME = "flashinfer.mla"
LN2 = math.log(2.0)


class BatchMLAPagedAttentionWrapper:
    """As much of FlashInfer's class as is looked at; `run` answers "upstream" and remembers what it was given."""

    def __init__(self, backend: str = "fa3", use_cuda_graph: bool = False) -> None:
        self._backend, self._use_cuda_graph = backend, use_cuda_graph
        self._cached_module: Any = object()
        self.seen: list[dict[str, Any]] = []

    def plan(self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, page_size=4, causal=False, sm_scale=0.05) -> None:
        """Upstream's plan."""
        self._qo_indptr_buf, self._kv_indptr_buf = qo_indptr, kv_indptr
        self._kv_indices_buf, self._kv_len_arr_buf = kv_indices, kv_len_arr
        self._page_size, self._causal, self._sm_scale, self._plan_info = page_size, causal, sm_scale, [1]

    def run(
        self, q_nope=None, q_pe=None, ckv_cache=None, kpe_cache=None, out=None, lse=None, return_lse=False,
        profiler_buffer=None, kv_len=None, page_table=None, return_lse_base_on_e=False, o_scale=None, *, query=None,
        kv_cache=None, ckv_scale=None, ckv_scale_arr=None, kpe_scale=None,
    ):  # fmt: skip
        """Upstream's run."""
        self.seen.append({name: value for name, value in locals().items() if name != "self" and value is not None})
        return "upstream"


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ETAP_STRICT", raising=False)
    monkeypatch.setattr(switch, "_wanted", {})
    monkeypatch.setattr(jit, "_specs", {})
    monkeypatch.setattr(jit, "_loaded", {})
    reset_counts()
    with clean_modules():
        yield
        disable()


@pytest.fixture
def module() -> ModuleType:
    # A fresh class each time: methods are replaced on it.
    kind = type("BatchMLAPagedAttentionWrapper", (), dict(vars(BatchMLAPagedAttentionWrapper)))
    return stub(NAME, BatchMLAPagedAttentionWrapper=kind)


@pytest.fixture
def options() -> dict[str, Any]:
    return {"operator": Recorder(compute=True), "machine": hopper}


class Step:
    """A decode step of three requests: 9, 0 and 5 keys in pages of 4, 2, 1 and 2 query tokens."""

    lengths, tokens, page_size = (9, 0, 5), (2, 1, 2), 4

    def __init__(self, heads: int = 8, causal: bool = True) -> None:
        torch.manual_seed(0)
        self.causal = causal
        self.qo_indptr = torch.tensor([0, 2, 3, 5], dtype=I32)
        self.kv_indptr = torch.tensor([0, 3, 3, 5], dtype=I32)
        self.kv_indices = torch.tensor([6, 1, 4, 0, 3], dtype=I32)
        self.kv_len = torch.tensor(self.lengths, dtype=I32)
        self.q, self.cache = torch.randn(5, heads, 576).to(BF16), torch.randn(8, 4, 576).to(BF16)

    def plan(self, wrapper: Any) -> Any:
        wrapper.plan(self.qo_indptr, self.kv_indptr, self.kv_indices, self.kv_len, self.page_size, self.causal, 0.05)
        return wrapper

    def split(self) -> tuple[torch.Tensor, ...]:
        return self.q[..., :512], self.q[..., 512:], self.cache[..., :512], self.cache[..., 512:]

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and natural LSE (tokens, heads) in fp64, from the rectangular table written out by hand."""
        table = torch.tensor([[6, 1, 4], [0, 0, 0], [0, 3, 0]], dtype=I32)
        out, lse = numerics.reference(
            *self.split(), table, self.lengths, cu_seqlens_q=[0, 2, 3, 5], softmax_scale=0.05, causal=self.causal
        )
        return out, lse.t()


def test_routed(module: ModuleType, options: dict[str, Any]) -> None:
    """Arguments by position or by name, split or packed; the page list becomes a table."""
    step = Step()
    enable(NAME, **options)
    wrapper = step.plan(module.BatchMLAPagedAttentionWrapper())
    out, _ = step.exact()
    calls = (
        wrapper.run(*step.split()),
        wrapper.run(**dict(zip(("q_nope", "q_pe", "ckv_cache", "kpe_cache"), step.split(), strict=True))),
        wrapper.run(query=step.q, kv_cache=step.cache),
        wrapper.run(query=step.split()[:2], kv_cache=list(step.split()[2:])),
    )
    for result in calls:
        assert torch.equal(result, out.to(BF16))
    assert status().etap_calls == 4 and not wrapper.seen and not status().fallbacks
    assert options["operator"].calls[0][1]["max_seqlen_q"] == 2


def test_lse_in_upstreams_form(module: ModuleType, options: dict[str, Any]) -> None:
    """(tokens, heads), base 2 unless base e is asked for, written to the caller's tensor where there is one."""
    step = Step()
    enable(NAME, **options)
    wrapper = step.plan(module.BatchMLAPagedAttentionWrapper())
    exact = step.exact()[1].float()
    _, lse = wrapper.run(*step.split(), return_lse=True)
    assert lse.is_contiguous() and torch.allclose(lse * LN2, exact, atol=1e-5)
    assert torch.equal(lse == -math.inf, exact == -math.inf) and (lse[2] == -math.inf).all()
    out, given = torch.empty(5, 8, 512, dtype=BF16), torch.empty(5, 8)
    result = wrapper.run(*step.split(), out=out, lse=given, return_lse=True, return_lse_base_on_e=True)
    assert result[0] is out and result[1] is given
    assert torch.allclose(given, exact, atol=1e-5) and torch.equal(out, step.exact()[0].to(BF16))


def test_new_plans_are_followed(module: ModuleType, options: dict[str, Any]) -> None:
    """Also plans made while nothing was patched; later changes of the caller's tensors are not seen, as upstream's."""
    step = Step()
    wrapper = step.plan(module.BatchMLAPagedAttentionWrapper())
    enable(NAME, **options)
    assert torch.equal(wrapper.run(*step.split()), step.exact()[0].to(BF16))  # planned before
    step.kv_len.fill_(1)
    assert torch.equal(wrapper.run(*step.split()), Step().exact()[0].to(BF16))
    disable()
    step.lengths = (3, 0, 2)
    step.kv_len = torch.tensor(step.lengths, dtype=I32)
    step.plan(wrapper)
    enable(NAME, **options)
    assert torch.equal(wrapper.run(*step.split()), step.exact()[0].to(BF16))


def test_put_back(module: ModuleType, options: dict[str, Any]) -> None:
    kind = module.BatchMLAPagedAttentionWrapper
    before = dict(vars(kind))
    wrapper = Step().plan(kind())
    found = enable(NAME, **options).targets[NAME]
    assert found.patched and set(found.bindings) == {
        "BatchMLAPagedAttentionWrapper.run",
        "BatchMLAPagedAttentionWrapper.plan",
    }
    assert kind.run is not before["run"] and kind.run.__doc__ == "Upstream's run."
    bound = wrapper.run
    assert disable() == ()
    assert dict(vars(kind)) == before
    assert bound(*Step().split()) == "upstream"  # a stand-in that outlives disable()


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("FlashInfer: o_scale", {"o_scale": 1.0}),
        ("FlashInfer: profiler_buffer", {"profiler_buffer": torch.zeros(1)}),
        ("FlashInfer: ckv_scale or kpe_scale of a 16-bit cache", {"ckv_scale": 1.0}),
        ("FlashInfer: ckv_scale or kpe_scale of a 16-bit cache", {"kpe_scale": torch.ones(1)}),
        ("FlashInfer: page_table", {"page_table": torch.zeros(1, 1)}),
        ("FlashInfer: an LSE argument without return_lse", {"lse": torch.zeros(5, 8)}),
        ("FlashInfer: lse is not", {"lse": torch.zeros(5, 9), "return_lse": True}),
        ("FlashInfer: query or cache is neither", {"query": torch.zeros(5, 8, 576, dtype=BF16)}),
        ("the head dimensions are not", {"q_pe": torch.zeros(5, 8, 32, dtype=BF16)}),
        ("a dtype is neither", {"q_nope": torch.zeros(5, 8, 512)}),
        ("FlashInfer: the caches are not", {"ckv_cache": torch.zeros(8, 2, 512, dtype=BF16)}),
        ("out is not a tensor of", {"out": torch.zeros(5, 8, 512)}),
    ],
)
def test_left_to_upstream(module: ModuleType, options: dict[str, Any], caplog, reason: str, changes: dict) -> None:
    """Counted, logged once, and passed on as it came; an error in strict mode."""
    step = Step()
    wrapper = step.plan(module.BatchMLAPagedAttentionWrapper())
    call = dict(zip(("q_nope", "q_pe", "ckv_cache", "kpe_cache"), step.split(), strict=True)) | changes
    with patched(NAME, **options), caplog.at_level(logging.INFO, "etap_integration.dispatch"):
        assert wrapper.run(**call) == "upstream" and wrapper.run(**call) == "upstream"
        (found,) = status().fallbacks
        assert found.startswith(reason) and status().fallbacks[found] == 2
    assert sum(found in line for line in caplog.messages) == 1
    assert all(wrapper.seen[0][name] is value for name, value in call.items())
    with patched(NAME, strict=True, **options), pytest.raises(FallbackError, match=re.escape(found)):
        wrapper.run(**call)
    assert not options["operator"].calls


def e4m3_cache(step: Step) -> dict[str, Any]:
    query = dict(zip(("q_nope", "q_pe"), step.split()[:2], strict=True))
    cache = step.cache.to(E4M3)
    return query | {"ckv_cache": cache[..., :512], "kpe_cache": cache[..., 512:], "ckv_scale": 0.5, "kpe_scale": 3}


def test_an_e4m3_cache(module: ModuleType, options: dict[str, Any]) -> None:
    """Its scales, numbers, go to the operator; no measured rule is about it."""
    step = Step(heads=32)
    wrapper = step.plan(module.BatchMLAPagedAttentionWrapper())
    wrapper._kv_data_type = E4M3  # as later releases keep it
    call = e4m3_cache(step)
    with patched(NAME, strict=True, **options):
        out, lse = wrapper.run(**call, return_lse=True, return_lse_base_on_e=True)
    ((args, passed),) = options["operator"].calls
    assert (passed["ckv_scale"], passed["kpe_scale"]) == (0.5, 3)
    assert args[2].dtype == E4M3 and args[2].data_ptr() == call["ckv_cache"].data_ptr()
    step.cache = torch.cat([call["ckv_cache"].double() * 0.5, call["kpe_cache"].double() * 3], -1)
    exact, exact_lse = step.exact()
    torch.testing.assert_close(out, exact.to(BF16))
    torch.testing.assert_close(lse, exact_lse.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("FlashInfer: an e4m3 cache without both", {"kpe_scale": None}),
        ("FlashInfer: an e4m3 cache without both", {"ckv_scale": None}),
        ("FlashInfer: an e4m3 cache without both", {"ckv_scale": torch.ones(())}),
        ("FlashInfer: ckv_scale_arr", {"ckv_scale": None, "ckv_scale_arr": torch.ones(8, 4, 4)}),
        ("a descale factor is neither", {"kpe_scale": -1.0}),
        ("8-bit queries", {"kpe_cache": torch.zeros(8, 4, 64, dtype=BF16)}),
        ("FlashInfer: another cache dtype than the planned one", {"planned": BF16}),
    ],
)
def test_other_e4m3_calls_are_upstreams(
    module: ModuleType, options: dict[str, Any], reason: str, changes: dict[str, Any]
) -> None:
    step = Step()
    wrapper = step.plan(module.BatchMLAPagedAttentionWrapper())
    changes = dict(changes)
    wrapper._kv_data_type = changes.pop("planned", E4M3)
    call = e4m3_cache(step) | changes
    with patched(NAME, **options):
        assert wrapper.run(**call) == "upstream"
    (found,) = status().fallbacks
    assert found.startswith(reason) and not options["operator"].calls
    assert all(wrapper.seen[0][name] is value for name, value in call.items() if value is not None)


def test_rows_backends_and_graph_wrappers(module: ModuleType, options: dict[str, Any]) -> None:
    kind = module.BatchMLAPagedAttentionWrapper
    step = Step()
    with patched(NAME, max_rows=15, **options):
        assert step.plan(kind()).run(*step.split()) == "upstream"
        assert list(status().fallbacks) == ["too many query rows"]
    with patched(NAME, strict=True, **options):
        reset_counts()
        assert (
            step.plan(kind("fa2")).run(*step.split()) == "upstream"
        )  # another kernel was chosen: not an MLA fall-back
        assert status().fallbacks == {NOT_FA3: 1}
    with patched(NAME, **options):
        reset_counts()
        wrapper = step.plan(kind(use_cuda_graph=True))
        assert not hasattr(wrapper, "_etap_plan") and wrapper.run(*step.split()) == "upstream"
        assert status().fallbacks == {CUDA_GRAPH: 1}


def test_planned_contract_is_kept(module: ModuleType, options: dict[str, Any]) -> None:
    """Releases that plan LSE and layouts judge calls that break the plan themselves; flat plans leave it open."""
    step = Step()
    wrapper = step.plan(module.BatchMLAPagedAttentionWrapper())
    wrapper._input_contract = SimpleNamespace(lse_mode="base2", query_layout="packed", kv_cache_layout="split")
    with patched(NAME, **options):
        good = {"query": step.q, "kv_cache": step.split()[2:], "return_lse": True}
        assert wrapper.run(**good)[0].shape == (5, 8, 512)
        assert wrapper.run(**good, return_lse_base_on_e=True) == "upstream"
        assert wrapper.run(**{**good, "return_lse": False}) == "upstream"
        assert wrapper.run(**{**good, "query": step.split()[:2]}) == "upstream"
        wrapper._legacy_flat_csr_plan = True
        assert wrapper.run(*step.split()).shape == (5, 8, 512)


def test_patched_module_is_left_alone(module: ModuleType, options: dict[str, Any], monkeypatch) -> None:
    """It decides and counts itself; its switch follows enable() and disable()."""
    step = Step()
    set_to: list[tuple[str, Any]] = []
    monkeypatch.setattr(switch, "set_mode", lambda mode: set_to.append(("mode", mode)))
    monkeypatch.setattr(switch, "lower_max_rows", lambda rows: set_to.append(("rows", rows)))
    wrapper = step.plan(module.BatchMLAPagedAttentionWrapper())
    jit._loaded["demo"] = wrapper._cached_module
    enable(NAME, **options, max_rows=24)
    step.plan(wrapper)
    assert wrapper.run(*step.split()) == "upstream" and not status().fallbacks and status().etap_calls == 0
    wrapper._planned_backend = SimpleNamespace(_cached_module=object())  # later releases: not the patched one
    assert wrapper.run(*step.split()).shape == (5, 8, 512)
    with patched(NAME, **options, strict=True, max_rows=64):  # more rows only by switch.set_max_rows
        pass
    disable()
    assert set_to == [
        ("rows", 24),
        ("mode", "auto"),
        ("rows", 64),
        ("mode", "always"),
        ("rows", 24),
        ("mode", "auto"),
        ("mode", "never"),
    ]


def test_unknown_wrapper_is_refused(options: dict[str, Any]) -> None:
    stub(NAME)
    with pytest.raises(TargetError, match=r"no BatchMLAPagedAttentionWrapper\.run"):
        enable(NAME, **options)
    stub(NAME, BatchMLAPagedAttentionWrapper=type("W", (), {"run": lambda self, x: x, "plan": lambda self: None}))
    with pytest.raises(TargetError, match="has no parameter 'lse', 'out'"):
        enable(NAME, **options)
    assert not status().targets[NAME].patched


@pytest.mark.parametrize("serve", ["upstream", "etap"])
def test_shadow_mode(module: ModuleType, options: dict[str, Any], serve: str) -> None:
    """Both run; the caller's buffers are written by the one that serves, and by nobody else."""
    step = Step()
    kind = module.BatchMLAPagedAttentionWrapper
    upstream_out, upstream_lse = (x.clone() for x in step.exact())
    upstream_out = (upstream_out + 0.25).to(BF16)

    def run(self, q_nope=None, q_pe=None, ckv_cache=None, kpe_cache=None, out=None, lse=None, return_lse=False,
            return_lse_base_on_e=False):  # fmt: skip
        """Upstream's run, computing, with a known error."""
        result = upstream_out.clone() if out is None else out.copy_(upstream_out)
        base_2 = (upstream_lse / LN2).float()
        return (result, base_2 if lse is None else lse.copy_(base_2)) if return_lse else result

    kind.run = run
    out, lse = torch.zeros(5, 8, 512, dtype=BF16), torch.zeros(5, 8)
    with etap_integration.shadow(NAME, fraction=1.0, serve=serve, **options) as session:
        wrapper = step.plan(kind())
        for _ in range(2):  # either one first
            out.zero_(), lse.zero_()
            result = wrapper.run(*step.split(), out=out, lse=lse, return_lse=True)
            assert result[0] is out and result[1] is lse
            assert torch.equal(out, upstream_out) == (serve == "upstream")
        found = session.summary()
    assert (found.compared, found.failed) == (2, {}) and found.max_error == pytest.approx(0.25, rel=0.05)
    assert session.records[0].lse_max_error is not None and session.records[0].lse_max_error < 1e-3
    assert status().etap_calls == (2 if serve == "etap" else 0)
