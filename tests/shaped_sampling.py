"""Branches with bias, masks, least lengths, stop strings and seeds, beside what full logits say of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from engine_helpers import VOCABULARY, path_logits, prompt_of, tiny_model
from torch import Tensor

from ibtpo_engine import Engine, MaskState, Node, Sampling, TokenMask
from ibtpo_kernels import has_compiled, sample

MODEL = tiny_model()
PROMPT = prompt_of(37)
LETTERS = "abcdefgh"


def spell(tokens: list[int]) -> str:
    """Four or five tokens a letter, so that a stop string of some letters has many tokenisations; some have two."""
    return "".join("xy" if token == 39 else LETTERS[token % 8] for token in tokens)


# A UTF-8 alphabet: single bytes, so that a character is spread over up to four tokens, and some whole characters.
BYTES: list[bytes] = [bytes([b]) for b in "é∑😀".encode()] + [b"a", b"b", b" ", "é".encode(), b"a\xc3", b"\xa9b"]


def utf8(tokens: list[int]) -> str:
    return b"".join(BYTES[token % len(BYTES)] for token in tokens).decode("utf-8", errors="replace")


class Alternate:
    """A stateful grammar: the token's parity must change at every step; counts what is asked of it."""

    def __init__(self) -> None:
        self.begun = self.copied = self.advanced = 0

    def begin(self, prompt: npt.NDArray[np.int32]) -> MaskState:
        self.begun += 1
        return _Parity(self, int(prompt[-1]) % 2)


class _Parity:
    def __init__(self, grammar: Alternate, last: int) -> None:
        self.grammar = grammar
        self.last = last

    def allowed(self) -> list[int]:
        return list(range(1 - self.last, VOCABULARY, 2))

    def advance(self, token: int) -> None:
        self.grammar.advanced += 1
        self.last = token % 2

    def copy(self) -> Self:
        self.grammar.copied += 1
        return type(self)(self.grammar, self.last)


