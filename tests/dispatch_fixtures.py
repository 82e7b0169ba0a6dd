"""Stub engines for the dispatch tests: modules with upstream's signatures that record calls, and an operator that does.

Nothing is installed and no GPU is asked: `hopper` claims that every device is one, and `Recorder` stands in for
mla_decode.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from etap_integration import numerics
from etap_integration.dispatch import Machine

HOPPER = Machine((9, 0), 132)
BF16, I32, E4M3 = torch.bfloat16, torch.int32, torch.float8_e4m3fn
FA3, SGL, VLLM = "flash_attn_interface", "sgl_kernel.flash_attn", "vllm.vllm_flash_attn"

# Upstream's parameters and defaults, in order.
_NEW = "k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None"
_RAGGED = "cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None"
_DESCALE = "q_descale=None, k_descale=None, v_descale=None"
_TUNING = "scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False"
_CACHE = "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None"
_VARLEN = "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None"
_WINDOW, _SCALE = "window_size=(-1, -1)", "softmax_scale=None, causal=False"

SIGNATURES = {
    (FA3, "flash_attn_with_kvcache"): (
        f"q, k_cache, v_cache, {_NEW}, {_CACHE}, {_RAGGED}, {_DESCALE}, {_SCALE}, {_WINDOW}, attention_chunk=0, "
        f"softcap=0.0, rotary_interleaved=True, {_TUNING}"
    ),
    (FA3, "flash_attn_varlen_func"): (
        f"{_VARLEN}, {_SCALE}, qv=None, {_DESCALE}, {_WINDOW}, attention_chunk=0, softcap=0.0, num_splits=1, "
        "pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False"
    ),
    (SGL, "flash_attn_with_kvcache"): (
        f"q, k_cache, v_cache, {_NEW}, {_CACHE}, {_RAGGED}, {_DESCALE}, {_SCALE}, {_WINDOW}, attention_chunk=None, "
        "softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, only_qv=False, "
        "sm_margin=0, return_softmax_lse=False, sinks=None, score_mod=None, aux_tensors=None, ver=3, out=None"
    ),
    (SGL, "flash_attn_varlen_func"): (
        f"{_VARLEN}, {_SCALE}, qv=None, {_DESCALE}, {_WINDOW}, attention_chunk=0, softcap=0.0, num_splits=1, "
        "pack_gqa=None, sm_margin=0, return_softmax_lse=False, sinks=None, ver=3"
    ),
    (VLLM, "flash_attn_varlen_func"): (
        "q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None, q_v=None, "
        f"dropout_p=0.0, {_SCALE}, window_size=None, softcap=0.0, alibi_slopes=None, deterministic=False, "
        "return_attn_probs=False, block_table=None, return_softmax_lse=False, out=None, scheduler_metadata=None, "
        f"{_DESCALE}, num_splits=0, fa_version=2, s_aux=None, cp_world_size=1, cp_rank=0, cp_tot_seqused_k=None"
    ),
}


def hopper(device: torch.device) -> Machine:
    return HOPPER


class Recorder:
    """An operator that keeps its arguments, and answers with the fp64 reference in float32 where asked to compute."""

    def __init__(self, compute: bool = False) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.compute = compute

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        if not self.compute:
            return ("out", "lse") if kwargs["return_lse"] else "out"
        options = {name: kwargs[name] for name in ("cu_seqlens_q", "softmax_scale", "causal")}
        lengths = args[5]
        if isinstance(lengths, int):
            lengths = [lengths] * args[0].shape[0]
        args, factor = unscaled(args, kwargs)
        out, lse = numerics.reference(*args[:5], lengths, **options)
        out = (out * factor).to(kwargs["out"].dtype if kwargs["out"] is not None else self.calls[-1][0][0].dtype)
        if kwargs["out"] is not None:
            out = kwargs["out"].copy_(out)
        return (out, lse.float()) if kwargs["return_lse"] else out


def unscaled(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], torch.Tensor]:
    """The arguments with the cache's scales moved to the queries, and what that leaves to multiply the output by."""
    ends, device = kwargs.get("cu_seqlens_q"), args[0].device
    tokens = ends.diff().long() if ends is not None else torch.ones(len(args[0]), dtype=torch.long, device=device)
    request = torch.arange(len(tokens), device=device).repeat_interleave(tokens)

    def per_token(scale: Any) -> torch.Tensor:
        each = torch.as_tensor(1.0 if scale is None else scale, dtype=torch.float64, device=device).reshape(-1)
        each = each.expand(len(tokens))
        return each[request].reshape(-1, *[1] * (args[0].dim() - 1))

    latent, rope = per_token(kwargs.get("ckv_scale")), per_token(kwargs.get("kpe_scale"))
    return (args[0] * latent, args[1] * rope, *(x.double() for x in args[2:4]), *args[4:]), latent


def upstream(module: str, name: str) -> Callable[..., Any]:
    """A function with upstream's signature; `calls` has the arguments of each call as a dict, it returns "upstream"."""
    return from_signature(module, name, SIGNATURES[module, name])


def from_signature(module: str, name: str, signature: str) -> Callable[..., Any]:
    scope: dict[str, Any] = {"__name__": module, "calls": []}
    exec(f"def {name}({signature}):\n    'Upstream.'\n    calls.append(dict(locals()))\n    return 'upstream'\n", scope)
    scope[name].calls = scope["calls"]
    return scope[name]


