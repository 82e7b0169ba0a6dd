"""The partition the GPU runs, from the host module that is compiled from the kernel's own headers."""

from __future__ import annotations

from collections import defaultdict
from itertools import accumulate
from types import ModuleType
from typing import NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

TILE = 64
SHORT_SHARE = 32  # tiles: shares up to here may be uneven whatever the limit is
Work = list[list["Piece"]]


class Piece(NamedTuple):
    """A CTA's run of tiles [begin, end) of one row tile of one request; `part` of `num_parts` such runs."""

    request: int
    row_tile: int
    begin: int
    end: int
    num_parts: int
    part: int
    slot: int


@pytest.fixture(scope="session")
def partition(host: ModuleType):
    """The partition as one list of pieces per CTA: the only place that knows the host module's form."""

    def call(
        lengths: list[int], q_lens: list[int] | None, heads: int, row_tile: int, num_ctas: int, uneven: bool = True
    ) -> Work:
        work = host.cta_work(lengths, q_lens, heads, row_tile, num_ctas, uneven)
        return [[Piece(*piece) for piece in pieces] for pieces in work]

    return call


lengths_ = st.one_of(
    st.lists(st.integers(0, 400), max_size=200),
    st.lists(st.sampled_from((0, 1, 63, 64, 65, 128, 4096, 8192)), max_size=64),
    st.lists(st.integers(0, 140_000), min_size=1, max_size=8),
    st.builds(lambda n, length: [length] * n, st.integers(1, 150), st.integers(0, 70_000)),
)


@st.composite
def problems(draw) -> tuple[list[int], list[int] | None, int, int, int, bool]:
    lengths = draw(lengths_)
    q_lens = draw(st.none() | st.lists(st.integers(0, 8), min_size=len(lengths), max_size=len(lengths)))
    heads = draw(st.sampled_from((1, 5, 8, 16, 17, 32, 64, 128)))
    row_tile, num_ctas = draw(st.sampled_from((8, 16, 32, 64))), draw(st.sampled_from((132, 78)) | st.integers(1, 132))
    return lengths, q_lens, heads, row_tile, num_ctas, draw(st.booleans())


