"""A call decided once: the next of its kind takes the short way, with the same result; one that differs does not."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dispatch_fixtures import (
    BF16,
    FA3,
    I32,
    SGL,
    VLLM,
    Recorder,
    clean_modules,
    e4m3,
    engine,
    hopper,
    kvcache_call,
    sglang_call,
    vllm_call,
)

from etap_integration import _library, ops
from etap_integration.dispatch import FallbackError, decision, patched, reset_counts, routing, status
from etap_integration.dispatch.decision import Rule
from etap_integration.dispatch.repeats import Form

KV, VARLEN = "flash_attn_with_kvcache", "flash_attn_varlen_func"


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ETAP_STRICT", raising=False)
    reset_counts()
    with clean_modules():
        yield


@pytest.fixture
def long_way(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each call that took the long way."""
    taken: list[Any] = []
    decide = routing._decide
    monkeypatch.setattr(routing, "_decide", lambda *args: taken.append(args) or decide(*args))
    return taken


@pytest.mark.parametrize(
    ("target", "name", "make"), [(FA3, KV, kvcache_call), (SGL, KV, sglang_call), (VLLM, VARLEN, vllm_call)]
)
def test_the_operator_gets_the_same_both_times(
    target: str, name: str, make: Callable[..., dict[str, Any]], long_way: list[Any]
) -> None:
    module, operator = engine(target), Recorder()
    with patched(target, operator=operator, machine=hopper, strict=True):
        for _ in range(3):
            arguments = make()  # other tensors, the same shapes
            result = getattr(module, name)(**arguments)
            args = operator.calls[-1][0]
            assert args[0] is arguments["q_v" if target == VLLM else "qv"] and args[1] is arguments["q"]
            assert args[5] is arguments["seqused_k" if target == VLLM else "cache_seqlens"]
    assert len(long_way) == 1 and status().etap_calls == 3
    (first, _, third) = operator.calls
    tensors = ("cu_seqlens_q", "cache_batch_idx", "out")
    assert {k: v for k, v in first[1].items() if k not in tensors} == {
        k: v for k, v in third[1].items() if k not in tensors
    }
    assert [x.shape for x in first[0]] == [x.shape for x in third[0]] and [x.stride() for x in first[0]] == [
        x.stride() for x in third[0]
    ]
    assert result == (("out", "lse") if target == VLLM else "out")


DIFFERENT = [
    {"heads": 8},
    {"sq": 2, "heads": 8},  # as many rows: no measured rule sends it away
    {"batch": 4},
    {"causal": True},
    {"softmax_scale": 0.5},
    {"return_softmax_lse": True},
    {"sm_margin": 8},
    {"page_size": 2},
    {"cache_seqlens": 5},
    {"softcap": 1.0},
    {"window_size": (3, 0)},
    {"k": torch.zeros(2, 1, 1, 64, dtype=BF16)},
    {"cache_leftpad": torch.zeros(2, dtype=I32)},
    {"page_table": torch.zeros(2, 8, dtype=torch.int64)},
    {"cache_seqlens": torch.zeros(2, dtype=torch.int64)},
    {"cache_seqlens": torch.zeros(3, dtype=I32)},
    {"out": torch.zeros(2, 1, 16, 512, dtype=BF16)},
    {"out": torch.zeros(2, 1, 16, 520, dtype=BF16)[..., 4:516]},
    {"q": torch.zeros(2, 1, 16, 64, dtype=torch.float16)},
    {"qv": torch.zeros(2, 1, 16, 256, dtype=BF16)},
    {"k_cache": torch.zeros(16, 4, 1, 128, dtype=BF16)[..., ::2]},
    {"v_cache": torch.zeros(16, 4, 2, 512, dtype=BF16)},
    {"qv": 3},
    {"tree_mask": None},
    {"k_descale": torch.ones(2, 1)},
    e4m3(kvcache_call()),
    e4m3(kvcache_call(), k_descale=torch.ones(3, 1)),
    e4m3(kvcache_call(), v_descale=torch.ones(2, 1, dtype=BF16)),
    e4m3(kvcache_call(), v_descale=0.5),
]


