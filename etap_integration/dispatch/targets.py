"""The upstream functions that can be routed, and finding them in what is installed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from etap_integration.dispatch.calls import FA3_VARLEN, KVCACHE, SGL_VARLEN, VLLM_VARLEN, Interface


class TargetError(ImportError):
    """A target that was asked for by name cannot be patched: not installed, broken, or not as we know it."""


@dataclass(frozen=True)
class Target:
    """A module to patch. `required` names the function without which there is nothing to do there."""

    module: str
    functions: Mapping[str, Interface]
    required: str
    package: str

    def load(self) -> ModuleType:
        """The module, imported. Raises TargetError, saying what to install or what went wrong."""
        try:
            module = import_module(self.module)
        except ModuleNotFoundError as failure:
            if failure.name is not None and (self.module + ".").startswith(failure.name + "."):
                raise TargetError(f"{self.module} is not installed; it comes with {self.package}") from failure
            raise TargetError(f"{self.module} cannot be imported: {failure}") from failure
        except Exception as failure:  # an extension that fails to load may raise anything
            raise TargetError(f"{self.module} cannot be imported: {type(failure).__name__}: {failure}") from failure
        if not callable(getattr(module, self.required, None)):
            alike = sorted(n for n, x in vars(module).items() if n.startswith("flash_attn") and callable(x))
            there = f"it has {', '.join(alike)}" if alike else "nor anything named flash_attn*"
            raise TargetError(
                f"{self.module} has no function {self.required} ({there}): this release of {self.package} is not one "
                "that etap_integration knows"
            )
        return module


TARGETS: dict[str, Target] = {
    target.module: target
    for target in (
        Target(
            "flash_attn_interface",
            {"flash_attn_with_kvcache": KVCACHE, "flash_attn_varlen_func": FA3_VARLEN},
            required="flash_attn_with_kvcache",
            package="FlashAttention-3 (the hopper/ directory of flash-attention)",
        ),
        Target(
            "sgl_kernel.flash_attn",
            {"flash_attn_with_kvcache": KVCACHE, "flash_attn_varlen_func": SGL_VARLEN},
            required="flash_attn_with_kvcache",
            package="sgl-kernel, SGLang's kernels",
        ),
        Target(
            "vllm.vllm_flash_attn",
            {"flash_attn_varlen_func": VLLM_VARLEN, "flash_attn_with_kvcache": KVCACHE},
            required="flash_attn_varlen_func",
            package="vLLM",
        ),
    )
}
