"""DecodePlanner: after any structural edits its plans are those of `plan_decode`, and it compares only what changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BACKENDS, paged

import ibtpo_kernels as K

PAGE, WIDTH, ROWS = 4, 40, 8


class Branches:
    """A page table under edits, as a scheduler makes them; page ids are never reused, so equal means shared."""

    def __init__(self, planner: K.DecodePlanner) -> None:
        self.planner, self.table = planner, planner.page_table
        self.length = [0] * ROWS
        self.order: list[int] = []
        self.fresh = 0

    def pages(self, row: int) -> int:
        return -(-self.length[row] // PAGE)

    def new_page(self) -> int:
        self.fresh += 1
        return self.fresh

    def fork(self, row: int, of: int, keep: int, place: int) -> None:
        """A branch born in `row`: it shares whole pages with `of`, up to `keep` tokens, and begins one of its own."""
        if row in self.order:
            return
        shared = min(keep, self.length[of]) // PAGE if of in self.order else 0
        self.table[row] = -1
        self.table[row, :shared] = self.table[of, :shared]
        self.length[row] = shared * PAGE
        self.planner.rewrote(row)
        self.order.insert(place % (len(self.order) + 1), row)
        self.grow(row, 1)

    def finish(self, row: int) -> None:
        if row in self.order:
            self.order.remove(row)

    def grow(self, row: int, tokens: int) -> None:
        if row in self.order and self.length[row] + tokens <= WIDTH * PAGE:
            had = self.pages(row)
            self.length[row] += tokens
            for column in range(had, self.pages(row)):
                self.table[row, column] = self.new_page()
                self.planner.extended(row, column)

    def join(self, row: int, of: int) -> None:
        """A row goes on along the next page of another, as a preempted branch does that is filled from the index."""
        column = self.pages(row)
        if row in self.order and of in self.order and column < self.pages(of) and not self.length[row] % PAGE:
            self.table[row, column] = self.table[of, column]
            self.planner.extended(row, column)
            self.length[row] += 1

    def move(self, row: int, column: int) -> None:
        """A page copied to another place, for this path only."""
        if row in self.order and column < self.pages(row):
            self.table[row, column] = self.new_page()
            self.planner.rewrote(row)

    def prefill(self, row: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, lengths) of a step: every branch once, one of them with a chunk of its last tokens."""
        rows, lengths = [], []
        for r in self.order:
            chunk = min(count, self.length[r]) if r == row else 1
            rows += [r] * chunk
            lengths += range(self.length[r] - chunk + 1, self.length[r] + 1)
        return torch.tensor(rows, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)


def row_and(*more: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(st.integers(0, ROWS - 1), *more)


EDITS = st.one_of(
    st.tuples(st.just("fork"), row_and(st.integers(0, ROWS - 1), st.integers(0, 150), st.integers(0, ROWS))),
    st.tuples(st.just("grow"), row_and(st.integers(1, 60))),
    st.tuples(st.just("finish"), row_and()),
    st.tuples(st.just("join"), row_and(st.integers(0, ROWS - 1))),
    st.tuples(st.just("move"), row_and(st.integers(0, 12))),
)


@pytest.mark.parametrize("device", [None, "cpu"], ids=["in-place", "copy"])
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=150)
@given(steps=st.lists(st.tuples(st.lists(EDITS, max_size=4), row_and(st.integers(1, 9))), max_size=14))
def test_plans_equal_those_made_from_scratch(
    backend: str, device: str | None, steps: list[tuple[list[tuple[str, tuple[int, ...]]], tuple[int, ...]]]
) -> None:
    table = torch.full((ROWS, WIDTH), -1, dtype=torch.int32)
    branches = Branches(K.DecodePlanner(table, page_size=PAGE, device=device))
    branches.fork(0, 0, 0, 0)
    branches.grow(0, 90)
    with K.backend(backend):
        for edits, chunk in steps:
            for name, arguments in edits:
                getattr(branches, name)(*arguments)
            rows, lengths = branches.prefill(*chunk)
            plan = branches.planner.plan(rows, lengths)
            assert torch.equal(plan.items, K.plan_decode(table, rows, lengths, page_size=PAGE).items)
            assert torch.equal(plan.page_table, table), "the copy has every page that was written"


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_changed_is_compared(backend: str) -> None:
    """Pages swapped behind the planner's back go unnoticed, until it is told, and then only where it is told."""
    table, rows, lengths, _ = paged([160] * 6, [0] + [9] * 5, 16)
    with K.backend(backend):
        planner = K.DecodePlanner(table)
        before = planner.plan(rows, lengths).items
        table[1, 3] = table[4, 3] = 999
        assert torch.equal(planner.plan(rows, lengths).items, before)
        planner.rewrote(1)
        told = planner.plan(rows, lengths).items.tolist()
        assert [2, 6, 3, 9] in told and [0, 6, 0, 3] in told, "row 1 parts from its neighbours after three pages"
        planner.rewrote(4)
        assert torch.equal(planner.plan(rows, lengths).items, K.plan_decode(table, rows, lengths).items)


