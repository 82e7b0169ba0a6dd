"""The calls that SGLang and vLLM make, through the patched stubs, down to the operator and back."""

from __future__ import annotations

import ast
import inspect
import tarfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dispatch_fixtures import (
    E4M3,
    FA3,
    I32,
    SGL,
    SIGNATURES,
    VLLM,
    Recorder,
    clean_modules,
    e4m3,
    engine,
    from_signature,
    hopper,
    kvcache_call,
    sglang_call,
    stub,
    vllm_call,
)
from engine_fixtures import REFUSAL, refusing_engine

from etap_integration import numerics
from etap_integration.dispatch import FallbackError, patched, reset_counts, status
from etap_integration.patching import fetching
from etap_integration.patching.manifest import load_manifest


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ETAP_STRICT", raising=False)
    torch.manual_seed(0)
    reset_counts()
    with clean_modules():
        yield


def test_sglang() -> None:
    """Ragged, page size 1, strided views: all of it arrives, and nothing is copied."""
    sgl, operator, arguments = engine(SGL), Recorder(), sglang_call()
    backend = stub("sglang.backend", flash_attn_with_kvcache=sgl.flash_attn_with_kvcache)  # from ... import ...
    with patched(SGL, operator=operator, machine=hopper, strict=True):
        assert backend.flash_attn_with_kvcache(**arguments) == "out"
    ((args, options),) = operator.calls
    assert args[0] is arguments["qv"] and args[1] is arguments["q"]
    for passed, cache, width in ((args[2], "v_cache", 512), (args[3], "k_cache", 64)):
        assert passed.shape == (64, 1, width) and passed.stride(0) == 576
        assert passed.data_ptr() == arguments[cache].data_ptr()
    assert args[4] is arguments["page_table"] and args[5] is arguments["cache_seqlens"]
    assert options == {
        "cu_seqlens_q": arguments["cu_seqlens_q"], "max_seqlen_q": 1, "softmax_scale": 192**-0.5, "causal": True,
        "out": None, "return_lse": False, "num_ctas": None, "cache_batch_idx": None, "ckv_scale": None,
        "kpe_scale": None,
    }  # fmt: skip


@pytest.mark.parametrize("only_qv", [False, True])
def test_sglang_passes_every_argument_itself(only_qv: bool) -> None:
    """Between its backends and sgl_kernel lies a function that names all it has, neutral or not (0.5.23). only_qv: a
    model without a rope part, whose q is None."""
    sgl, operator = engine(SGL), Recorder()
    parameters = inspect.signature(sgl.flash_attn_with_kvcache).parameters
    given = {name: p.default for name, p in parameters.items() if name not in ("score_mod", "aux_tensors", "ver")}
    given |= {name: value for name, value in sglang_call().items() if name in given}
    given |= {"only_qv": only_qv, "q": None if only_qv else given["q"]}
    at = list(parameters).index("pack_gqa") + 1  # by position up to there
    positional = [given.pop(name) for name in list(parameters)[:at]]
    with patched(SGL, operator=operator, machine=hopper):
        result = sgl.flash_attn_with_kvcache(*positional, **given)
    assert (result == "out") == (len(operator.calls) == 1) == (not only_qv)
    assert status().fallbacks == ({"only_qv: queries without a rope part": 1} if only_qv else {})