@pytest.mark.parametrize("changes", DIFFERENT, ids=lambda c: ",".join(c))
def test_what_differs_is_decided_anew(changes: dict[str, Any], long_way: list[Any]) -> None:
    """With the result that it has in a fresh process, however often; and the first kind is not forgotten."""
    names = ("q", "k_cache", "v_cache")

    def outcomes(calls: list[dict[str, Any]]) -> list[Any]:
        module, operator = engine(FA3), Recorder()
        found = []
        with patched(FA3, operator=operator, machine=hopper):
            for arguments in calls:
                try:
                    result = module.flash_attn_with_kvcache(*(arguments.get(n) for n in names), **{
                        k: v for k, v in arguments.items() if k not in names
                    })  # fmt: skip
                except TypeError as failure:  # upstream's, for a parameter it has not
                    result = str(failure)
                found.append((result, operator.calls[-1][1]["return_lse"] if operator.calls else None))
                operator.calls.clear()
        return found

    usual, changed = kvcache_call(), kvcache_call(**changes)
    alone = outcomes([changed])[0]
    assert outcomes([usual, changed, usual, changed]) == [("out", False), alone] * 2
    assert outcomes([usual, changed])[0] == ("out", False)


def test_gradients_are_looked_at_each_time(long_way: list[Any]) -> None:
    fa3, operator = engine(FA3), Recorder()
    plain, wants = kvcache_call(), kvcache_call()
    wants["qv"].requires_grad_()
    with patched(FA3, operator=operator, machine=hopper):
        for arguments, expected in ((plain, "out"), (wants, "upstream"), (plain, "out"), (wants, "upstream")):
            assert fa3.flash_attn_with_kvcache(**arguments) == expected
        with torch.no_grad():
            assert fa3.flash_attn_with_kvcache(**wants) == "out"
    assert status().fallbacks == {decision.GRADIENTS: 2} and len(long_way) == 3


def test_rules_are_asked_each_time(monkeypatch: pytest.MonkeyPatch, long_way: list[Any]) -> None:
    """They may depend on max_seqlen_k, which is no part of what is remembered."""
    vllm, operator = engine(VLLM), Recorder()
    monkeypatch.setattr(decision, "MEASURED_RULES", (Rule("long", lambda rows, batch, length, sms: length > 30),))
    with patched(VLLM, operator=operator, machine=hopper):
        for longest, expected in ((20, ("out", "lse")), (40, "upstream"), (30, ("out", "lse")), (31, "upstream")):
            assert vllm.flash_attn_varlen_func(**vllm_call() | {"max_seqlen_k": longest}) == expected
    assert status().fallbacks == {"long": 2} and len(long_way) == 2
    with patched(VLLM, operator=operator, machine=hopper, only_where_faster=False):
        assert vllm.flash_attn_varlen_func(**vllm_call()) == ("out", "lse")


def test_fall_backs_are_short_too(long_way: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    fa3 = engine(FA3)
    calls = [kvcache_call(softcap=1.0), kvcache_call(heads=33), kvcache_call(page_table=None)]
    with patched(FA3, operator=Recorder(), machine=hopper), caplog.at_level(logging.INFO, "etap_integration.dispatch"):
        for _ in range(4):
            for arguments in calls:
                assert fa3.flash_attn_with_kvcache(**arguments) == "upstream"
        assert len(long_way) == 3 and len(caplog.records) == 3
        assert sorted(status().fallbacks.values()) == [4, 4, 4]
        reset_counts()  # lets every reason be logged once more
        fa3.flash_attn_with_kvcache(**calls[0])
        assert len(caplog.records) == 4 and status().fallbacks == {"softcap": 1}
    with patched(FA3, operator=Recorder(), machine=hopper, strict=True):
        for _ in range(2):
            with pytest.raises(FallbackError, match="softcap"):
                fa3.flash_attn_with_kvcache(**calls[0])


def test_an_error_is_not_remembered(long_way: list[Any]) -> None:
    fa3 = engine(FA3)

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such luck")

    with patched(FA3, operator=failing, machine=hopper):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no such luck"):
                fa3.flash_attn_with_kvcache(**kvcache_call())
    assert len(long_way) == 2


def test_no_tensor_is_kept() -> None:
    fa3 = engine(FA3)
    fa3.flash_attn_with_kvcache.calls = fa3.flash_attn_with_kvcache.__globals__["calls"] = Forgetful()
    with patched(FA3, operator=lambda *args, **kwargs: None, machine=hopper):
        kept = []
        for changes in ({}, {"softcap": 1.0}, {"k_descale": torch.ones(1)}, {"heads": 33}):
            arguments = kvcache_call(**changes)
            fa3.flash_attn_with_kvcache(**arguments)
            fa3.flash_attn_with_kvcache(**arguments)
            kept += [weakref.ref(x) for x in arguments.values() if isinstance(x, torch.Tensor)]
            del arguments
        del changes
        gc.collect()
        alive = [x() for x in kept if x() is not None]
        assert not alive


class Forgetful(list):
    def append(self, item: Any) -> None:
        pass


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Form, "CAPACITY", 3)
    fa3, operator = engine(FA3), Recorder()
    with patched(FA3, operator=operator, machine=hopper):
        for pages in (4, 6, 8, 10, 12, 14, 4, 6):
            assert fa3.flash_attn_with_kvcache(**kvcache_call(pages=pages)) == "out"
            assert fa3.flash_attn_with_kvcache(**kvcache_call(softcap=float(pages))) == "upstream"
            repeats = fa3.flash_attn_with_kvcache.__etap_route__.engine.repeats
            for form in repeats._forms.values():
                assert max(len(form._known), len(form._refused)) <= 3 and len(form._index_keys) <= 4