def near_last(prefix: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """A stateless mask that depends on the whole path: tokens at most 9 from (sum of the path) mod V, around."""
    distance = (np.arange(VOCABULARY) - int(prefix.sum())) % VOCABULARY
    allowed: npt.NDArray[np.bool_] = distance <= 9
    return allowed


BIAS = {3: 2.5, 17: -4.0, 21: -math.inf, 2: 1.0}
KINDS: dict[str, Sampling] = {
    "bias": Sampling(max_tokens=30, logit_bias=BIAS, stop_tokens=(2,)),
    "bias, cut": Sampling(max_tokens=30, logit_bias=BIAS, temperature=0.7, top_p=0.8, top_k=12, min_p=0.01),
    "least": Sampling(max_tokens=40, min_tokens=25, stop_tokens=(2, 5, 11, 13)),
    "prefix mask": Sampling(max_tokens=30, allowed=near_last, stop_tokens=(4,)),
    "grammar": Sampling(max_tokens=30, allowed=Alternate(), temperature=1.2),
    "greedy": Sampling(max_tokens=30, temperature=0, allowed=near_last, logit_bias=BIAS),
    "all": Sampling(
        max_tokens=40, min_tokens=12, stop_tokens=(4, 9), logit_bias=BIAS, allowed=near_last, seed=8, top_p=0.9,
        stop=("ab", "fab"),
    ),
    "stop": Sampling(max_tokens=40, stop=("ab", "cde", "x"), min_tokens=3),
    "plain": Sampling(max_tokens=30, stop_tokens=(2,)),
}  # fmt: skip


def engine_on(how: str = "native", **arguments: Any) -> Engine:
    engine = Engine(MODEL, **({"kv_tokens": 16 * 400, "decode": spell} | arguments))
    assert engine.scheduler.runner.is_native == (how == "native" and has_compiled())
    return engine


def shaped(logits: Tensor, path: npt.NDArray[np.int32], depth: int, prompt_len: int, sampling: Sampling) -> Tensor:
    """[V] -> [V]: everything a branch's parameters say about the token at `depth`, done to its full logits."""
    logits = logits.clone()
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias
    if depth - prompt_len + 1 < sampling.min_tokens:
        logits[list(sampling.stop_tokens)] = -torch.inf
    if isinstance(sampling.allowed, TokenMask):
        state = sampling.allowed.begin(path[:prompt_len])
        for token in path[prompt_len:depth]:
            state.advance(int(token))
        allowed = np.isin(np.arange(VOCABULARY), state.allowed())
    elif sampling.allowed is not None:
        allowed = np.asarray(sampling.allowed(path[:depth]))
        allowed = allowed if allowed.dtype == np.bool_ else np.isin(np.arange(VOCABULARY), allowed)
    else:
        return logits
    logits[torch.from_numpy(~allowed)] = -torch.inf
    return logits


def expected_end(
    node: Node, sampling: Sampling, prompt_len: int, decode: Callable[[list[int]], str]
) -> tuple[int, str | None, str | int | None]:
    """(length of the node, finish, stopped_by), by decoding the whole text anew after every token."""
    path = node.prefix()
    base = decode(path[:prompt_len].tolist())
    texts = {n: decode(path[:n].tolist()) for n in range(node.start, node.end + 1)}
    for n in range(node.start + 1, node.end + 1):
        if n - prompt_len >= sampling.min_tokens and int(path[n - 1]) in sampling.stop_tokens:
            return n - node.start, "stop", int(path[n - 1])
        before, after = texts[n - 1], texts[n]
        ends = {
            (at + len(stop), order): stop
            for order, stop in enumerate(sampling.stop)
            for at in range(common(base, after), len(after) - len(stop) + 1)
            if after[at : at + len(stop)] == stop and at + len(stop) > common(before, after)
        }
        if ends and n - prompt_len >= sampling.min_tokens:
            return n - node.start, "stop", ends[min(ends)]
        if n - prompt_len == sampling.max_tokens:
            return n - node.start, "length", None
    return len(node), "goes on", None


def common(left: str, right: str) -> int:
    n = 0
    while n < min(len(left), len(right)) and left[n] == right[n]:
        n += 1
    return n


def check(node: Node, sampling: Sampling, decode: Callable[[list[int]], str] = spell) -> None:
    """Assert that every number and the ending of a node are what one forward pass and full logits say."""
    prompt_len, path = node.tree.prompt_len, node.prefix()
    raw = path_logits(MODEL, path)[node.start - 1 : node.end - 1].float()
    ours = torch.stack([shaped(raw[i], path, node.start + i, prompt_len, sampling) for i in range(len(node))])
    token, logprob, _, _ = sample(
        ours,
        torch.tensor([[node.stream, depth] for depth in range(node.start, node.end)]),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
    )
    assert node.tokens.tolist() == token.tolist()
    np.testing.assert_allclose(node.logprob, logprob, rtol=0, atol=5e-5)
    p = raw.double().log_softmax(-1)
    np.testing.assert_allclose(node.logprob_raw, p[range(len(node)), token], rtol=0, atol=5e-5)
    np.testing.assert_allclose(node.entropy, -(p.exp() * p).sum(-1), rtol=0, atol=5e-5)
    assert (len(node), node.finish, node.stopped_by) == expected_end(node, sampling, prompt_len, decode)


def grow_all(engine: Engine, kinds: list[Sampling]) -> list[tuple[Node, Sampling]]:
    """Branches of every kind in one batch, then forks of each within and at its end, in one batch again."""
    found: list[tuple[Node, Sampling]] = []
    trees = [engine.tree(PROMPT, key=i) for i in range(len(kinds))]
    for round_ in range(2):
        for tree, sampling in zip(trees, kinds, strict=True):
            if round_ == 0:
                nodes = tree.root.fork(3)
            else:
                first, second, _ = tree.leaves()
                nodes = first.fork(2, at=max(len(first) // 2, 1))
                nodes += second.fork(1) if second.end < tree.prompt_len + sampling.max_tokens else []
            engine._submit(nodes, sampling)
            found += [(node, sampling) for node in nodes]
        while any(node.in_flight for node, _ in found):
            engine._step()
    return found
