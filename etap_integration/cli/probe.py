"""`python -m etap_integration.cli.probe TARGET`: imports one target and tries to patch it, in a process of its own.

A broken installation may crash the interpreter; then it crashes this one, and `etap doctor` reports it. Prints one JSON
object: bindings, note, and where the module lies.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def probe(name: str) -> dict[str, Any]:
    """Patches the target `name` for a moment: {"patchable", "bindings", "note", "file"}."""
    from etap_integration import dispatch

    try:
        with dispatch.patched(name, operator=lambda *args, **kwargs: None):
            found = dispatch.status().targets[name]
    except dispatch.TargetError as failure:
        return {"patchable": False, "bindings": [], "note": str(failure), "file": None}
    file = getattr(sys.modules[name], "__file__", None)
    return {"patchable": True, "bindings": list(found.bindings), "note": found.note, "file": file}


if __name__ == "__main__":
    answer = json.dumps(probe(sys.argv[1]))
    print("\n" + answer)  # on a line of its own, after whatever the import printed
