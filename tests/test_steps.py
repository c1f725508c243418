"""Step boundaries are decided on token ids, whatever the tokenizer merged or split."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import fill

from ibtpo.config import SearchConfig
from ibtpo.steps import StepSplitter, split_steps, step_splitter
from ibtpo_engine.tree import Tree


class PieceTokenizer:
    """Decodes ids as the pieces of a list; like sentencepiece it drops a leading space of the first token."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces
        self.calls = 0

    def decode(self, token_ids: list[int], /, **options: object) -> str:
        self.calls += 1
        return "".join(self.pieces[token] for token in token_ids).removeprefix(" ")

    def encode(self, pieces: list[str]) -> list[int]:
        return [self.pieces.index(piece) for piece in pieces]


PIECES = ["a", " b", "\n", "\n\n", ".\n\n", "\n\n\n\n", "\n\nHence", "x\n", "\nso", "</step>", "<", "/step", ">", ""]
TOKENIZER = PieceTokenizer(PIECES)


def offsets(pieces: list[str], context: list[str] | None = None, separator: str = "\n\n") -> list[int]:
    return StepSplitter(TOKENIZER, separator)(TOKENIZER.encode(pieces), TOKENIZER.encode(context or []))


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["a", ".\n\n", "a", "\n", "\nso", " b"], [2, 5]),  # the example of the module's docstring
        (["a", "\n\nHence", " b"], [2]),  # text past the separator stays in the token's step
        (["a", "\n", "\n", "a"], [3]),  # a separator over two tokens
        (["a", "\n", "a", "\n", "a"], []),
        (["a", "\n\n\n\n", "a"], [2]),  # a run is one boundary in one token, ...
        (["a", "\n\n", "\n\n", "a"], [2]),  # ... in two: the rest opens the next step, ...
        (["a", "\n", "\n", "\n", "\n", "\n", "a"], [3]),  # ... and in five
        (["a", "\n\n", "a", "\n\n", "a"], [2, 4]),
        (["a", ".\n\n"], []),  # a boundary at the very end makes no empty node
        (["a", "x\n", "", "\nso", "a"], [4]),  # tokens without text do not hide a separator
        ([], []),
    ],
)
def test_a_step_ends_with_the_token_that_completes_the_separator(pieces, expected):
    assert offsets(pieces) == expected


def test_a_separator_begun_before_the_branch_is_seen():
    assert offsets(["\nso", "a"], context=["a", "x\n"]) == [1]
    assert offsets(["\nso", "a"], context=["a"]) == []
    assert offsets(["\n\n", "a"], context=["a", "\n\n"]) == []  # continues a run that ended a step already
    assert offsets(["\n", "a", "\n\n", "a"], context=["a", "\n\n"]) == [3]


def test_any_separator_and_one_decoded_text_a_token():
    assert offsets(["a", "<", "/step", ">", "a", "</step>", "a"], separator="</step>") == [4, 6]
    assert offsets(["a", "</step>", "</step>", "a", "</step>", "a"], separator="</step>") == [2, 5]  # those that touch
    assert offsets(["a", " b", "a"], separator=" b") == [2]  # the space of a token in the middle of a text counts
    splitter = StepSplitter(tokenizer := PieceTokenizer(PIECES), "\n\n")
    splitter([0, 3, 0, 3] * 100)
    assert tokenizer.calls == 4  # two ids, each decoded alone and after itself


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(TOKENIZER.encode(["a", "\n", "\n\n", ".\n\n", "\nso"])), max_size=12), st.integers(0, 12)
)
def test_splitting_a_branch_equals_splitting_the_whole_path(tokens, cut):
    """What a boundary is does not depend on where a fork divided the path."""
    cut = min(cut, len(tokens))
    splitter = StepSplitter(TOKENIZER, "\n\n")
    whole = splitter(tokens)
    below = splitter(tokens[cut:], tokens[max(0, cut - splitter.context) : cut])
    assert below == [at - cut for at in whole if at > cut]


def test_fixed_length_steps():
    assert StepSplitter(TOKENIZER, step_tokens=3)(np.arange(7)) == [3, 6]
    assert StepSplitter(TOKENIZER, step_tokens=3)(np.arange(6)) == [3]


@pytest.mark.parametrize("options", [{"separator": ""}, {"step_tokens": 0}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        StepSplitter(TOKENIZER, **options)


def test_split_steps_cuts_a_branch_top_down_and_keeps_the_leaf():
    tree = Tree(TOKENIZER.encode(["a", "x\n"]))
    leaf = fill(tree.root.fork()[0], TOKENIZER.encode(["\nso", "a", "\n\n", " b", "\n\n"]), reward=1.0)
    steps = split_steps(leaf, StepSplitter(TOKENIZER, "\n\n"))
    assert [len(step) for step in steps] == [1, 2, 2]
    assert steps[-1] is leaf and leaf.is_leaf and leaf.reward == 1.0
    assert leaf.path() == [tree.root, *steps]
    assert not any(step.is_leaf for step in steps[:-1])


def test_a_separator_may_begin_several_nodes_above_the_branch():
    tree = Tree(TOKENIZER.encode(["a", "<"]))
    middle = fill(tree.root.fork()[0], TOKENIZER.encode(["/step"]))
    leaf = fill(middle.fork()[0], TOKENIZER.encode([">", "a", "a"]), reward=1.0)
    assert [len(step) for step in split_steps(leaf, StepSplitter(TOKENIZER, "</step>"))] == [1, 2]


def test_a_search_is_given_the_splitter_of_its_settings():
    splitter = step_splitter(TOKENIZER, SearchConfig(separator=" b", boundary_noise=0.5))
    assert (splitter.separator, splitter.step_tokens, splitter.noise) == (" b", None, 0.5)
    assert step_splitter(TOKENIZER, SearchConfig(step_tokens=3)).step_tokens == 3


def test_a_predicate_works_in_place_of_a_splitter_and_is_checked():
    leaf = fill(Tree([0]).root.fork()[0], range(6), reward=0.0)
    assert [len(step) for step in split_steps(leaf, lambda tokens: np.flatnonzero(tokens == 2) + 1)] == [3, 3]
    for wrong in ([0], [6], [2, 2], [3, 1]):
        leaf = fill(Tree([0]).root.fork()[0], range(6), reward=0.0)
        with pytest.raises(ValueError, match="splitter: offsets"):
            split_steps(leaf, lambda tokens, wrong=wrong: wrong)


def test_noise_moves_that_share_of_the_boundaries() -> None:
    """Every third token ends a step; the moved ones stay between their neighbours and are the same each time."""
    exact, tokens = list(range(3, 3000, 3)), list(range(3000))
    splitter = StepSplitter(PieceTokenizer([]), step_tokens=3, noise=0.3)
    moved = splitter(tokens)
    assert moved == splitter(tokens)
    assert len(moved) == len(exact)
    assert all(a < b for a, b in pairwise([0, *moved, 3000]))
    share = sum(a != b for a, b in zip(moved, exact, strict=True)) / len(exact)
    assert 0.2 < share < 0.27  # three or so in four moves end elsewhere
    assert StepSplitter(PieceTokenizer([]), step_tokens=3)(tokens) == exact