@pytest.mark.parametrize("q_lens", [(1, 1, 1), (2, 0, 4), (4, 4, 4)])
@pytest.mark.parametrize("page_size", [1, 4])
def test_sglang_against_fp64(q_lens: tuple[int, ...], page_size: int) -> None:
    """Written out anew from upstream's arguments, with no function of the dispatch in between."""
    sgl, one = engine(SGL), sglang_call(page_size=page_size, q_lens=q_lens)
    one["return_softmax_lse"] = True
    with patched(SGL, operator=Recorder(compute=True), machine=hopper, strict=True, only_where_faster=False):
        out, lse, *rest = sgl.flash_attn_with_kvcache(**one)
    assert rest == [None, None] and out.shape == one["qv"].shape and lse.shape == (16, sum(q_lens))
    starts = one["cu_seqlens_q"].tolist()
    for i, length in enumerate(one["cache_seqlens"].tolist()):
        keys = torch.arange(length)
        page = one["page_table"][i, keys // page_size].long()
        k, v = (one[name][page, keys % page_size, 0].double() for name in ("k_cache", "v_cache"))
        q, qv = (one[name][starts[i] : starts[i + 1]].double() for name in ("q", "qv"))
        scores = (torch.einsum("thd,kd->thk", q, k) + torch.einsum("thd,kd->thk", qv, v)) * one["softmax_scale"]
        tokens = torch.arange(q_lens[i])
        hidden = keys[None, :] > length - q_lens[i] + tokens[:, None]
        scores = scores.masked_fill(hidden[:, None], -torch.inf)
        expected = torch.einsum("thk,kd->thd", scores.softmax(-1), v)
        rows = slice(starts[i], starts[i + 1])
        torch.testing.assert_close(out[rows].double(), expected, rtol=8e-3, atol=1e-3)
        torch.testing.assert_close(lse[:, rows].T.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_vllm() -> None:
    vllm, operator, arguments = engine(VLLM), Recorder(), vllm_call()
    backend = stub("vllm.v1.backend", flash_attn_varlen_func=vllm.flash_attn_varlen_func)
    with patched(VLLM, operator=operator, machine=hopper, strict=True):
        assert backend.flash_attn_varlen_func(**arguments) == ("out", "lse")  # two values: upstream's
    ((args, options),) = operator.calls
    assert args[0] is arguments["q_v"] and args[1] is arguments["q"]
    assert args[2].shape == (12, 16, 512) and args[2].data_ptr() == arguments["v"].data_ptr()
    assert args[3].shape == (12, 16, 64) and args[3].data_ptr() == arguments["k"].data_ptr()
    assert args[4] is arguments["block_table"] and args[5] is arguments["seqused_k"]
    assert options == {
        "cu_seqlens_q": arguments["cu_seqlens_q"], "max_seqlen_q": 1, "softmax_scale": 192**-0.5, "causal": True,
        "out": None, "return_lse": True, "num_ctas": None, "cache_batch_idx": None, "ckv_scale": None,
        "kpe_scale": None,
    }  # fmt: skip


def test_vllm_against_fp64_with_out_and_padding() -> None:
    vllm, one = engine(VLLM), vllm_call()
    one["out"] = torch.empty_like(one["q_v"])
    with patched(VLLM, operator=Recorder(compute=True), machine=hopper, strict=True):
        out, lse = vllm.flash_attn_varlen_func(**one)
    assert out is one["out"]
    expected, expected_lse = numerics.reference(
        one["q_v"], one["q"], one["v"][:, :, 0], one["k"][:, :, 0], one["block_table"], one["seqused_k"],
        cu_seqlens_q=one["cu_seqlens_q"], softmax_scale=one["softmax_scale"], causal=True,
    )  # fmt: skip
    torch.testing.assert_close(out.double(), expected, rtol=8e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_vllm_calls_of_other_layers_pass_through() -> None:
    """Prefill of an MLA model, and every layer of other models: no q_v."""
    vllm = engine(VLLM)
    original, operator = vllm.flash_attn_varlen_func, Recorder()
    arguments = vllm_call()
    del arguments["q_v"]
    with patched(VLLM, operator=operator, machine=hopper, strict=True):
        assert vllm.flash_attn_varlen_func(**arguments) == "upstream"
    assert len(original.calls) == 1 and operator.calls == []


def test_flash_attention_3_positional_and_batched() -> None:
    """What FA3's own tests pass: positions first, an int length, (batch, heads, sq) LSE, four results."""
    fa3, one = engine(FA3), kvcache_call(sq=2, cache_seqlens=30)
    with patched(FA3, operator=Recorder(compute=True), machine=hopper, strict=True, only_where_faster=False):
        results = fa3.flash_attn_with_kvcache(
            one["q"], one["k_cache"], one["v_cache"], None, None, one["qv"], cache_seqlens=30,
            page_table=one["page_table"], causal=True, window_size=(-1, -1), return_softmax_lse=True,
        )  # fmt: skip
    out, lse, out_partial, lse_partial = results
    assert out.shape == (2, 2, 16, 512) and lse.shape == (2, 16, 2) and out_partial is lse_partial is None


def test_flash_attention_3_varlen_unpaged() -> None:
    fa3, one = engine(FA3), kvcache_call(page_size=24, pages=2)
    arguments = {
        "q": one["q"][:, 0], "qv": one["qv"][:, 0], "k": one["k_cache"], "v": one["v_cache"],
        "cu_seqlens_q": torch.tensor([0, 1, 2], dtype=I32), "cu_seqlens_k": None, "max_seqlen_q": 1, "max_seqlen_k": 24,
        "seqused_k": torch.tensor([24, 5], dtype=I32), "return_attn_probs": True,
    }  # fmt: skip
    with patched(FA3, operator=Recorder(compute=True), machine=hopper, strict=True):
        out, lse = fa3.flash_attn_varlen_func(**arguments)
    assert out.shape == (2, 16, 512) and lse.shape == (16, 2)


def test_sm_margin_leaves_sms_free() -> None:
    fa3, operator = engine(FA3), Recorder()
    with patched(FA3, operator=operator, machine=hopper, strict=True):
        for margin, ctas in ((0, None), (16, 116), (1000, 1)):
            fa3.flash_attn_with_kvcache(**kvcache_call(sm_margin=margin))
            assert operator.calls.pop()[1]["num_ctas"] == ctas
    assert status().etap_calls == 3


def test_gradients() -> None:
    fa3, operator, one = engine(FA3), Recorder(), kvcache_call()
    one["q"].requires_grad_()
    with patched(FA3, operator=operator, machine=hopper):
        assert fa3.flash_attn_with_kvcache(**one) == "upstream"
        with torch.no_grad():
            assert fa3.flash_attn_with_kvcache(**one) == "out"
    assert status().fallbacks == {"a tensor requires grad": 1}


KV, VARLEN = "flash_attn_with_kvcache", "flash_attn_varlen_func"
ENGINES = [(FA3, KV, kvcache_call), (SGL, KV, sglang_call), (VLLM, VARLEN, vllm_call)]
DESCALES = {  # of some requests, and the operator's form of it
    "(batch, 1)": lambda n: torch.rand(n, 1),
    "strided": lambda n: torch.rand(n, 5)[:, 2:3],
    "one value, expanded": lambda n: torch.rand(()).expand(n, 1),
    "(batch,)": lambda n: torch.rand(n),
    "one element": lambda n: torch.rand(1),
}


@pytest.mark.parametrize("shape", DESCALES)
@pytest.mark.parametrize(("target", "name", "make"), ENGINES)
def test_an_e4m3_cache(target: str, name: str, make: Any, shape: str) -> None:
    """Caches as views, v_descale as the latent's scale and k_descale as the rope part's: nothing copied."""
    module, operator, one = engine(target), Recorder(), make()
    batch = len(one["block_table" if target == VLLM else "page_table"])
    one = e4m3(one, k_descale=DESCALES[shape](batch), v_descale=DESCALES[shape](batch))
    with patched(target, operator=operator, machine=hopper, strict=True):
        for _ in range(2):
            assert getattr(module, name)(**one) == (("out", "lse") if target == VLLM else "out")
    for args, options in operator.calls:
        caches = [one["v" if target == VLLM else "v_cache"], one["k" if target == VLLM else "k_cache"]]
        for passed, cache in zip(args[2:4], caches, strict=True):
            assert passed.dtype == E4M3 and passed.data_ptr() == cache.data_ptr()
        for scale, descale in (("ckv_scale", "v_descale"), ("kpe_scale", "k_descale")):
            passed = options[scale]
            assert passed.shape == ((1,) if shape == "one element" else (batch,))
            assert passed.data_ptr() == one[descale].data_ptr() and torch.equal(passed, one[descale].reshape(-1))
    assert status().etap_calls == 2


@pytest.mark.parametrize("given", [("k_descale",), ("v_descale",), ("k_descale", "v_descale"), ()])
def test_an_e4m3_cache_against_fp64(given: tuple[str, ...]) -> None:
    """Written out from upstream's arguments: each descale multiplies the tensor it is named after."""
    fa3, one = engine(FA3), e4m3(kvcache_call(batch=3, pages=24), return_softmax_lse=True)
    for name in {"k_descale", "v_descale"} - set(given):
        del one[name]
    with patched(FA3, operator=Recorder(compute=True), machine=hopper, strict=True):
        out, lse, *_ = fa3.flash_attn_with_kvcache(**one)
    assert out.dtype == one["q"].dtype
    for i, length in enumerate(one["cache_seqlens"].tolist()):
        keys = torch.arange(length)
        page = one["page_table"][i, keys // 4].long()
        k, v = (one[name].double()[page, keys % 4, 0] for name in ("k_cache", "v_cache"))
        k, v = k * one.get("k_descale", torch.ones(3, 1))[i, 0], v * one.get("v_descale", torch.ones(3, 1))[i, 0]
        scores = (one["q"][i, 0].double() @ k.T + one["qv"][i, 0].double() @ v.T) * 576**-0.5
        torch.testing.assert_close(out[i, 0].double(), scores.softmax(-1) @ v, rtol=8e-3, atol=1e-3)
        torch.testing.assert_close(lse[i, :, 0].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


UNCOVERED = {
    "window_size": {"window_size": (64, 0)},
    "q_descale": {"q_descale": torch.ones(2, 1)},
    "too many query rows": {"heads": 65},
    "a descale factor is not a float32 tensor (batch, 1) on the queries' device": {"k_descale": torch.ones(3, 1)},
    "8-bit queries, or an 8-bit cache that is not float8_e4m3fn throughout": {
        "k_cache": torch.zeros(16, 4, 1, 64).to(torch.float8_e5m2)
    },
}


@pytest.mark.parametrize("reason", UNCOVERED)
def test_where_etap_cannot_upstreams_error_stays(reason: str) -> None:
    """Counted as left to upstream; in strict mode the error is ours, with the reason."""
    fa3, operator, changes = refusing_engine(), Recorder(), dict(UNCOVERED[reason])
    sizes = {name: changes.pop(name) for name in ("heads",) if name in changes}
    one = e4m3(kvcache_call(**sizes), **changes)
    with patched(FA3, operator=operator, machine=hopper):
        for _ in range(3):
            with pytest.raises(RuntimeError, match=REFUSAL):
                fa3.flash_attn_with_kvcache(**one)
        assert status().fallbacks == {reason: 3} and not operator.calls
        assert fa3.flash_attn_with_kvcache(**e4m3(kvcache_call())) == "out"
    with patched(FA3, operator=operator, machine=hopper, strict=True):
        for _ in range(2):
            with pytest.raises(FallbackError) as found:
                fa3.flash_attn_with_kvcache(**one)
            assert f": {reason}: " in str(found.value)


def test_no_measured_rule_is_about_an_e4m3_cache() -> None:
    """Upstream cannot run it, however many rows; what was remembered of a 16-bit cache does not hold for it either."""
    fa3, operator = engine(FA3), Recorder()
    with patched(FA3, operator=operator, machine=hopper):
        for heads in (33, 48, 64):
            for _ in range(2):
                assert fa3.flash_attn_with_kvcache(**kvcache_call(heads=heads) | NO_DESCALES) == "upstream"
                assert fa3.flash_attn_with_kvcache(**e4m3(kvcache_call(heads=heads))) == "out"
                assert fa3.flash_attn_with_kvcache(**e4m3(kvcache_call(heads=heads), **NO_DESCALES)) == "out"


NO_DESCALES = {"k_descale": None, "v_descale": None}


@pytest.fixture(scope="module")
def pinned_interface() -> dict[str, str]:
    """Function -> parameter list, from the pinned FlashAttention-3 archive. Without it these tests fail."""
    release = load_manifest("flash-attention-3").release()
    with tarfile.open(fetching.fetch_archive(release.archive)) as archive:
        member = archive.extractfile(f"{release.root}/hopper/flash_attn_interface.py")
        assert member is not None
        tree = ast.parse(member.read())
    return {node.name: ast.unparse(node.args) for node in tree.body if isinstance(node, ast.FunctionDef)}


FA3_FUNCTIONS = [name for module, name in SIGNATURES if module == FA3]


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", FA3_FUNCTIONS)
def test_the_stubs_have_the_pinned_signature(pinned_interface: dict[str, str], name: str) -> None:
    source = "from typing import Optional, Union\nimport torch\n"
    scope: dict[str, Any] = {}
    exec(f"{source}def {name}({pinned_interface[name]}): ...", scope)
    stand_in = from_signature(FA3, name, SIGNATURES[FA3, name])
    assert parameters(scope[name]) == parameters(stand_in)
    module = stub(FA3, **{other: from_signature(FA3, other, SIGNATURES[FA3, other]) for other in FA3_FUNCTIONS})
    setattr(module, name, scope[name])
    with patched(FA3, operator=Recorder(), machine=hopper):
        assert getattr(module, name) is not scope[name]
        assert inspect.signature(getattr(module, name)) == inspect.signature(scope[name])
