"""Put first on PYTHONPATH by `etap run`: every Python process started below it enables ETAP, then goes on as usual.

Python imports one `sitecustomize` at start; the one that this file hides is run from here.
"""

import importlib.machinery
import importlib.util
import os
import sys


def _hidden() -> None:
    """Runs the sitecustomize that would have been imported without this one."""
    here = os.path.dirname(os.path.abspath(__file__))
    elsewhere = [p for p in sys.path if os.path.abspath(p or os.curdir) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


def _enable() -> None:
    try:
        from etap_integration import autostart

        autostart.install()
    except Exception as failure:  # whatever is wrong, the program has to start
        print(f"etap: not enabled in process {os.getpid()}: {failure}", file=sys.stderr)


_hidden()
_enable()
