"""Errors a caller can act on; every message names the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ibtpo_engine.tree import Node


class EngineError(RuntimeError):
    """Base class of the errors the engine raises on purpose."""


class OutOfPages(EngineError):
    """The KV pool cannot hold the open trees' pages plus those asked for."""


class StaleWeights(EngineError):
    """The parameters changed while cached KV still belongs to the old ones."""


class NoTokenAllowed(EngineError):
    """Mask, bias and `min_tokens` together forbid every token to a branch."""


class CheckpointError(ValueError):
    """A checkpoint folder is incomplete, damaged, or of an unknown architecture."""


class BackendError(EngineError):
    """A backend failed, or answered with something that is not a sampled branch."""


class BudgetSpent(EngineError):
    """A request exceeds a tree's budget."""


class BranchFailed(EngineError):
    """Carries an error of the caller's mask, pause or decoder for one branch to the call or search that extends it.

    Args:
        node: the branch's node.
        error: the original error.
    """

    def __init__(self, node: Node, error: Exception) -> None:
        super().__init__(f"{node!r}: {error}")
        self.node, self.error = node, error


class IntegrityError(EngineError):
    """The engine's data structures disagree with each other: a bug in the engine, never the caller's fault."""
