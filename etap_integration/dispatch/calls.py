"""One shape for the attention calls of every engine: `Call`, and the `Normaliser` that makes it from args and kwargs.

An `Interface` says how one upstream function names its parameters. Defaults are read off the installed function's own
signature, never assumed: a parameter that is not passed counts with the value it has there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from etap_integration import _library


@dataclass(frozen=True)
class Machine:
    """What a decision needs to know of the device a call's tensors lie on.

    capability: (major, minor), None where it is no CUDA device; sms: its SMs; library: why the operator cannot run in
    this process, None where it can.
    """

    capability: tuple[int, int] | None
    sms: int = 0
    library: str | None = None


NOT_CUDA = Machine(None)


@functools.cache
def machine_of(device: torch.device) -> Machine:
    """The machine behind `device`, asked for once a process."""
    if device.type != "cuda":
        return NOT_CUDA
    found = torch.cuda.get_device_properties(device)
    return Machine((found.major, found.minor), found.multi_processor_count, _library.load())


@dataclass(frozen=True)
class Interface:
    """How an upstream function names what a call is made of, and what it returns.

    roles: `Call` field -> parameter. required: the fields without whose parameters the function is not the one we know.
    scale_includes_qv: whether softmax_scale defaults to (64 + 512) ** -0.5 or, as in vLLM, to 64 ** -0.5.
    after_lse: how many values follow (out, lse) where the LSE is asked for; None in each place, as upstream has it
    where nothing was split.
    """

    roles: Mapping[str, str]
    required: tuple[str, ...]
    scale_includes_qv: bool
    after_lse: int


_SAME = ("page_table", "cache_seqlens", "cu_seqlens_q", "max_seqlen_q", "softmax_scale", "causal", "out")
# A descale goes with the tensor it is named after: the rope part is upstream's K, the latent its V.
_DESCALES = {"ckv_scale": "v_descale", "kpe_scale": "k_descale"}
_COMMON = MappingProxyType({"q_rope": "q", "q_nope": "qv", **{name: name for name in _SAME}, **_DESCALES})
_VARLEN = MappingProxyType({**_COMMON, "k_cache": "k", "v_cache": "v", "cache_seqlens": "seqused_k"})
_NEEDED = ("q_rope", "q_nope", "k_cache", "v_cache", "cache_seqlens", "softmax_scale", "causal", "return_lse")

KVCACHE = Interface(
    {
        **_COMMON,
        "k_cache": "k_cache",
        "v_cache": "v_cache",
        "return_lse": "return_softmax_lse",
        "cache_batch_idx": "cache_batch_idx",
    },
    required=(*_NEEDED, "page_table", "cu_seqlens_q", "max_seqlen_q"),
    scale_includes_qv=True,
    after_lse=2,
)
FA3_VARLEN = Interface(
    {**_VARLEN, "return_lse": "return_attn_probs"}, required=_NEEDED, scale_includes_qv=True, after_lse=0
)
SGL_VARLEN = Interface(
    {**_VARLEN, "return_lse": "return_softmax_lse"}, required=_NEEDED, scale_includes_qv=True, after_lse=2
)
VLLM_VARLEN = Interface(
    {**_VARLEN, "q_nope": "q_v", "page_table": "block_table", "return_lse": "return_softmax_lse"},
    required=(*_NEEDED, "page_table"),
    scale_includes_qv=False,
    after_lse=0,
)


@dataclass(slots=True)
class Call:
    """One attention call, upstream's names gone. Nothing is checked: any field may hold whatever the caller passed.

    q_rope          (batch, sq, heads, 64), ragged (total_q, heads, 64); bfloat16 or float16
    q_nope          the same with 512; None where the call is no MLA call
    k_cache         the rope cache: (pages, page_size, 1, 64), or (batch, seqlen, 1, 64) without a page table
    v_cache         the latent cache: the same with 512; both in the queries' dtype, or both in float8_e4m3fn
    page_table      (batch, max_pages) int32, or None
    cache_seqlens   (batch,) int32, or an int for all requests
    cu_seqlens_q    (batch + 1,) int32 where the queries are ragged, with `max_seqlen_q`
    softmax_scale   None: upstream's default was resolved into a number already, where there is one
    causal, out, return_lse   as the operator's
    cache_batch_idx (batch,) int32: the caches' row of each request, or None
    ckv_scale, kpe_scale   what an e4m3 v_cache and k_cache are multiplied by: float32 (batch, 1), (batch,) or one
                    element, or a number; None: 1
    others          every other keyword that has a say: those passed, and those whose default in the installed function
                    is not neutral; name -> value
    machine         of q_rope's device
    malformed       why upstream would not take these arguments, None where it would
    """

    q_rope: Any
    q_nope: Any
    k_cache: Any
    v_cache: Any
    page_table: Any = None
    cache_seqlens: Any = None
    cu_seqlens_q: Any = None
    max_seqlen_q: Any = None
    softmax_scale: Any = None
    causal: Any = False
    out: Any = None
    return_lse: Any = False
    cache_batch_idx: Any = None
    ckv_scale: Any = None
    kpe_scale: Any = None
    others: Mapping[str, Any] = field(default_factory=dict)
    machine: Machine = NOT_CUDA
    malformed: str | None = None

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.q_rope.shape[-2]

    @property
    def max_query(self) -> int:
        """Query tokens of the longest request."""
        return self.q_rope.shape[1] if self.cu_seqlens_q is None else self.max_seqlen_q

    @property
    def rows(self) -> int:
        """Query rows of one KV head: tokens of the longest request times heads."""
        return self.max_query * self.heads

    @property
    def batch(self) -> int:
        """Requests."""
        return self.q_rope.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def capacity(self) -> int:
        """Keys the cache can hold of one request."""
        return self.k_cache.shape[1] * (1 if self.page_table is None else self.page_table.shape[1])

    @property
    def e4m3(self) -> bool:
        """Whether the cache is in float8_e4m3fn."""
        return getattr(self.k_cache, "dtype", None) == torch.float8_e4m3fn

    @property
    def length_bound(self) -> int:
        """No request is longer than this; taken from the host's numbers alone."""
        if type(self.cache_seqlens) is int:
            return self.cache_seqlens
        given = self.others.get("max_seqlen_k")
        return min(given, self.capacity) if type(given) is int else self.capacity

    def describe(self) -> str:
        """Shapes and keywords in one line, for a log."""
        fields = (
            "q_rope",
            "q_nope",
            "k_cache",
            "v_cache",
            "page_table",
            "cache_seqlens",
            "cu_seqlens_q",
            "out",
            "cache_batch_idx",
            "ckv_scale",
            "kpe_scale",
        )
        parts = [f"{name} {_brief(getattr(self, name))}" for name in fields if getattr(self, name) is not None]
        parts += [f"{name}={_brief(value)}" for name, value in self.others.items() if value is not None]
        return ", ".join(parts)


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} {value.device}"
    return repr(value)