def test_a_table_seen_again_is_known_by_sight_but_not_by_address() -> None:
    """Identity stands for shape and dtype, of the object itself: a new tensor at an old address is looked at."""
    fa3, operator = engine(FA3), Recorder()
    good = kvcache_call()
    with patched(FA3, operator=operator, machine=hopper):
        for _ in range(3):
            assert fa3.flash_attn_with_kvcache(**good) == "out"
        for dtype, expected in ((torch.int64, "upstream"), (I32, "out"), (torch.int16, "upstream")):
            one = good | {"cache_seqlens": torch.zeros(2, dtype=dtype)}
            for _ in range(2):
                assert fa3.flash_attn_with_kvcache(**one) == expected


@pytest.fixture
def real_operator(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """etap::mla_decode as a kernel for the CPU that notes its arguments and fills in what it is to write."""
    calls: list[tuple[Any, ...]] = []
    _library.load()

    def kernel(*args: Any) -> None:
        calls.append(args)
        args[10].fill_(len(calls))
        if args[11] is not None:
            args[11].fill_(len(calls))

    monkeypatch.setattr(ops, "_check_device", lambda device, num_ctas: None)
    monkeypatch.setattr(ops, "_LOAD_FAILURE", None)
    with torch.library._scoped_library("etap", "FRAGMENT") as library:
        library.impl("mla_decode", kernel, "CPU")
        yield calls


@pytest.mark.parametrize("checking", [False, True])
@pytest.mark.parametrize(
    ("target", "name", "make"),
    [
        (FA3, KV, lambda: kvcache_call(sq=2, return_softmax_lse=True, sm_margin=4)),
        (SGL, KV, sglang_call),
        (VLLM, VARLEN, vllm_call),
        (FA3, KV, lambda: unpaged_call()),
        (FA3, KV, lambda: e4m3(kvcache_call())),
        (SGL, KV, lambda: e4m3(sglang_call(), k_descale=None)),
        (VLLM, VARLEN, lambda: e4m3(vllm_call(), k_descale=None, v_descale=None)),
    ],
)
def test_the_real_operator_unchecked_gets_what_it_got_checked(
    target: str, name: str, make: Callable[[], dict[str, Any]], checking: bool,
    real_operator: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, long_way: list[Any],
) -> None:  # fmt: skip
    monkeypatch.setattr(ops, "_CHECK", checking)
    module, arguments = engine(target), make()
    with patched(target, machine=hopper, strict=True, only_where_faster=False), torch.inference_mode():
        first = getattr(module, name)(**arguments)
        second = getattr(module, name)(**arguments)
    assert len(long_way) == 1 and len(real_operator) == 2
    once, again = real_operator
    for one, two in zip(once, again, strict=True):
        if not isinstance(one, torch.Tensor):
            assert one == two and type(one) is type(two)
        elif one.dim() != two.dim():  # the caches, as they came
            assert two.shape[2] == 1 and one.shape == two.squeeze(2).shape and one.data_ptr() == two.data_ptr()
        else:
            assert one.shape == two.shape and one.dtype == two.dtype and one.stride() == two.stride()
    firsts, seconds = (x if isinstance(x, tuple) else (x,) for x in (first, second))
    assert len(firsts) == len(seconds)
    for one, two in zip(firsts, seconds, strict=True):
        assert (one is two is None) or (one.shape == two.shape and bool((one == 1).all()) and bool((two == 2).all()))


def unpaged_call() -> dict[str, Any]:
    kv = torch.zeros(5, 24, 1, 576, dtype=BF16)
    return kvcache_call() | {
        "k_cache": kv[..., 512:], "v_cache": kv[..., :512], "page_table": None,
        "cache_batch_idx": torch.tensor([4, 0], dtype=I32), "cache_seqlens": torch.tensor([24, 5], dtype=I32),
    }  # fmt: skip
