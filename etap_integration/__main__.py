"""`python -m etap_integration`: the `etap` command; without arguments, its `overview`."""

import sys

from etap_integration.cli import main

if __name__ == "__main__":
    if len(sys.argv) == 1 or sys.argv[1] in ("--offline", "--json"):
        sys.argv.insert(1, "overview")
    main()
