"""The kernels that a benchmark times, behind one interface: `prepare(inputs)` gives a call that runs one decode step.

Preparation is untimed. What serving engines do once per step on the host stays outside too (FlashInfer's plan), what
runs on the device inside the call is timed (FlashAttention-3's scheduling and combine kernels). Each kernel writes its
output and its LSE.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .problem import DIM_LATENT, Inputs, Problem
from .rivals import FA3_ETAP_NAMESPACE, FLASHINFER_REQUIREMENT, H20_SMS, XFORMERS_REQUIREMENT, library_name

Result = tuple[torch.Tensor, torch.Tensor]
"""Output (batch, q_len, heads, 512) and natural-log LSE (batch, heads, q_len)."""

AUTO = 0
"""For a setting of the ETAP operator: as `etap_integration.mla_decode` has it by default."""


@dataclass(frozen=True)
class Target:
    """What the kernels run on.

    Attributes:
        emulated: None for the GPU as it is; `h20` for kernels built with throttled wgmma that use 78 SMs.
        device_sms: streaming multiprocessors of the GPU at hand.
    """

    emulated: str | None
    device_sms: int

    @property
    def sms(self) -> int:
        """Streaming multiprocessors that a kernel may use."""
        return H20_SMS if self.emulated == "h20" else self.device_sms


class Provider(ABC):
    """One implementation.

    Attributes:
        name: value of `impl` in the recorded rows.
        upstream: the package and version that the kernel comes from, None for our own.
    """

    name: str
    upstream: str | None = None

    def unsupported(self, problem: Problem) -> str | None:
        """Why this implementation cannot run `problem`, or None where it can."""
        return None

    @abstractmethod
    def prepare(self, inputs: Inputs) -> Callable[[], Result | None]:
        """Returns a call that runs one decode step on the current stream and keeps what it needs alive.

        The call returns its result, or None where it computes none (the floor).
        """


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def _check(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"{what} failed with CUDA error {code}")


def _load(path: Path) -> ctypes.CDLL:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.name} is missing from the rivals' folder; run `python -m tools.bench build-rivals`"
        )
    ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path.resolve()))


class Floor(Provider):
    """Streams the problem's KV bytes through bulk copies, one CTA per SM: the time that no kernel can beat."""

    name = "floor"
    _STAGES = 16  # 8 KB copies in flight in each CTA

    def __init__(self, rivals: Path, target: Target) -> None:
        self._library = _load(rivals / library_name("floor"))
        self._ctas = target.sms

    def prepare(self, inputs: Inputs) -> Callable[[], Result | None]:
        source, size = _pointer(inputs.pool.rows), ctypes.c_size_t(inputs.problem.kv_bytes)

        def call(keep: object = inputs) -> None:
            _check(self._library.mb_rdbulk(source, size, self._ctas, self._STAGES, _stream()), "mb_rdbulk")

        return call


class FlashAttention3(Provider):
    """FlashAttention-3's forward operator, with the heuristics that it ships with; caches as two contiguous tensors."""

    name = "fa3"
    upstream = XFORMERS_REQUIREMENT
    namespace = "flash_attn_3"

    def __init__(self, rivals: Path, target: Target) -> None:
        self.path = (rivals / library_name(self.name, target.emulated)).resolve()
        if not self.path.is_file():
            raise FileNotFoundError(
                f"{self.path.name} is missing; run `python -m tools.bench build-rivals {self.name}`"
            )
        torch.ops.load_library(str(self.path))
        self._sm_margin = target.device_sms - target.sms

    def unsupported(self, problem: Problem) -> str | None:
        return None if problem.kv_dtype == "bf16" else f"built for bf16 only, not {problem.kv_dtype}"

    def prepare(self, inputs: Inputs) -> Callable[[], Result | None]:
        p = inputs.problem
        latent, rope = (cache.unsqueeze(2) for cache in inputs.split_caches)
        out = torch.empty_like(inputs.q_nope)
        arguments = {
            "q": inputs.q_rope, "k": rope, "v": latent, "q_v": inputs.q_nope, "out": out,
            "page_table": inputs.page_table, "seqused_k": inputs.cache_seqlens, "softmax_scale": p.softmax_scale,
            "is_causal": p.causal, "is_rotary_interleaved": True, "num_splits": 0, "sm_margin": self._sm_margin,
        }  # fmt: skip
        forward = getattr(torch.ops, self.namespace).fwd.default

        def call() -> Result:
            result, lse, *_ = forward(**arguments)
            return result, lse

        return call


class PatchedFlashAttention3(FlashAttention3):
    """The same call of the same library, but with ETAP's patch in it, which takes what it can."""

    name = "fa3-etap"
    namespace = FA3_ETAP_NAMESPACE

    def __init__(self, rivals: Path, target: Target) -> None:
        super().__init__(rivals, target)
        etap = ctypes.CDLL(str(self.path))
        etap.etap_fa3_set_mode(0)  # auto, whatever the environment says, with its measured rules
        etap.etap_fa3_set_p_parts(1 if target.emulated else 0)


