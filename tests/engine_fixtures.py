"""Stub engines that compute: upstream's signature, the fp64 reference behind it, and a known error. For the CPU."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from dispatch_fixtures import FA3, SGL, VLLM, engine

from etap_integration import numerics

NOISE = 1e-3


def computing(name: str, function: str, qv: str, k: str, v: str, table: str, lengths: str) -> Any:
    """A stub engine whose function computes the attention in fp64, plus a known error."""
    module = engine(name)
    original = getattr(module, function)

    def compute(arguments: dict[str, Any]) -> Any:
        a = arguments
        out, lse = numerics.reference(
            a[qv], a["q"], a[v][:, :, 0], a[k][:, :, 0], a[table], a[lengths], cu_seqlens_q=a["cu_seqlens_q"],
            softmax_scale=a["softmax_scale"], causal=a["causal"],
        )  # fmt: skip
        out = (out + NOISE).to(a["q"].dtype)
        if a.get("out") is not None:
            out = a["out"].copy_(out)
        return (out, lse.float()) if a["return_softmax_lse"] else out

    class Calls(list):
        def append(self, item: Any) -> None:
            super().append(item)
            scope["answer"] = compute(item)

    scope = original.__globals__
    source = f"def {function}{original_signature(original)}:\n    calls.append(dict(locals()))\n    return answer\n"
    scope["calls"] = Calls()
    exec(source, scope)
    module.__dict__[function] = scope[function]
    scope[function].calls = scope["calls"]
    return module


def original_signature(function: Any) -> str:
    return str(inspect.signature(function))


def vllm_engine() -> Any:
    """vLLM's function, computing."""
    return computing(VLLM, "flash_attn_varlen_func", "q_v", "k", "v", "block_table", "seqused_k")


def idle_engine() -> Any:
    """SGLang's function, returning zeros."""
    module = engine(SGL)
    scope = module.flash_attn_with_kvcache.__globals__
    source = f"def f{original_signature(module.flash_attn_with_kvcache)}: return 0 * qv"
    exec(source, scope)
    module.flash_attn_with_kvcache = scope["f"]
    return module


def ones(q_nope: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.ones_like(q_nope)


def sgl_engine() -> Any:
    """SGLang's function, computing."""
    names = ("qv", "k_cache", "v_cache", "page_table", "cache_seqlens")
    return computing(SGL, "flash_attn_with_kvcache", *names)


def fa3_engine() -> Any:
    """FlashAttention-3's function, computing."""
    names = ("qv", "k_cache", "v_cache", "page_table", "cache_seqlens")
    return computing(FA3, "flash_attn_with_kvcache", *names)


REFUSAL = "query and key must have the same dtype"


def refusing_engine() -> Any:
    """FlashAttention-3's function as it is with an e4m3 cache beside 16-bit queries."""
    module = engine(FA3)
    scope = module.flash_attn_with_kvcache.__globals__
    source = f"def f{original_signature(module.flash_attn_with_kvcache)}: raise RuntimeError({REFUSAL!r})"
    exec(source, scope)
    module.flash_attn_with_kvcache = scope["f"]
    return module
