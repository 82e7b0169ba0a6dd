"""ETAP: transposed-pipeline MLA decode attention for Hopper GPUs.

`mla_decode` is the operator, `build_info` says what was built. Both are imported on first use, so that importing the
package costs nothing and needs neither torch nor the built libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etap_integration._library import build_info
    from etap_integration.dispatch import disable, enable, patched, status, supports
    from etap_integration.ops import mla_decode
    from etap_integration.shadowing import shadow
    from etap_integration.tokens import split_token_cache

__version__ = "0.1.0"
__all__ = [
    "__version__", "build_info", "disable", "enable", "mla_decode", "patched", "shadow", "split_token_cache", "status",
    "supports",
]  # fmt: skip

_HOME = {
    "mla_decode": "etap_integration.ops",
    "split_token_cache": "etap_integration.tokens",
    "build_info": "etap_integration._library",
}
_HOME["shadow"] = "etap_integration.shadowing"
_HOME |= dict.fromkeys(("enable", "disable", "patched", "status", "supports"), "etap_integration.dispatch")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
