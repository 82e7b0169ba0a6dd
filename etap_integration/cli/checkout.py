"""The project's own tools, which a checkout has and an installed wheel has not."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from etap_integration.cli.output import MissingError

ROOT = Path(__file__).resolve().parents[2]


def root() -> Path:
    """The checkout that this package lies in. Raises MissingError where it lies in none."""
    if not (ROOT / "tools/bench/__main__.py").is_file():
        raise MissingError("this needs a checkout of the project (tools/bench), not an installed wheel")
    return ROOT


def tool(name: str) -> ModuleType:
    """A module of the checkout: `etap_build`, or a part of `tools.bench` by its short name. Raises MissingError."""
    folder = root()
    place, module = (folder / "tools", name) if name == "etap_build" else (folder, f"tools.bench.{name}")
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))
    return importlib.import_module(module)
