"""``python -m etap_integration.patching``."""

from .cli import app

app(prog_name="python -m etap_integration.patching")