def test_a_path_that_grows_is_compared_on() -> None:
    """Neighbours that were equal as far as the shorter went share the page that both got since."""
    table, rows, lengths, _ = paged([32, 32], [0, 2], 16)
    planner = K.DecodePlanner(table)
    assert [0, 2, 0, 2] in planner.plan(rows, lengths).items.tolist()
    table[:, 2], lengths[:] = 77, 40
    assert [0, 2, 0, 3] in planner.plan(rows, lengths).items.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_on_the_copy(backend: str) -> None:
    """Lengths bumped and a page added between structural events: the same plan, the same result as a new one."""
    table, rows, lengths, num_pages = paged([30, 20], [0, 1], 16, spare=3)
    pages, q = torch.randn(2, num_pages + 1, 16, 2, 16), torch.randn(2, 2, 16)
    with K.backend(backend):
        planner = K.DecodePlanner(table, device="cpu")
        plan = planner.plan(rows, lengths)
        assert plan.on_host is not None and torch.equal(plan.on_host[1], lengths)
        for _ in range(12):
            plan.lengths.add_(1)
        table[0, 2] = num_pages
        with pytest.raises(ValueError, match="needs a page that table row 0 lacks"):
            K.tree_decode(q, *pages, plan)
        planner.extended(0, 2)
        planner.upload()
        fresh = K.plan_decode(table, rows, lengths + 12)
        assert torch.equal(K.tree_decode(q, *pages, plan), K.tree_decode(q, *pages, fresh))


def test_the_copy_is_the_table_after_every_upload() -> None:
    """Of rows, cells, both and none: what else was written stays where it is."""
    draw = np.random.default_rng(0)
    table = torch.from_numpy(draw.integers(0, 99, (7, 5), np.int32))
    planner, wanted = K.DecodePlanner(table, device="cpu"), table.clone()
    for rows, cells in (((), ()), ((6, 0, 3), ()), ((), ((5, 4), (1, 0))), ((2,), ((2, 1), (4, 3))), ((), ())):
        table[:] = torch.from_numpy(draw.integers(0, 99, (7, 5), np.int32))
        for row in rows:
            wanted[row] = table[row]
            planner.rewrote(row)
        for row, column in cells:
            wanted[row, column] = table[row, column]
            planner.extended(row, column)
        planner.upload()
        assert torch.equal(planner.table, wanted)


def test_errors_name_the_remedy() -> None:
    table, zero = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="page_table is torch.int64"):
        K.DecodePlanner(table.long())
    with pytest.raises(ValueError, match="a table on the CPU; name the GPU as device="):
        K.DecodePlanner(table.to("meta"))
    with pytest.raises(ValueError, match="page_size=0"):
        K.DecodePlanner(table, page_size=0)
    planner = K.DecodePlanner(table)
    for row in (-1, 2):
        with pytest.raises(ValueError, match=f"row {row} is outside of the page table"):
            planner.rewrote(row)
    with pytest.raises(ValueError, match="column 3 is outside of the page table"):
        planner.extended(0, 3)
    with pytest.raises(ValueError, match="plan_decode: .*length"):
        planner.plan(zero, zero + 49)
    with pytest.raises(ValueError, match="plan_decode: .*row"):
        planner.plan(zero + 2, zero)
    assert planner.plan(zero[:0], zero[:0]).items.shape == (0, 4)
