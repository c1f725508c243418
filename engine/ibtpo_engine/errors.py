"""Errors a caller can act on; every message names the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ibtpo_engine.tree import Node


class EngineError(RuntimeError):
    """Base class of the errors the engine raises on purpose."""


class OutOfPages(EngineError):
    """The KV pool cannot hold what the live trees own plus what is asked for."""


class StaleWeights(EngineError):
    """The parameters changed while cached KV still belongs to the old ones."""


class NoTokenAllowed(EngineError):
    """Mask, bias and `min_tokens` together forbid a branch every token."""


class CheckpointError(ValueError):
    """A checkpoint folder is missing something, damaged, or of an unknown architecture."""


class BackendError(EngineError):
    """A backend failed, or answered with something that is not a sampled branch."""


class BudgetSpent(EngineError):
    """What is asked of a tree exceeds its budget."""


class BranchFailed(EngineError):
    """What a caller's mask, pause or decoder raised for one branch, on its way to whoever extends that branch.

    Args:
        node: the branch's node.
        error: what was raised.
    """

    def __init__(self, node: Node, error: Exception) -> None:
        super().__init__(f"{node!r}: {error}")
        self.node, self.error = node, error


class IntegrityError(EngineError):
    """The engine's own books disagree with each other: a bug in the engine, never the caller's doing."""
