"""Ends of branches that no sampled token brings about: paused or aborted where they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ibtpo_engine.tree import Node

if TYPE_CHECKING:
    from ibtpo_engine.branches import Branch
    from ibtpo_engine.scheduler import Scheduler


def under_way(scheduler: Scheduler) -> list[Branch]:
    """Every branch submitted and not yet ended."""
    filling = [branch for fill in scheduler.fills.values() for branch in [*fill.children, fill.branch] if branch]
    return [*scheduler.waiting, *filling, *scheduler.running.values()]


def truncate(scheduler: Scheduler, nodes: Iterable[Node], version: int) -> list[Node]:
    """End branches where they are, with "abort"; one that has sampled nothing stays under way.

    Keys and values are kept where the branch was being decoded, and computed again when asked for otherwise.

    Returns:
        The nodes that ended.
    """
    doomed = {id(node) for node in nodes if node.in_flight}
    ended = []
    for branch in [branch for branch in under_way(scheduler) if id(branch.node) in doomed]:
        if scheduler.is_running(branch) and scheduler.slots.length[branch.slot] > branch.node.start:
            ended.append(scheduler.end(branch, "abort", version))
            continue
        if id(branch) in scheduler.fills:  # it was preempted, and is being filled again
            scheduler.fills.pop(id(branch))
            scheduler._wait_again(branch)
        if branch.kept is not None and not branch.is_given:
            scheduler.waiting.remove(branch)
            ended.append(branch.node.fill(*branch.kept, finish="abort", version=branch.sampled_by(version)))
            branch.node.in_flight = False
    scheduler.drop_idle_fills()
    return ended