class UnknownSignature(TypeError):
    """The installed function does not have the parameters that its interface is known by."""


class Normaliser:
    """Makes `Call`s from the arguments of one installed function."""

    def __init__(
        self,
        function: Callable[..., Any],
        interface: Interface,
        machine: Callable[[torch.device], Machine] = machine_of,
        neutral: Callable[[str, Any], bool] = lambda name, value: True,
    ) -> None:
        """`neutral` tells which defaults need no attention (see `decision.neutral`).

        Raises UnknownSignature where `function` lacks a parameter the interface requires.
        """
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError) as failure:
            raise UnknownSignature(f"its signature cannot be read: {failure}") from None
        lacking = [interface.roles[role] for role in interface.required if interface.roles[role] not in parameters]
        if lacking:
            raise UnknownSignature(f"it has no parameter {', '.join(map(repr, lacking))}")
        by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.positional = tuple(name for name, p in parameters.items() if p.kind in by_position)
        self.interface, self._machine = interface, machine
        present = {role: name for role, name in interface.roles.items() if name in parameters}
        self._core = frozenset(present.values())
        empty = inspect.Parameter.empty
        defaults = {n: p.default for n, p in parameters.items() if p.default is not empty}
        order = (  # Call's fields
            "q_rope", "q_nope", "k_cache", "v_cache", "page_table", "cache_seqlens", "cu_seqlens_q", "max_seqlen_q",
            "softmax_scale", "causal", "out", "return_lse", "cache_batch_idx", "ckv_scale", "kpe_scale",
        )  # fmt: skip
        names = [present.get(role, role) for role in order]
        self._fields = itemgetter(*names)
        self._core_defaults = {name: defaults.get(name) for name in names}
        self._standing = {n: value for n, value in defaults.items() if n not in self._core and not neutral(n, value)}
        self._mandatory = frozenset(n for n, p in parameters.items() if n in self.positional and p.default is empty)
        self.qv_name = interface.roles["q_nope"]
        self.qv_index = self.positional.index(self.qv_name) if self.qv_name in self.positional else len(self.positional)

    def default(self, name: str) -> Any:
        """The default of one of `Call`'s parameters; None where it has none."""
        return self._core_defaults.get(name)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call `function(*args, **kwargs)`. Never raises for what the arguments hold."""
        if args:
            given = dict(zip(self.positional, args, strict=False))
            given.update(kwargs)
        else:
            given = kwargs
        core = self._core
        values = self._fields({**self._core_defaults, **given})
        others = {name: value for name, value in given.items() if name not in core}
        if self._standing:
            others = {**self._standing, **others}
        call = Call(*values, others)  # type: ignore[call-arg]  # mypy cannot count what itemgetter returns
        if len(given) != len(args) + len(kwargs):
            call.malformed = "arguments upstream does not take"
        elif not self._mandatory <= given.keys():
            call.malformed = "a required argument is missing"
        q_rope, q_nope = values[0], values[1]
        if isinstance(q_rope, Tensor):
            call.machine = self._machine(q_rope.device)
            if values[8] is None and isinstance(q_nope, Tensor) and q_rope.dim() and q_nope.dim():
                width = q_rope.shape[-1] + (q_nope.shape[-1] if self.interface.scale_includes_qv else 0)
                call.softmax_scale = width**-0.5 if width else None
        return call
