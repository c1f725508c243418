"""How large the KV pool must be for any single tree of a run to be grown to its end.

A search keeps the pages of all its branches until its tree is done. Where pages are short the other trees give theirs
up, so a run goes on as long as one tree alone fits; a pool that does not hold it ends with `OutOfPages`. With prompts
of P tokens at most and T new ones, pages of 16::

    prompt  |p0      |p1      |p2 ..   )              pages_for(P)
    branch                    |c2 .....|b3      |b4 ) pages_for(T + 15), wherever it begins: c2 is its copy of the page
                                                      that the fork lies in

    search      pages_for(P) + n pages_for(T + 15)    n = `SearchConfig.branches`; a branch that begins deeper has less
    evaluation  the same with n = eval.samples        the samples of a prompt are one tree
"""

from __future__ import annotations

from ibtpo.config import TrainConfig
from ibtpo_engine.pages import PAGE, pages_for


def least_pool(config: TrainConfig, *, prompt: int, context: int) -> int:
    """Tokens of a pool in which every tree of a run fits, whatever is sampled.

    Args:
        config: the run.
        prompt: tokens of its longest prompt.
        context: of the model; no path is longer.
    """
    longest = config.sampling.max_tokens
    prompt = min(prompt, max(context - longest, 1))  # behind a longer one branches have less room
    branches = max(config.search.branches, config.eval.samples)
    return PAGE * (pages_for(prompt) + branches * pages_for(min(longest, context - prompt) + PAGE - 1))
