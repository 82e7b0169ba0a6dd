"""Published throughput on a real H20, to print beside the emulated one.

FlashMLA-ETAP, arXiv:2506.01969, section 4; as tabulated by the authors in github.com/pengcuo/FlashMLA-ETAP. H20, 16
heads, one query token, fp16, useful TFLOP/s: 2 x batch x length x heads x (576 + 512) over the time.
"""

from __future__ import annotations

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
"""KV lengths of the columns."""

PAPER: dict[int, dict[str, tuple[int, ...]]] = {
    16: {
        "fa3": (10, 15, 19, 16, 17, 17, 17, 17),
        "flashinfer": (8, 16, 20, 23, 18, 19, 18, 18),
        "query-major": (9, 13, 19, 23, 27, 30, 31, 32),
        "published-etap": (13, 21, 34, 46, 61, 75, 85, 89),
    },
    32: {
        "fa3": (15, 20, 18, 19, 20, 21, 21, 21),
        "flashinfer": (16, 20, 23, 22, 23, 23, 23, 23),
        "query-major": (12, 18, 22, 26, 29, 31, 32, 32),
        "published-etap": (20, 32, 43, 59, 73, 83, 87, 87),
    },
}
"""Batch -> implementation -> TFLOP/s at `LENGTHS`; "query-major" is FlashMLA, "published-etap" FlashMLA-ETAP."""
