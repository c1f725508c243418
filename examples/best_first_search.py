"""A search of your own on the engine: keep sampling below the trajectory the model is most sure of.

python examples/best_first_search.py CHECKPOINT_FOLDER "first prompt" "second prompt"
"""

from __future__ import annotations

import sys
from collections.abc import Generator

from ibtpo_engine import Engine, Node, Sampling, Tree, load_model, load_tokenizer, stop_tokens


def confidence(leaf: Node) -> float:
    """Mean log-prob of a trajectory's tokens."""
    path = leaf.path()[1:]
    return float(sum(node.logprob_raw.sum() for node in path) / sum(len(node) for node in path))


def best_first(tree: Tree) -> Generator[list[Node], list[Node], None]:
    """Four trajectories, then four times: branch the best one at its least certain token."""
    yield tree.root.fork(n=4)
    for _ in range(4):
        best = max(tree.leaves(), key=confidence)
        yield best.fork(n=2, at=int(best.entropy.argmax()))


def main(folder: str, prompts: list[str]) -> None:
    """Search every prompt and print its best completion."""
    tokenizer = load_tokenizer(folder)
    engine = Engine(load_model(folder), kv_tokens=50_000)
    sampling = Sampling(temperature=0.8, max_tokens=256, stop_tokens=stop_tokens(folder, tokenizer))
    for index, tree in engine.run(best_first, [tokenizer.encode(prompt) for prompt in prompts], sampling):
        best = max(tree.leaves(), key=confidence)
        print(f"{prompts[index]!r}: best of {len(tree.leaves())}, {tree.num_sampled} tokens sampled")
        print(tokenizer.decode(best.prefix()[tree.prompt_len :]))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
