"""FlashInfer through its Python wrapper, unpatched and with ETAP's patches, side by side in one process.

Both plan on the host beforehand, as FlashInfer's callers do; timed is `run()`, with all it does on the host and on the
device. Modules are compiled by FlashInfer's JIT at the first plan of a dtype, which takes minutes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from etap_integration.flashinfer import activation, jit, overlay, switch

from .problem import DIM_LATENT, DIM_ROPE, Inputs, Problem
from .providers import Provider, Result, Target
from .rivals import throttle_flashinfer_jit

_FLOAT_BYTES = 256 << 20


class FlashInferWrapper(Provider):
    """`BatchMLAPagedAttentionWrapper(backend="fa3")` of the installed FlashInfer.

    Args:
        target: what the kernels run on. On an emulated H20 FlashInfer's JIT builds throttled modules.
        patched: plan with ETAP's patched module. Each call's preparation proves which module runs.
    """

    def __init__(self, target: Target, patched: bool) -> None:
        root = overlay.installed_root()
        if target.emulated:
            throttle_flashinfer_jit(root / "data")
        from flashinfer.mla import BatchMLAPagedAttentionWrapper

        if overlay.is_patched_in_place(root):
            raise ValueError(f"{root} is patched in place: revert it, there is no unpatched FlashInfer to compare with")
        self.name = "flashinfer-etap" if patched else "flashinfer"
        self.upstream = f"flashinfer-python=={overlay.installed_version(root)}"
        self._wrapper_class, self._patched = BatchMLAPagedAttentionWrapper, patched
        self._throttled = bool(target.emulated)
        self._workspace = torch.empty(_FLOAT_BYTES, dtype=torch.uint8, device="cuda")

    def unsupported(self, problem: Problem) -> str | None:
        return None if problem.kv_dtype in ("bf16", "fp16") else f"takes 16-bit caches, not {problem.kv_dtype}"

    def _plan(self, inputs: Inputs) -> Any:
        p, dtype = inputs.problem, inputs.q_nope.dtype
        tokens = torch.arange(p.batch + 1, dtype=torch.int32) * p.q_len
        (activation.activate if self._patched else activation.deactivate)()
        wrapper = self._wrapper_class(self._workspace, backend="fa3")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the flat form is what every release has
            wrapper.plan(
                tokens, inputs.page_indptr, inputs.page_indices, p.lengths, p.heads, DIM_LATENT, DIM_ROPE,
                p.page_size, p.causal, p.softmax_scale, dtype, dtype,
            )  # fmt: skip
        return wrapper

    def prepare(self, inputs: Inputs) -> Callable[[], Result | None]:
        p = inputs.problem
        latent, rope = inputs.split_caches
        q_nope, q_rope = inputs.q_nope.flatten(0, 1), inputs.q_rope.flatten(0, 1)
        wrapper = self._plan(inputs)
        out = torch.empty_like(q_nope)
        lse = torch.empty(q_nope.shape[:2], dtype=torch.float32, device=out.device)
        result = out.unflatten(0, (p.batch, p.q_len)), lse.unflatten(0, (p.batch, p.q_len)).transpose(1, 2)
        run = wrapper.run

        def call() -> Result:
            run(q_nope, q_rope, latent, rope, out=out, lse=lse, return_lse=True, return_lse_base_on_e=True)
            return result

        self._prove(call)
        if self._throttled:
            _prove_throttled(result[1], inputs)
        return call

    def _prove(self, call: Callable[[], Result]) -> None:
        """Raises RuntimeError unless the call runs in the module that it should."""
        before = {name: module.calls for name, module in switch.status().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            call()
        after = {name: module.calls for name, module in switch.status().items()}
        counted = after != before
        if self._patched and not counted:
            raise RuntimeError(f"the patched module did not run; loaded are {sorted(jit.loaded_libraries())}")
        if not self._patched and counted:
            raise RuntimeError("a patched module ran in the place of the unpatched one")


def _prove_throttled(lse: torch.Tensor, inputs: Inputs) -> None:
    """Raises RuntimeError where the LSE (batch, heads, q_len) is right: throttled kernels add products several times.

    Asked of the last query token of the first request's first head, which sees all of its keys.
    """
    _, exact = next(inputs.reference_chunks(chunk_bytes=1))
    if abs(lse[0, 0, -1].item() - exact[0, 0, -1].item()) < 0.01:
        raise RuntimeError("the module is not throttled: FlashInfer found one that was built before")
