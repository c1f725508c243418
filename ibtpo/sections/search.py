"""Settings `search.*`: how a group of trajectories is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ibtpo.validation import check_choices, check_range


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How a group of trajectories is sampled for a prompt (paper, section 3)."""

    method: Literal["ibtree", "independent", "random-tree", "eptree", "treepo", "tree-grpo", "vineppo"] = "ibtree"
    """ibtree: branch at the highest IB-Score; random-tree: anywhere; independent: chains; others: docs/method.md."""
    group_size: int = 8
    """G, trajectories per prompt of `independent`, `treepo`, `vineppo`; for others it follows from the next fields."""
    initial_branches: int = 4
    """B0, trajectories that a tree begins with; G = B0 + (L-1)*K*B. `eptree` and `tree-grpo`: number of trees."""
    rounds: int = 9
    """L, rounds of growth, the initial one included."""
    nodes_per_round: int = 1
    """K, nodes branched in a round; `eptree` and `tree-grpo` branch as many in each of their trees."""
    branches_per_node: int = 1
    """B, new trajectories from each of these nodes."""
    segment_tokens: int = 512
    """Tokens in a segment of `treepo`; its steps are segments."""
    deepest_share: float = 0.875
    """`eptree` begins no branches beyond this share of `sampling.max_tokens`."""
    value_rollouts: int = 9
    """K, rollouts of `vineppo` that estimate the value of a step; they are sampled, not trained on."""
    lookahead: int = 1
    """Rounds of `ibtree` and `random-tree` under way at once; 1 (paper): each begins when those before have ended."""
    redraws: int = 0
    """How often a training step draws new prompts for groups whose rewards are all equal (DAPO); 0: never."""
    branch_at_root: bool = True
    """Whether the prompt itself may be branched again."""
    separator: str = "\n\n"
    """Text that ends a step; the token that completes it belongs to that step. A newline in the shell: $'\\n'."""
    step_tokens: int | None = None
    """If set, every step has this many tokens, and `separator` is ignored."""
    boundary_noise: float = 0.0
    """Share of the step boundaries that are moved to a random token between their neighbours (as the paper tests)."""

    def __post_init__(self) -> None:
        check_choices(self, "search.")
        for name in ("group_size", "initial_branches", "rounds", "nodes_per_round", "branches_per_node", "lookahead"):
            check_range(f"search.{name}", getattr(self, name), low=1)
        check_range("search.redraws", self.redraws, low=0)
        if self.lookahead > 1 and not self.is_guided:
            raise ValueError(
                f"search.lookahead: {self.lookahead} is possible for search.method ibtree and random-tree only; set it "
                f"to 1 for {self.method}"
            )
        check_range("search.boundary_noise", self.boundary_noise, low=0.0, high=1.0)
        for name in ("segment_tokens", "value_rollouts"):
            check_range(f"search.{name}", getattr(self, name), low=1)
        check_range("search.deepest_share", self.deepest_share, low=0.0, high=1.0, low_open=True)
        if self.step_tokens is not None:
            check_range("search.step_tokens", self.step_tokens, low=1)
        elif not self.separator:
            raise ValueError('search.separator: "" has no character; give at least one, or set search.step_tokens')
        elif self.separator.replace(r"\n", "") == "":
            raise ValueError(
                f"search.separator: {self.separator} is a backslash and the letter n, not a newline; write "
                f"$'{self.separator}' in the shell and \"{self.separator}\" in YAML"
            )

    @property
    def is_guided(self) -> bool:
        """Whether a tree grows by rounds of which each is chosen after the last."""
        return self.method in ("ibtree", "random-tree")

    @property
    def trajectories(self) -> int:
        """G, trajectories a prompt."""
        if self.method in ("independent", "treepo", "vineppo"):
            return self.group_size
        later = (self.rounds - 1) * self.nodes_per_round * self.branches_per_node
        if self.method in ("eptree", "tree-grpo"):
            return self.initial_branches * (1 + later)
        return self.initial_branches + later

    @property
    def branches(self) -> int:
        """Most branches a tree holds at once: its trajectories and, of `vineppo`, the rollouts from a step of each."""
        rollouts = self.value_rollouts if self.method == "vineppo" else 0
        return self.trajectories * (1 + rollouts)
