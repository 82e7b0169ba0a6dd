"""The operator's plumbing without a GPU: registration, shape inference, torch.compile, and what reaches the kernel.

The numerics model stands in for the kernel, registered for the CPU for the length of a test.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from problems import Built, Problem, build, draw, draw_e4m3, draw_groups, judge
from torch._subclasses.fake_tensor import FakeTensorMode

import etap_integration
from etap_integration import _library, mla_decode, numerics, ops

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple]]:
    """Registers the model for the CPU and lets CPU tensors through; gives the arguments of each call."""
    calls: list[tuple] = []

    def kernel(*args) -> None:
        args += (None, None, 1.0, 1.0, None, None)[len(args) - 14 :]  # the dispatcher drops trailing defaults
        calls.append(args)
        *args, arr = args
        q_nope, q_rope, ckv, kpe, table, lengths, cu, max_q, scale, causal, out, lse, _, parts, *scales, index = args
        options = {
            "cu_seqlens_q": cu,
            "softmax_scale": scale,
            "causal": causal,
            "p_parts": parts or 2,
            "out_dtype": out.dtype,
        }
        if index is not None:
            ckv, kpe = ckv[index.long()], kpe[index.long()]
        model = numerics.etap_model
        if ckv.dtype == torch.float8_e4m3fn:
            model = numerics.etap_e4m3_model
            values = [float(v) if t is None else t.item() for t, v in zip(scales[:2], scales[2:], strict=True)]
            options |= {"ckv_scale": values[0], "kpe_scale": values[1], "ckv_scale_arr": arr}
        result, result_lse = model(q_nope, q_rope, ckv, kpe, table, lengths, **options)
        assert max_q >= max(numerics.query_lengths(q_nope, cu))
        out.copy_(result)
        if lse is not None:
            lse.copy_(result_lse)

    monkeypatch.setattr(ops, "_check_device", lambda device, num_ctas: None)
    monkeypatch.setattr(ops, "_LOAD_FAILURE", None)
    with torch.library._scoped_library("etap", "FRAGMENT") as library:
        library.impl("mla_decode", kernel, "CPU")
        yield calls


def run(built: Built) -> tuple[torch.Tensor, torch.Tensor]:
    return mla_decode(*built.args, **built.options, out=built.new_out(), return_lse=True)


@pytest.mark.parametrize("seed", range(40))
def test_drawn_problems_reach_the_kernel_intact(seed: int, stand_in: list[tuple]) -> None:
    problem = draw(seed)
    lengths = tuple(min(n, 300) for n in problem.lengths)
    built = build(problem.with_(lengths=lengths, heads=min(problem.heads, 17), num_ctas=None), "cpu")
    out, lse = run(built)
    judge(built, out, lse, 1 if problem.precise is False else 2)


@pytest.mark.parametrize("drawn", [draw_e4m3, draw_groups])
@pytest.mark.parametrize("seed", range(20))
def test_drawn_e4m3_problems_reach_the_kernel_intact(
    seed: int, drawn: Callable[[int], Problem], stand_in: list[tuple]
) -> None:
    problem = drawn(seed)
    lengths = tuple(min(n, 300) for n in problem.lengths)
    built = build(problem.with_(lengths=lengths, heads=min(problem.heads, 17), num_ctas=None), "cpu")
    out, lse = run(built)
    judge(built, out, lse, 2 if problem.precise else 1)


def test_tokens_of_656_bytes() -> None:
    """The three views of a FlashMLA-style cache lie where that format has them."""
    cache = torch.arange(3 * 5 * 656).to(torch.uint8).view(3, 5, 656)
    for given in (cache, cache.view(3, 5, 1, 656), cache.view(torch.float8_e4m3fn)):
        ckv, arr, kpe = etap_integration.split_token_cache(given)
        assert (ckv.shape, arr.shape, kpe.shape) == ((3, 5, 512), (3, 5, 4), (3, 5, 64))
        assert (ckv.dtype, arr.dtype, kpe.dtype) == (torch.float8_e4m3fn, torch.float32, torch.bfloat16)
        assert torch.equal(ckv.view(torch.uint8), cache[..., :512])
        assert torch.equal(arr.view(torch.uint8), cache[..., 512:528])
        assert torch.equal(kpe.view(torch.uint8), cache[..., 528:])
        assert {x.untyped_storage().data_ptr() for x in (ckv, arr, kpe)} == {cache.data_ptr()}
    assert etap_integration.split_token_cache(cache, torch.float16)[2].dtype == torch.float16


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1],), TypeError, "cache: expected a torch.Tensor, got list"),
        ((torch.zeros(2, 3, 656),), TypeError, "cache: dtype torch.float32, expected one of one byte"),
        ((torch.zeros(2, 3, 656, dtype=torch.uint8), torch.float32), TypeError, "rope_dtype: torch.float32, expected"),
        ((torch.zeros(2, 3, 576, dtype=torch.uint8),), ValueError, r"cache: shape \(2, 3, 576\), expected"),
        ((torch.zeros(2, 3, 658, dtype=torch.uint8)[..., :656],), ValueError, r"cache: strides \(1974, 658, 1\)"),
        ((torch.zeros(2, 3, 660, dtype=torch.uint8)[..., 2:658],), ValueError, "cache: strides .* and offset 2"),
    ],
)
def test_tokens_of_other_forms(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        etap_integration.split_token_cache(*arguments)


def test_scales_reach_the_kernel(stand_in: list[tuple]) -> None:
    built = build(Problem(lengths=(70, 3), e4m3=True), "cpu")
    mla_decode(*built.args)
    assert stand_in[-1][13:] == (0, None, None, 1.0, 1.0, None, None)
    mla_decode(*built.args, kpe_scale=2)
    assert stand_in[-1][14:] == (None, None, 1.0, 2.0, None, None)
    mla_decode(*built.args, ckv_scale=torch.tensor(0.5), kpe_scale=torch.empty(0))
    assert stand_in[-1][14].item() == 0.5 and stand_in[-1][15:] == (None, 1.0, 1.0, None, None)
    mla_decode(*built.args, ckv_scale=0.5, kpe_scale=torch.empty(0))
    assert stand_in[-1][14:] == (None, None, 0.5, 1.0, None, None)
    each = torch.tensor([0.5, 0.25])  # one per request, which the model does not take
    assert ops._rare_arguments(each, None, None) == (each, None, 1.0, 1.0, None, None)
    assert ops._rare_arguments(None, each, None) == (None, each, 1.0, 1.0, None, None)


def test_defaults(stand_in: list[tuple]) -> None:
    built = build(Problem(lengths=(70, 3)), "cpu")
    out = mla_decode(*built.args)
    assert isinstance(out, torch.Tensor) and out.dtype == torch.bfloat16
    *_, table, lengths, cu, max_q, scale, causal, passed, lse, num_ctas, parts = stand_in[0][:14]
    assert (cu, max_q, causal, lse, num_ctas, parts) == (None, 1, False, None, 0, 0)
    assert stand_in[0][14:] == (None, None, 1.0, 1.0, None, None)
    assert math.isclose(scale, 576**-0.5) and passed is out and table is built.args[4]
    assert lengths.dtype == torch.int32 and lengths.tolist() == [70, 3]
    mla_decode(*built.args, num_ctas=78, precise=False)
    assert stand_in[1][12:14] == (78, 1)


@pytest.mark.parametrize("lengths", [70, [70, 70], (70, 70), torch.tensor([70, 70])], ids=str)
def test_lengths_from_the_host(lengths, stand_in: list[tuple]) -> None:
    built = build(Problem(lengths=(70, 70)), "cpu")
    mla_decode(*built.args[:5], lengths)
    assert stand_in[0][5].dtype == torch.int32 and stand_in[0][5].tolist() == [70, 70]


def test_cache_batch_idx(stand_in: list[tuple]) -> None:
    built = build(Problem(lengths=(70, 3, 20), page_size=0, poison=0.0), "cpu")
    q_nope, q_rope, ckv, kpe, table, lengths = built.args
    assert table is None
    expected = mla_decode(*built.args)
    place = torch.tensor([4, 0, 3], dtype=torch.int32)
    scattered = [torch.full((5, *cache.shape[1:]), math.nan, dtype=cache.dtype) for cache in (ckv, kpe)]
    for new, cache in zip(scattered, (ckv, kpe), strict=True):
        new[place.long()] = cache
    out = mla_decode(q_nope, q_rope, *scattered, None, lengths, cache_batch_idx=place)
    assert torch.equal(out, expected) and stand_in[1][-2] is place


def test_empty_batches_launch_nothing(stand_in: list[tuple]) -> None:
    for problem in (Problem(lengths=()), Problem(lengths=(5, 6), q_lens=(0, 0))):
        out, lse = run(build(problem, "cpu"))
        assert out.numel() == 0 and lse.numel() == 0
    assert not stand_in


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_shapes_on_meta_tensors(ragged: bool, out_dtype: torch.dtype | None) -> None:
    q_lens = (3, 0, 2) if ragged else None
    built = build(Problem(lengths=(7, 200, 64), sq=3, q_lens=q_lens, out_dtype=out_dtype), "cpu")
    args = [x.to("meta") for x in built.args]
    options = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in built.options.items()}
    out, lse = mla_decode(*args, **options, return_lse=True)
    assert out.shape == built.args[0].shape and out.dtype == torch.bfloat16 and out.device.type == "meta"
    assert lse.shape == ((16, 5) if ragged else (3, 16, 3)) and lse.dtype == torch.float32
    wide = torch.empty(args[0].shape, dtype=torch.float32, device="meta")
    assert mla_decode(*args, **options, out=wide) is wide


def test_operator_on_fake_tensors() -> None:
    with FakeTensorMode():
        q_nope, q_rope = (torch.empty(4, 1, 16, n, dtype=torch.bfloat16) for n in (512, 64))
        ckv, kpe = (torch.empty(50, 64, n, dtype=torch.bfloat16) for n in (512, 64))
        table, lengths = (torch.empty(*s, dtype=torch.int32) for s in ((4, 12), (4,)))
        args = (q_nope, q_rope, ckv, kpe, table, lengths, None, 1, 0.1, False)
        assert torch.ops.etap.mla_decode(*args, torch.empty_like(q_nope), torch.empty(4, 16, 1), 0, 2) is None
        with pytest.raises(RuntimeError, match="out: shape"):
            torch.ops.etap.mla_decode(*args, q_rope, None, 0, 2)


def test_compiles_without_a_graph_break(stand_in: list[tuple]) -> None:
    built = build(Problem(lengths=(100, 0), sq=2, causal=True, poison=0.0), "cpu")
    expected, expected_lse = run(built)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(*args):
        out, lse = mla_decode(*args, return_lse=True, causal=True)
        return out + 0, lse

    out, lse = step(*built.args)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_device_check_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    h20 = SimpleNamespace(name="NVIDIA H20", major=9, minor=0, multi_processor_count=78)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: h20)
    monkeypatch.setattr(ops, "_DEVICES", {})

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: torch.Tensor) -> torch.Tensor:
        ops._check_device(torch.device("cuda", 0), 78)
        return x * 1

    assert step(torch.ones(1)).item() == 1


def test_registration_checks(stand_in: list[tuple]) -> None:
    built = build(Problem(lengths=(100, 30), poison=0.0), "cpu")
    args = (*built.args, None, 1, 0.1, False, built.new_out().zero_(), torch.zeros(2, 16, 1), 0, 2)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.etap.mla_decode.default, args, test_utils=checks)


def test_schema_is_the_one_in_the_sources() -> None:
    sources = list((ROOT / "csrc").rglob("*.cpp"))
    defined = [m for s in sources for m in re.findall(r"\bm\.def\(((?:\s*\"[^\"]*\")+)\s*\)", s.read_text())]
    schemas = ["".join(re.findall(r'"([^"]*)"', m)) for m in defined]
    if not schemas:
        pytest.skip("no operator is defined under csrc")
    assert _library.SCHEMA in schemas
    assert str(torch.ops.etap.mla_decode.default._schema) == f"etap::{_library.SCHEMA}"


def test_package_imports_lazily() -> None:
    code = (
        "import sys, etap_integration as e; assert 'torch' not in sys.modules; print(e.__version__, sorted(e.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mla_decode" in done.stdout and etap_integration.__version__ in done.stdout
    assert set(etap_integration.__all__) <= set(dir(etap_integration))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = etap_integration.nothing


def test_build_info() -> None:
    info = etap_integration.build_info()
    assert info["version"] == etap_integration.__version__
    assert info["library"]["loaded"] == (info["library"]["reason"] is None)
    assert isinstance(info["kernels"], dict) and isinstance(info["host"], dict)