class FlashInfer(Provider):
    """FlashInfer's Hopper MLA kernel (`backend="fa3"`), planned on the host beforehand."""

    name = "flashinfer"
    upstream = FLASHINFER_REQUIREMENT
    _FLOAT_BYTES, _INT_BYTES = 256 << 20, 16 << 20  # workspaces, as the wrapper's documentation sizes them or larger

    def __init__(self, rivals: Path, target: Target) -> None:
        self._rivals, self._target = rivals, target
        self._libraries: dict[str, ctypes.CDLL] = {}
        self._float_workspace = torch.empty(self._FLOAT_BYTES, dtype=torch.uint8, device="cuda")
        self._int_workspace = torch.empty(self._INT_BYTES, dtype=torch.uint8, device="cuda")
        self._host_workspace = torch.empty(self._INT_BYTES, dtype=torch.uint8).pin_memory()

    def unsupported(self, problem: Problem) -> str | None:
        return None if problem.kv_dtype in ("bf16", "e4m3") else f"built for bf16 and e4m3, not {problem.kv_dtype}"

    def _library(self, kv_dtype: str) -> ctypes.CDLL:
        kind = "flashinfer-e4m3" if kv_dtype == "e4m3" else "flashinfer"
        if kind not in self._libraries:
            self._libraries[kind] = _load(self._rivals / library_name(kind, self._target.emulated))
        return self._libraries[kind]

    def _plan(self, library: ctypes.CDLL, inputs: Inputs) -> None:
        """Plans the work split; a library holds one plan, so each problem is planned right before its calls."""
        p = inputs.problem
        tokens = torch.arange(p.batch + 1, dtype=torch.int32) * p.q_len
        torch.cuda.synchronize()  # the workspaces may still be read
        code = library.fi_plan(
            _pointer(self._float_workspace), ctypes.c_size_t(self._FLOAT_BYTES),
            _pointer(self._int_workspace), _pointer(self._host_workspace), ctypes.c_size_t(self._INT_BYTES),
            _pointer(tokens), _pointer(inputs.page_indptr), _pointer(p.lengths), p.batch, p.heads, int(p.causal),
            _stream(),
        )  # fmt: skip
        _check(code, "FlashInfer's plan")
        torch.cuda.synchronize()

    def prepare(self, inputs: Inputs) -> Callable[[], Result | None]:
        p = inputs.problem
        library = self._library(p.kv_dtype)
        self._plan(library, inputs)
        latent, rope = inputs.split_caches
        indices = inputs.page_indices
        out = torch.empty_like(inputs.q_nope)
        lse = torch.empty(p.batch, p.q_len, p.heads, dtype=torch.float32, device=out.device)
        result = out, lse.transpose(1, 2)
        arguments = (
            *map(_pointer, (self._float_workspace, self._int_workspace, inputs.q_nope, inputs.q_rope)),
            *map(_pointer, (latent, rope, indices, out, lse)),
            p.heads, p.page_size, ctypes.c_float(p.softmax_scale), int(p.causal),
        )  # fmt: skip

        def call(keep: object = (inputs, latent, rope, indices)) -> Result:
            _check(library.fi_run(*arguments, _stream()), "FlashInfer's kernel")
            return result

        return call


class Etap(Provider):
    """Our operator, from the library given; caches as two views of one 576-wide buffer unless `split` is set.

    Args:
        library: shared library that registers `torch.ops.etap.mla_decode`. A process can hold one.
        target: what the kernel runs on.
        split: pass the caches as two contiguous tensors.
        num_ctas: CTAs to use; by default all SMs, and on an emulated H20 its 78.
        p_parts: 16-bit parts that P is split into; by default what the operator has on the GPU at hand, and 1 on an
            emulated H20.
    """

    name = "etap"

    def __init__(
        self, library: Path, target: Target, *, split: bool = False, num_ctas: int = AUTO, p_parts: int = AUTO
    ) -> None:
        if not library.is_file():
            raise FileNotFoundError(f"{library} does not exist; build the extension or pass --library")
        torch.ops.load_library(str(library.resolve()))
        self._split = split
        self._num_ctas = num_ctas or (target.sms if target.emulated else 0)
        self._p_parts = p_parts
        self._emulated = bool(target.emulated)

    def prepare(self, inputs: Inputs) -> Callable[[], Result | None]:
        p = inputs.problem
        p_parts = self._p_parts or (1 if self._emulated else AUTO)
        latent, rope, scales = inputs.fused_caches
        if self._split:
            latent, rope = inputs.split_caches
        out = torch.empty(p.batch, p.q_len, p.heads, DIM_LATENT, dtype=inputs.q_nope.dtype, device=latent.device)
        lse = torch.empty(p.batch, p.heads, p.q_len, dtype=torch.float32, device=latent.device)
        result = out, lse
        arguments = (
            inputs.q_nope, inputs.q_rope, latent, rope, inputs.page_table, inputs.cache_seqlens, None, p.q_len,
            p.softmax_scale, p.causal, out, lse, self._num_ctas, p_parts,
        )  # fmt: skip
        decode = torch.ops.etap.mla_decode.default

        def call() -> Result:
            decode(*arguments, ckv_scale_arr=scales)
            return result

        return call


@dataclass(frozen=True)
class Errors:
    """Distance of a result from the fp64 reference: root mean square and largest absolute difference."""

    rmse: float
    max_error: float
    lse_rmse: float
    lse_max_error: float

    @classmethod
    def between(cls, result: Result, exact: Result) -> Errors:
        """Compares output and LSE; raises ArithmeticError where the result is not finite."""
        figures = []
        for name, ours, reference in zip(("output", "LSE"), result, exact, strict=True):
            if ours.shape != reference.shape:
                raise ValueError(f"{name} has shape {tuple(ours.shape)}, expected {tuple(reference.shape)}")
            difference = ours.double() - reference
            if not bool(difference.isfinite().all()):
                raise ArithmeticError(f"{name} holds values that are not finite")
            figures += [difference.square().mean().sqrt().item(), difference.abs().max().item()]
        return cls(*figures)


def disagreement(one: Result, other: Result) -> float:
    """Root mean square of the difference of two outputs over that of the second: a check without a reference."""
    difference, scale = (one[0].float() - other[0].float()).square().mean(), other[0].float().square().mean()
    return (difference / scale).sqrt().item()
