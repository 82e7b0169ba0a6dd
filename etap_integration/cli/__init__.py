"""The command line: `etap`, or `python -m etap_integration`.

Importing `etap_integration` needs torch alone; what the command line needs beside it is imported here and below.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `etap` script. Without the packages it needs (an installation with --no-deps): exit code 3."""
    try:
        from etap_integration.cli.app import app
    except ModuleNotFoundError as missing:
        print(f"error: the command line needs {missing.name}: pip install {missing.name}", file=sys.stderr)
        sys.exit(3)
    app(prog_name="etap")
