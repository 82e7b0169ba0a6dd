"""Benchmark of the ETAP MLA decode kernel beside the unpatched upstream kernels and the memory floor.

Every time is a median in microseconds with a cold L2 cache, launch included; see `etap_integration.timing`.
Run `python -m tools.bench --help` from the repository root.
"""
