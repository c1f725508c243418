"""The smallest KV pool in which any single tree of a run can be grown to its end.

A search keeps the pages of all its branches until its tree is done. If pages run short, the other trees give theirs up,
so a run can go on as long as one tree alone fits; otherwise it ends with `OutOfPages`. With prompts of at most P
tokens, at most T new tokens and pages of 16::

    prompt  |p0      |p1      |p2 ..   )              pages_for(P)
    branch                    |c2 .....|b3      |b4 ) pages_for(T + 15), wherever it begins: c2 is its copy of the page
                                                      that the fork lies in

    search      pages_for(P) + n pages_for(T + 15)    n = `SearchConfig.branches`; a branch that begins deeper has less
    evaluation  the same with n = eval.samples        the samples of a prompt are one tree
"""

from __future__ import annotations

from collections.abc import Callable

from ibtpo.config import TrainConfig
from ibtpo_engine.pages import PAGE, pages_for


def least_pool(config: TrainConfig, *, prompt: int, context: int) -> int:
    """Tokens of a pool that holds any tree of a run, whatever is sampled.

    Args:
        config: the run.
        prompt: tokens of its longest prompt.
        context: maximum context of the model; no path is longer.
    """
    longest = config.sampling.max_tokens
    prompt = min(prompt, max(context - longest, 1))  # after a longer prompt branches have less room
    branches = max(config.search.branches, config.eval.samples)
    return PAGE * (pages_for(prompt) + branches * pages_for(min(longest, context - prompt) + PAGE - 1))


def pool_warning(config: TrainConfig, *, longest_prompt: Callable[[], int], context: int) -> str | None:
    """A warning about a pool that may not hold a tree of the run; None if it holds every tree.

    Args:
        config, context: as for `least_pool`.
        longest_prompt: returns the tokens of its longest prompt; called only if prompts of any length would not fit.
    """
    pool = config.engine.kv_tokens
    if least_pool(config, prompt=context, context=context) <= pool:
        return None
    least = least_pool(config, prompt=longest_prompt(), context=context)
    if least <= pool:
        return None
    return (
        f"engine.kv_tokens: a tree takes up to {least:,} tokens if all branches reach sampling.max_tokens, but the "
        f"pool holds {pool:,}; a tree that does not fit ends the run. Raise engine.kv_tokens if there is memory, or "
        "lower sampling.max_tokens"
    )