def stub(name: str, **contents: Any) -> ModuleType:
    """A module in sys.modules, and its parents."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        parent = ".".join(parts[:i])
        sys.modules.setdefault(parent, ModuleType(parent)).__path__ = []  # type: ignore[attr-defined]
    module = ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module
    if len(parts) > 1:
        setattr(sys.modules[".".join(parts[:-1])], parts[-1], module)
    return module


def engine(name: str) -> ModuleType:
    """A stub of one target, with all of its functions and a sibling that nothing should touch."""
    functions = {function: upstream(module, function) for module, function in SIGNATURES if module == name}
    return stub(name, get_scheduler_metadata=lambda: "metadata", **functions)


@contextmanager
def clean_modules() -> Iterator[None]:
    """sys.modules put back, whatever was stubbed."""
    before = dict(sys.modules)
    try:
        yield
    finally:
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] not in ("torch", "etap_integration", "hypothesis"):
                del sys.modules[name]
        for name, module in before.items():
            sys.modules[name] = module


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(BF16)


def kvcache_call(
    batch: int = 2, sq: int = 1, heads: int = 16, page_size: int = 4, pages: int = 16, **changes: Any
) -> dict[str, Any]:
    """A good flash_attn_with_kvcache call: paged, two views of one buffer, on the CPU."""
    kv = random(pages, page_size, 1, 576)
    width = pages // batch
    return {
        "q": random(batch, sq, heads, 64), "qv": random(batch, sq, heads, 512),
        "k_cache": kv[..., 512:], "v_cache": kv[..., :512],
        "page_table": torch.randperm(pages)[: batch * width].to(I32).view(batch, width),
        "cache_seqlens": torch.tensor([width * page_size - i for i in range(batch)], dtype=I32),
    } | changes  # fmt: skip


def sglang_call(heads: int = 16, page_size: int = 1, q_lens: tuple[int, ...] = (1, 1, 1)) -> dict[str, Any]:
    """What SGLang's FA3 backend passes for an absorbed MLA decode: a token pool of 576-wide rows, pages of one token,
    ragged queries, and a cu_seqlens_k_new that goes with no new keys."""
    batch, lengths = len(q_lens), [7 + 3 * i for i in range(len(q_lens))]
    pool = random(64, 1, 576)
    q = random(sum(q_lens), heads, 576)
    cumulative = lambda sizes: torch.tensor([0, *sizes]).cumsum(0).to(I32)  # noqa: E731
    pages = 64 // page_size
    return {
        "q": q[:, :, 512:], "qv": q[:, :, :512],
        "k_cache": pool[:, :, 512:].view(-1, page_size, 1, 64), "v_cache": pool[:, :, :512].view(-1, page_size, 1, 512),
        "page_table": torch.stack([torch.randperm(pages) for _ in range(batch)]).to(I32),
        "cache_seqlens": torch.tensor(lengths, dtype=I32),
        "cu_seqlens_q": cumulative(q_lens), "cu_seqlens_k_new": cumulative(lengths), "max_seqlen_q": max(q_lens),
        "softmax_scale": 192**-0.5, "causal": True, "softcap": 0.0, "k_descale": None, "v_descale": None,
        "return_softmax_lse": False, "num_splits": 0, "scheduler_metadata": torch.zeros(8, dtype=I32), "ver": 3,
    }  # fmt: skip


def vllm_call(heads: int = 16, page_size: int = 16) -> dict[str, Any]:
    """What vLLM's FlashAttention MLA backend passes: a batch padded for a CUDA graph with a request of length 0 and no
    query token, the caches unsqueezed views of one buffer."""
    kv = random(12, page_size, 576)
    q = random(3, heads, 576)
    return {
        "q": q[..., 512:], "k": kv[..., 512:].unsqueeze(-2), "v": kv[..., :512].unsqueeze(-2), "q_v": q[..., :512],
        "max_seqlen_q": 1, "cu_seqlens_q": torch.tensor([0, 1, 2, 3, 3], dtype=I32), "max_seqlen_k": 40,
        "seqused_k": torch.tensor([33, 40, 1, 0], dtype=I32),
        "block_table": torch.tensor([[3, 4, 5], [6, 0, 9], [11, -1, -1], [-1, -1, -1]], dtype=I32),
        "softmax_scale": 192**-0.5, "causal": True, "return_softmax_lse": True, "fa_version": 3,
        "scheduler_metadata": torch.zeros(17, dtype=I32), "num_splits": 0, "cp_world_size": 1, "cp_rank": 0,
        "cp_tot_seqused_k": None,
    }  # fmt: skip


def e4m3(arguments: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A call with its cache in e4m3, and descales per request as upstream has them, (batch, KV heads)."""
    k, v = ("k_cache", "v_cache") if "k_cache" in arguments else ("k", "v")
    kv = torch.cat([arguments[v], arguments[k]], -1).to(E4M3)
    batch = len(arguments["block_table" if "block_table" in arguments else "page_table"])
    descales = {"k_descale": 0.5 + torch.rand(batch, 1), "v_descale": 0.5 + torch.rand(batch, 1)}
    return arguments | {k: kv[..., 512:], v: kv[..., :512]} | descales | changes
