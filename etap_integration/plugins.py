"""Entry points that serving engines load by themselves.

vLLM loads the entry points of the group `vllm.general_plugins` in each of its processes, before it imports a model.
SGLang has no such group: start it with `etap run`.
"""

from __future__ import annotations

import logging
import os

from etap_integration import autostart

log = logging.getLogger("etap_integration.plugins")


def vllm() -> None:
    """vLLM's general plugin `etap`: enables ETAP in `vllm.vllm_flash_attn` where somebody asked for it.

    Asked for is: VLLM_PLUGINS names `etap`, or ETAP_ENABLE is set (0 says no). Merely installing the package changes
    nothing. Loading it again changes nothing. Settings that mean nothing are logged, and vLLM starts without ETAP.
    """
    listed = "etap" in [name.strip() for name in os.environ.get("VLLM_PLUGINS", "").split(",")]
    asked = os.environ.get("ETAP_ENABLE")
    if asked is None and not listed and os.environ.get("ETAP_SHADOW", "") in autostart.OFF:
        log.debug("etap: not enabled; VLLM_PLUGINS=etap or ETAP_ENABLE=1 does that")
        return
    environment = dict(os.environ)
    if listed and asked is None:
        environment["ETAP_ENABLE"] = "vllm.vllm_flash_attn"
    try:
        autostart.install(environment)
    except ValueError as failure:
        log.warning("etap: not enabled: %s", failure)
