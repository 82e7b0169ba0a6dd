"""The named grids and the targets they serve."""

from dataclasses import replace

import pytest

from tools.bench import grid
from tools.bench.bars import BARS, Bar, Quantity
from tools.bench.grid import GRAPH, Cell, K
from tools.bench.problem import Problem

POWERS = [512, 1 * K, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K]


def test_bars_hold_the_cells_that_targets_name():
    cells = set(grid.named("bars").cells)
    expected = {Cell(Problem(16, kv_len)) for kv_len in POWERS}
    expected |= {Cell(Problem(16, kv_len, page_size=1)) for kv_len in (4 * K, 16 * K, 64 * K)}
    expected |= {Cell(Problem(batch, 2 * K, page_size=1)) for batch in (64, 128)}
    expected |= {Cell(Problem(1, kv_len), GRAPH) for kv_len in (2 * K, 8 * K, 32 * K, 128 * K)}
    assert cells == expected


@pytest.mark.parametrize("bar", BARS, ids=str)
def test_every_target_has_a_cell_in_a_grid(bar):
    grids = [grid.named(name) for name in grid.GRIDS]
    assert any(Cell(bar.problem, bar.mode) in g.cells for g in grids if g.emulated == bar.emulated)
    assert bar.reached(bar.goal, bar.limit), "a goal lies beyond its limit"


def test_full_grid_covers_the_wide_comparison():
    cells = grid.named("full").cells
    problems = [cell.problem for cell in cells]
    assert len(set(cells)) == len(cells)
    assert {p.batch for p in problems} == {1, 4, 16, 64, 128}
    assert {p.heads for p in problems} == {8, 16, 32}
    assert {p.q_len for p in problems} == {1, 2, 4}
    assert {p.kv_len for p in problems} == {*POWERS, 128 * K}
    assert max(p.rows for p in problems) <= grid.MAX_ROWS
    shapes = {(p.batch, p.heads, p.q_len) for p in problems}
    assert len(shapes) == 5 * 8, "every batch with every heads and q_len of at most 64 rows"
    for shape in shapes:
        lengths = [p.kv_len for p in problems if (p.batch, p.heads, p.q_len) == shape]
        assert min(lengths) == 512
        assert max(lengths) == 128 * K


def test_full_grid_begins_with_what_matters_most():
    problems = [cell.problem for cell in grid.named("full").cells]
    plain = [(p.heads, p.q_len) == (16, 1) for p in problems]
    assert plain == sorted(plain, reverse=True), "plain decoding first"
    assert {p.batch for p in problems[:9]} == {16}
    rows = [p.rows for p in problems[sum(plain) :]]
    assert rows == sorted(rows), "the widest, which are upstream's, last"


def test_h20_grid_is_emulated():
    h20 = grid.named("h20")
    assert h20.emulated == "h20"
    assert {cell.problem for cell in h20.cells} == {Problem(b, kv_len) for b in (16, 32) for kv_len in POWERS}
    assert grid.named("bars").emulated is None
    assert grid.named("full").emulated is None


def test_cells_that_do_not_fit_are_left_out():
    full = grid.named("full")
    limit = 10 << 30
    fitting = full.fitting(limit)
    assert 0 < len(fitting.cells) < len(full.cells)
    assert all((cell.problem.memory_bytes <= limit) == (cell in fitting.cells) for cell in full.cells)


def test_cells_are_chosen_by_their_words():
    bars = grid.named("bars")
    assert bars.matching([]) == bars
    chosen = bars.matching(["b=16 kv=512", "graph kv=8192"])
    assert set(chosen.cells) == {Cell(Problem(16, 512)), Cell(Problem(1, 8 * K), GRAPH)}
    assert len(bars.matching(["b=1"]).cells) == 4, "b=1 is not b=16"
    with pytest.raises(ValueError, match="b=16 kv=512"):
        bars.matching(["b=17"])


def test_an_unknown_grid_lists_the_known_ones():
    with pytest.raises(ValueError, match="bars, full, h20"):
        grid.named("half")


def test_quantities_and_their_bounds():
    medians = {"floor": 10.0, "fa3": 30.0, "flashinfer": 24.0, "etap": 12.0}
    values = {quantity: quantity.of(medians, "etap") for quantity in Quantity}
    assert values == {
        Quantity.FLOOR_MULTIPLE: pytest.approx(1.2),
        Quantity.TIME: 12.0,
        Quantity.OVER_FA3: pytest.approx(2.5),
        Quantity.OVER_FLASHINFER: pytest.approx(2.0),
    }
    assert Quantity.FLOOR_MULTIPLE.of({"etap": 12.0}, "etap") is None
    assert Quantity.TIME.of({"floor": 12.0}, "etap") is None
    at_most = Bar(Problem(1, 512), Quantity.TIME, 14.0, 10.0)
    assert at_most.reached(14.0, at_most.limit)
    assert not at_most.reached(14.1, at_most.limit)
    at_least = Bar(Problem(1, 512), Quantity.OVER_FA3, 6.0, 6.5)
    assert at_least.reached(6.0, at_least.limit)
    assert not at_least.reached(5.9, at_least.limit)


def test_warm_grid_has_the_lengths_of_one_request_in_bars():
    bars = {cell.problem for cell in grid.named("bars").cells if cell.mode == GRAPH}
    assert {cell.problem for cell in grid.named("warm").cells} == bars
    assert {cell.mode for cell in grid.named("warm").cells} == {grid.WARM_GRAPH}


def test_ragged_grid_draws_lengths_for_every_batch():
    problems = [cell.problem for cell in grid.named("ragged").cells]
    assert len(set(problems)) == len(problems)
    for p in problems:
        assert p.shortest * 8 == p.kv_len
        assert len(set(p.lengths.tolist())) > p.batch // 2, "lengths differ"


def test_tokens_of_656_bytes_have_an_e4m3_cell_each():
    cells = [cell.problem for cell in grid.named("fp8_ds_mla").cells]
    tokens = [p for p in cells if p.kv_dtype == "fp8_ds_mla"]
    assert [replace(p, kv_dtype="e4m3") for p in tokens] == [p for p in cells if p.kv_dtype == "e4m3"]
    assert {p.heads for p in tokens} == {8, 16, 32}


def test_e4m3_grid_has_a_bf16_cell_for_each():
    cells = grid.named("e4m3").cells
    e4m3 = [cell.problem for cell in cells if cell.problem.kv_dtype == "e4m3"]
    assert [replace(p, kv_dtype="bf16") for p in e4m3] == [c.problem for c in cells if c.problem.kv_dtype == "bf16"]
    assert {p.kv_len for p in e4m3 if p.page_size == 64} == {n for n in POWERS if n >= 2 * K}
