"""The `/v1/completions` protocol: requests from `Sampling`, and `Completion`s from responses.

vLLM and SGLang agree on the parts used here. Two pitfalls have ruined training runs elsewhere:

- *Defaults.* A server fills omitted parameters from the checkpoint's generation_config.json (a repetition penalty of
  1.05 for some Qwen models), so every parameter that shapes the distribution is sent, even at its neutral value.
- *Which log-prob.* Servers return different log-probs in the same field (`LogprobKind`). A value is stored under a name
  only if it is that quantity; a quantity that cannot be known is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any, Literal

import numpy as np

from ibtpo_engine.arrays import Floats, Ints
from ibtpo_engine.backends import Completion
from ibtpo_engine.errors import BackendError
from ibtpo_engine.sampling import Sampling

LogprobKind = Literal["raw", "scaled", "sampled"]
"""Which log-probs a server returns: of the model itself (vLLM's default); after division by the temperature, but before
filters (SGLang's default); of the distribution sampled from (vLLM's --logprobs-mode processed_logprobs)."""

_SENT = {"temperature", "top_p", "top_k", "min_p", "max_tokens", "stop_tokens"}
_ENDS = {"stop": "stop", "length": "length"}


def request_body(
    model: str, prefix: Sequence[int], n: int, sampling: Sampling, seed: int
) -> dict[str, str | int | float | bool | list[int]]:
    """The request for `n` completions of `prefix`.

    Raises:
        ValueError: `sampling` uses a parameter that the protocol does not know.
    """
    for field in fields(sampling):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name not in _SENT and getattr(sampling, field.name) != default:
            raise ValueError(
                f"Sampling.{field.name}: {getattr(sampling, field.name)!r} cannot be sent to a completions server; "
                f"leave it at {default!r} or sample with an Engine"
            )
    return {
        "model": model,
        "prompt": list(map(int, prefix)),
        "n": n,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,  # 0 means "all" to one of the servers and is refused by the other
        "min_p": sampling.min_p,
        "seed": seed,
        "logprobs": 1,
        "return_token_ids": True,
        "ignore_eos": not sampling.stop_tokens,  # with it, SGLang would ignore stop_token_ids too
        "stop_token_ids": list(sampling.stop_tokens),
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def read_completions(
    response: Any, prefix: Sequence[int], n: int, sampling: Sampling, kind: LogprobKind
) -> list[Completion]:
    """The `n` completions a server sent.

    Raises:
        BackendError: the response is incomplete or inconsistent; the message says how, and what to do.
    """
    choices = response.get("choices") if isinstance(response, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices) or len(choices) != n:
        found = f"{len(choices)} choices" if isinstance(choices, list) else "no list of choices"
        raise BackendError(
            f"the server sent {found} for n={n}: {str(response)[:300]}; check that the address is /v1/completions"
        )
    indices = [choice.get("index", 0) for choice in choices]
    if n > 1 and (not all(type(index) is int for index in indices) or sorted(indices) != list(range(n))):
        raise BackendError(f"the server numbered its {n} choices {str(indices)[:80]}; expected 0 to {n - 1}, each once")
    choices = sorted(choices, key=lambda choice: choice.get("index", 0))
    return [_completion(choice, list(prefix), sampling, kind) for choice in choices]


def _completion(choice: dict[str, Any], prefix: list[int], sampling: Sampling, kind: LogprobKind) -> Completion:
    seen = choice.get("prompt_token_ids")
    if seen is not None and seen != prefix:
        count = len(seen) if isinstance(seen, list) else repr(seen)[:80]
        raise BackendError(
            f"the server continued {count} tokens, not the {len(prefix)} it was sent (a BOS token put in front?); "
            "start it without rewriting prompts"
        )
    tokens, values = _token_ids(choice), _logprobs(choice)
    if len(tokens) != len(values):
        raise BackendError(f"the server sent {len(values)} log-probs for {len(tokens)} tokens of one completion")
    finish = _ENDS.get(str(choice.get("finish_reason")))
    if finish is None:
        raise BackendError(
            f"the server ended a completion with finish_reason={choice.get('finish_reason')!r}; expected 'stop' or "
            "'length' (was the request aborted?)"
        )
    stops = np.isin(tokens, sampling.stop_tokens)
    if stops[-1:].any():
        finish = "stop"  # SGLang reports "length" if the stop token is the last one of max_tokens
    elif finish == "stop":
        raise BackendError(
            f"the server stopped after {tokens[-1:].tolist()}, which is not in stop_tokens={sampling.stop_tokens}. It "
            "removes stop tokens from its answers, or it stops at the model's own end token; add that to stop_tokens"
        )
    if stops[:-1].any():
        raise BackendError(
            f"the server continued after token {int(tokens[stops.argmax()])} of stop_tokens={sampling.stop_tokens}; "
            "use a server that supports stop_token_ids"
        )
    logprob, raw = _named(values, sampling, kind)
    return Completion(tokens=tokens, logprob=logprob, logprob_raw=raw, entropy=_unknown(len(tokens)), finish=finish)


def _token_ids(choice: dict[str, Any]) -> Ints:
    """`token_ids`, or the ids in tokens spelled "token_id:17" (vLLM's --return-tokens-as-token-ids)."""
    ids = choice.get("token_ids")
    if ids is None:
        spelled = _logprobs_of(choice).get("tokens")
        if (
            not isinstance(spelled, list)
            or not spelled
            or not all(str(token).startswith("token_id:") for token in spelled)
        ):
            raise BackendError(
                "the server sent no token ids, and text tokenised again may differ from what was sampled; use a server "
                "that supports return_token_ids (recent vLLM or SGLang), or start vLLM with "
                "--return-tokens-as-token-ids"
            )
        names = [str(token)[9:] for token in spelled]
        ids = [int(name) if name.isdecimal() and len(name) <= 10 else name for name in names]
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 1 << 31 for token in ids):
        raise BackendError(f"the server sent token ids that are not 32-bit integers from 0 on: {str(ids)[:80]}")
    return np.array(ids, np.int32)


def _logprobs_of(choice: dict[str, Any]) -> dict[str, Any]:
    found = choice.get("logprobs") or {}
    if not isinstance(found, dict):
        raise BackendError(f"the server sent logprobs that are not a JSON object: {str(found)[:80]}")
    return found


def _logprobs(choice: dict[str, Any]) -> Floats:
    values = _logprobs_of(choice).get("token_logprobs")
    if not isinstance(values, list) or not all(type(v) in (int, float) for v in values):
        raise BackendError(
            f"the server sent no log-prob for a token ({str(values)[:80]}); use a server that supports logprobs=1"
        )
    if not all(-1e9 < v <= 1e-3 for v in values):  # a sampled token has a probability; rounding may exceed 1
        raise BackendError(f"the server sent log-probs of sampled tokens outside (-1e9, 0]: {str(values)[:80]}")
    return np.array(values, np.float32)


def _named(values: Floats, sampling: Sampling, kind: LogprobKind) -> tuple[Floats, Floats]:
    """(logprob, logprob_raw): each the server's values if they are that quantity, else NaN."""
    whole = sampling.top_p == 1 and sampling.top_k == 0 and sampling.min_p == 0
    plain = whole and sampling.temperature == 1
    nan = _unknown(len(values))
    if sampling.temperature == 0:  # one token has probability 1; only vLLM's raw log-prob is well-defined here
        return np.zeros_like(values), values if kind == "raw" else nan
    if kind == "raw":
        return (values if plain else nan), values
    if kind == "scaled":
        return (values if whole else nan), (values if sampling.temperature == 1 else nan)
    return values, (values if plain else nan)


def _unknown(count: int) -> Floats:
    """float32 [count] of NaN, for numbers that the server does not report."""
    return np.full(count, np.nan, np.float32)
