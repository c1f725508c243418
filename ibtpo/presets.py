"""Every method of the comparison, as changes to the configuration (docs/method.md has their formulas)."""

from __future__ import annotations

from typing import Any

_GRPO: dict[str, Any] = {"search": {"method": "independent"}, "advantage": {"kind": "grpo"}}
_EPTREE = {"method": "eptree", "initial_branches": 4, "nodes_per_round": 2, "rounds": 2}  # 4*(1 + 1*2*1) = 12

PRESETS: dict[str, dict[str, Any]] = {
    "ib-tpo": {"search": {"method": "ibtree"}, "advantage": {"kind": "ib-tpo"}},
    "ib-tpo+": {
        "search": {"method": "ibtree", "branch_at_root": False},
        "advantage": {"kind": "ib-tpo", "uniform_groups": "ib_only"},
        "ib": {"duplicates": "merge"},
    },
    "grpo": _GRPO,
    "grpo-clip-higher": _GRPO | {"loss": {"clip_high": 0.28}},
    "grpo-entropy": _GRPO | {"loss": {"entropy_coef": 1e-3}},
    "ibro": _GRPO | {"loss": {"entropy_advantage_coef": 1e-3}},
    "dapo": {
        "search": {"method": "independent", "redraws": 9},
        "advantage": {"kind": "grpo"},
        "loss": {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token", "kl_coef": 0.0},
    },
    "random-tree": {"search": {"method": "random-tree"}, "advantage": {"kind": "grpo"}},
    "treerl": {"search": _EPTREE, "advantage": {"kind": "treerl"}},
    "treepo": {"search": {"method": "treepo", "group_size": 12}, "advantage": {"kind": "treepo"}},
    "tree-grpo": {
        "search": {"method": "tree-grpo", "initial_branches": 4, "nodes_per_round": 2, "rounds": 2},
        "advantage": {"kind": "tree-grpo"},
    },
    "vineppo": {
        "search": {"method": "vineppo", "group_size": 2, "value_rollouts": 1},
        "advantage": {"kind": "vineppo"},
    },
    "ibtree-grpo": {"search": {"method": "ibtree"}, "advantage": {"kind": "grpo"}},
    "ib-adv-only": {"search": {"method": "independent"}, "advantage": {"kind": "ib-tpo"}},
    "random+ib-adv": {"search": {"method": "random-tree"}, "advantage": {"kind": "ib-tpo"}},
    "eptree+ib-adv": {"search": _EPTREE, "advantage": {"kind": "ib-tpo"}},
}

PRESET_NOTES: dict[str, tuple[str, str]] = {
    "ib-tpo": ("trees branched where the IB-Score is highest, step-level advantages", "arXiv 2605.28109"),
    "ib-tpo+": ("ib-tpo with the best values measured for three points the paper leaves open", "ours, docs/method.md"),
    "grpo": ("independent trajectories, advantage (R - mean)/std over the group", "arXiv 2402.03300"),
    "grpo-clip-higher": ("grpo, upper clip raised: more room for unlikely tokens", "arXiv 2503.14476, section 3.1"),
    "grpo-entropy": ("grpo with a bonus for the policy's entropy", "common practice"),
    "ibro": ("grpo with more entropy where the advantage is positive, less where not", "arXiv 2507.18391; weight ours"),
    "dapo": ("grpo-clip-higher without KL; new prompts are drawn for groups of equal rewards", "arXiv 2503.14476"),
    "random-tree": ("trees branched at random steps, grpo's advantages", "arXiv 2605.28109, control"),
    "treerl": ("trees branched before the most surprising tokens, values against root and parent", "arXiv 2506.11902"),
    "treepo": ("trees of fixed segments, rewards against the mean below each ancestor", "arXiv 2508.17445"),
    "tree-grpo": ("several random trees, z-scores of rewards in each tree and in the group", "arXiv 2509.21240"),
    "vineppo": ("independent trajectories, extra rollouts to estimate the value of every step", "arXiv 2410.01679"),
    "ibtree-grpo": ("IBTree with grpo's advantages", "arXiv 2605.28109, ablation"),
    "ib-adv-only": ("independent trajectories with ib-tpo's advantages", "arXiv 2605.28109, ablation"),
    "random+ib-adv": ("random-tree with ib-tpo's advantages", "arXiv 2605.28109, ablation"),
    "eptree+ib-adv": ("treerl's trees with ib-tpo's advantages", "arXiv 2605.28109, ablation"),
}
"""(one line of explanation, source) of every preset."""