def virtual_requests(lengths: list[int], q_lens: list[int] | None, heads: int, row_tile: int) -> dict[tuple, int]:
    """{(request, row tile): tiles} of all that have any."""
    q_lens = q_lens or [1] * len(lengths)
    return {
        (i, row): -(-n // TILE)
        for i, (n, q) in enumerate(zip(lengths, q_lens, strict=True))
        for row in range(-(-q * heads // row_tile))
        if n > 0
    }


def num_ctas_of(tiles: int, requests: int, num_ctas: int) -> int:
    """The CTAs that so many tiles of so many virtual requests are divided over."""
    few = tiles <= 256 or (tiles <= 512 and not 8 <= requests <= 32)
    return min(num_ctas, 64) if few and requests <= 64 else num_ctas


@settings(max_examples=400, deadline=None)
@given(problems())
@example(([], None, 16, 16, 132, True))
@example(([0, 0, 0], None, 16, 16, 132, True))
@example(([64], None, 16, 16, 132, True))
@example(([131072], None, 16, 16, 132, True))
@example(([8192] * 16, None, 16, 16, 132, True))
@example(([100] * 133, None, 128, 64, 132, True))
def test_partition(partition, problem) -> None:
    lengths, q_lens, heads, row_tile, num_ctas, uneven = problem
    work = partition(*problem)
    expected = virtual_requests(lengths, q_lens, heads, row_tile)
    assert len(work) <= num_ctas

    # every tile exactly once, in order
    runs = defaultdict(list)
    for pieces in work:
        for piece in pieces:
            assert piece.begin < piece.end, piece
            runs[piece.request, piece.row_tile].append(piece)
    assert runs.keys() == expected.keys()
    for key, pieces in runs.items():
        pieces.sort(key=lambda p: p.part)
        assert [p.part for p in pieces] == list(range(pieces[0].num_parts)), key
        assert {p.num_parts for p in pieces} == {len(pieces)}
        assert [p.begin for p in pieces] == [0, *(p.end for p in pieces[:-1])] and pieces[-1].end == expected[key]

    # balanced: to one tile, or to an eighth where that saves merges, or (where memory is the limit, or shares are
    # short) to what saves pieces; few tiles over 64 CTAs
    total = sum(expected.values())
    ideal = -(-total // num_ctas_of(total, len(expected), num_ctas))
    loads = [sum(p.end - p.begin for p in pieces) for pieces in work]
    slack, uneven = max(1, ideal // 8), uneven or ideal <= SHORT_SHARE
    assert max(loads, default=0) <= ideal + ((ideal * 5 // 8 + 4 if uneven else slack) if total else 0), (loads, ideal)
    moved = 2 * 3  # a flat share's two cuts
    if uneven and max(loads, default=0) > ideal + slack + moved:  # then every CTA has one piece, or no request is cut
        assert all(len(pieces) <= 1 for pieces in work) or all(p.num_parts == 1 for ps in work for p in ps)

    # partial results: a slot of its own each, and only the first and the last piece of a CTA may be one
    slots = [p.slot for pieces in work for p in pieces if p.num_parts > 1]
    assert len(slots) == len(set(slots)) and all(0 <= s < 2 * num_ctas for s in slots)
    for pieces in work:
        assert all(p.num_parts == 1 for p in pieces[1:-1]), pieces


@settings(deadline=None)
@given(st.integers(1, 132), st.integers(1, 40), st.integers(0, 131))
@example(16, 128, 4)
def test_ctas_without_work_stand_evenly_among_the_others(partition, requests: int, tiles: int, fewer: int) -> None:
    """Any run of CTAs has its share of those that work, to one: neighbours are in one cluster of SMs."""
    num_ctas = max(1, 132 - fewer)
    works = [bool(pieces) for pieces in partition([tiles * TILE] * requests, None, 16, 16, num_ctas)]
    some = sum(works)
    assert some > 0
    ahead = [before * num_ctas - i * some for i, before in enumerate(accumulate(works, initial=0))]  # x num_ctas
    assert max(ahead) - min(ahead) < num_ctas


def test_equal_requests_are_cut_alike(partition) -> None:
    """16 requests on 132 SMs: eight CTAs each, one piece a CTA, shares within a tile of each other."""
    work = [pieces for pieces in partition([65536] * 16, None, 16, 16, 132) if pieces]
    assert all(len(pieces) == 1 for pieces in work)
    loads = {p.end - p.begin for pieces in work for p in pieces}
    assert max(loads) - min(loads) <= 1


@pytest.mark.parametrize(
    ("lengths", "pieces"),
    [([512] * 80, 80), ([2048] * 100, 100), ([128, 1024] * 64, 128), ([512] * 200, 200), ([1024] * 280, 280)],
)
def test_requests_of_some_length_stay_whole(partition, lengths: list[int], pieces: int) -> None:
    """No merge, though CTAs get up to twice what others do: memory is the limit either way; or shares are short."""
    work = partition(lengths, None, 16, 16, 132)
    assert sum(len(w) for w in work) == pieces and all(p.num_parts == 1 for w in work for p in w)
    if sum(-(-n // 64) for n in lengths) <= SHORT_SHARE * 132:
        assert partition(lengths, None, 16, 16, 132, False) == work
    assert sum(len(w) for w in partition([8 * n for n in lengths], None, 16, 16, 132, False)) > pieces


def test_ragged_requests_are_one_piece_a_cta(partition) -> None:
    lengths = [128 + 30 * i for i in range(64)]
    assert max(len(pieces) for pieces in partition(lengths, None, 16, 16, 132)) == 1
    assert partition(lengths, None, 16, 16, 132, False) == partition(lengths, None, 16, 16, 132)
    longer = [8 * n for n in lengths]
    assert max(len(pieces) for pieces in partition(longer, None, 16, 16, 132)) == 1
    assert max(len(pieces) for pieces in partition(longer, None, 16, 16, 132, False)) > 1


@pytest.mark.parametrize("batch", [180, 200, 256])
def test_drawn_lengths_of_more_requests_than_ctas_are_dealt(partition, batch: int) -> None:
    """No merge, one or two requests a CTA, the longer one first, and no share a quarter above the mean."""
    lengths = [512 + 1536 * (37 * i % batch) // batch for i in range(batch)]
    work = partition(lengths, None, 16, 16, 132)
    assert sum(len(w) for w in work) == batch and all(p.num_parts == 1 for w in work for p in w)
    assert {len(w) for w in work} <= {1, 2}
    loads = [sum(p.end - p.begin for p in w) for w in work]
    assert max(loads) <= 1.25 * sum(loads) / 132
    assert all(w[0].end + 2 > w[-1].end for w in work)  # the longer one first, as far as length_bin tells them apart


def test_drawn_lengths_that_are_not_dealt(partition) -> None:
    """Too many requests a CTA, shares too long, several row tiles, or tensor cores as the limit: the line is cut."""
    drawn = [256 + 1792 * (37 * i % 200) // 200 for i in range(200)]
    for lengths, heads, uneven in ((drawn * 2, 16, True), ([8 * n for n in drawn], 16, True), (drawn, 32, True),
                                   ([2 * n for n in drawn], 16, False)):  # fmt: skip
        work = partition(lengths, None, heads, 16, 132, uneven)
        assert any(p.num_parts > 1 for w in work for p in w), (len(lengths), heads, uneven)


@pytest.mark.parametrize("longest", [1, 63, 64, 65, 127, 128, 1000])
def test_flat_cuts_move_to_where_requests_meet(partition, longest: int) -> None:
    """Never further than three tiles from an even share, a merge less for each that moves."""
    lengths = [64 * (1 + (31 * i) % longest) for i in range(400)]
    work = partition(lengths, None, 16, 16, 132)
    loads = [sum(p.end - p.begin for p in w) for w in work]
    assert max(loads) <= -(-sum(loads) // 132) + 6 and min(loads) >= sum(loads) // 132 - 6
    parts, even = (
        sum(p.num_parts > 1 for w in cut for p in w) for cut in (work, partition(lengths, None, 16, 16, 132, False))
    )
    assert parts < even if longest > 1 else parts == even == 0


def test_one_short_request_is_not_split_further_than_its_tiles(partition) -> None:
    work = partition([130], None, 16, 16, 132)
    assert sum(len(pieces) for pieces in work) <= 3


def test_lengths_alone_decide(partition) -> None:
    problem = ([100, 0, 5000, 64], [1, 2, 3, 1], 16, 16, 78)
    assert partition(*problem) == partition(*problem)


def test_kernel_configurations_fit(host: ModuleType) -> None:
    """Every configuration leaves the ring more than a tile and stays inside what sm_90 lets a block have."""
    configs = host.kernel_configs()
    found = {(c["cache"], c["row_tile"], c["p_parts"]) for c in configs}
    tiles = {
        "16-bit": (8, 16, 32, 64), "e4m3": (8, 16, 32), "e4m3 groups": (16, 32), "e4m3 groups, 16-bit rope": (16, 32)
    }  # fmt: skip
    assert found == {(cache, rows, parts) for cache, all_rows in tiles.items() for rows in all_rows for parts in (1, 2)}
    for c in configs:
        assert c["smem_bytes"] <= 227 * 1024, c
        assert c["ring_chunks"] >= 10, c
        assert c["threads"] % 128 == 0, c
        assert c["p_parts"] in (1, 2), c
