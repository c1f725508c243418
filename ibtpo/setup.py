"""Creating and checking the parts of a run from its configuration."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase

from ibtpo.checkpoints import weights_of
from ibtpo.config import TrainConfig
from ibtpo.config_io import preset_of
from ibtpo.console import say
from ibtpo.policy import Policy, load_policy
from ibtpo.tasks import DataTask, DigitChain, Problem, Task, format_prompt, make_task
from ibtpo.tasks.digit_chain import right_solution
from ibtpo_engine import Engine, Sampling

_PIECE = 1 << 22  # numbers of a parameter summed at a time: on a CPU torch makes a float64 copy of them
_ALWAYS = 10_000  # number of first prompts that are tokenized whatever their length
_MANY = 256  # generated problems, training and held out each, from which the longest prompt is estimated


def make_sampling(config: TrainConfig, policy: Policy) -> Sampling:
    """The sampling parameters of a run."""
    return Sampling(**asdict(config.sampling), stop_tokens=policy.stops)


def make_engine(config: TrainConfig, policy: Policy) -> Engine:
    """The engine of a run, borrowing the policy's parameters.

    Raises:
        ValueError: there is not enough memory for its pool.
    """
    try:
        return Engine(
            policy.model,
            kv_tokens=config.engine.kv_tokens,
            seed=config.seed,
            max_branches=config.engine.max_branches,
            prefill_tokens=config.engine.prefill_tokens,
            parity=config.parity,
            cuda_graphs=config.engine.cuda_graphs,
        )
    except RuntimeError as error:
        raise ValueError(
            f"engine.kv_tokens: no memory for a pool of {config.engine.kv_tokens} tokens; lower it ({error})"
        ) from None


def choose_device(name: str) -> torch.device:
    """The device a configuration names; "auto" takes a GPU if there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: {name!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device: {name!r}, but torch sees {count or 'no'} GPU here; use another, auto or cpu")
    return device


def open_model(config: TrainConfig, console: Console) -> tuple[Path, Policy, Task]:
    """Load the model to evaluate or sample from: a checkpoint, or the newest one of a run.

    Returns:
        the folder of the weights, the policy and the task.

    Raises:
        ValueError: there is no such model, or it cannot be used.
    """
    if config.model == "built-in":
        raise ValueError("model: a checkpoint or run folder is needed; give one with --model (`ibtpo train` makes it)")
    folder = weights_of(Path(config.model), lambda text: say(console, text, style="dim"))
    with ExitStack() as stack:
        task = make_task(config)  # before the model is loaded: a wrong file is reported at once
        stack.callback(task.close)
        policy = load_policy(folder, dtype=getattr(torch, config.dtype), device=choose_device(config.device))
        stack.pop_all()
    return folder, policy, task


@torch.no_grad()
def find_nonfinite(model: nn.Module) -> str | None:
    """Name the first parameter that holds NaN or Inf, with their number; None if there is none."""
    for name, parameter in model.named_parameters():
        flat = parameter.flatten()
        pieces = [flat[i : i + _PIECE] for i in range(0, len(flat), _PIECE)]
        if not all(bool(torch.isfinite(piece.sum(dtype=torch.float64))) for piece in pieces):
            count = int((~torch.isfinite(parameter)).sum())
            if count:
                return f"{count} of {parameter.numel()} numbers of {name} are NaN or Inf"
    return None


def check_weights(policy: Policy, source: str) -> None:
    """Raise ValueError if the policy's weights hold NaN or Inf."""
    if fault := find_nonfinite(policy.model):
        raise ValueError(f"model: {source} cannot be trained, {fault}; give a checkpoint from before that happened")


def default_folder(config: TrainConfig) -> Path:
    """runs/<task>-<preset>-<date and time>; if no preset has these settings, advantage.kind in its place."""
    method = preset_of(config) or config.advantage.kind
    return Path("runs") / f"{config.task.replace(':', '-')}-{method}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_prompts(task: Task, policy: Policy, config: TrainConfig) -> list[str]:
    """Leave out prompts longer than ``jsonl.max_prompt_tokens``, and check that the others suit the policy.

    Returns:
        sentences for the user about what was read and left out.

    Raises:
        ValueError: a prompt has tokens outside of the vocabulary, or leaves no room for an answer; the line of a data
            file is named.
    """
    check = _PromptCheck(policy, config)
    if isinstance(task, DataTask):
        limit = config.jsonl.max_prompt_tokens
        unwanted = "an unsuitable prompt" if limit is None else f"more than {limit:,} prompt tokens"
        task.keep(check, unwanted)
        return task.notes
    problems = [task.longest_problem()] if isinstance(task, DigitChain) else task.eval_problems(config.eval.prompts)
    for problem in problems:
        check(problem)
    if isinstance(task, DigitChain):
        _check_room_for_answer(task, policy, config)
    return []


class _PromptCheck:
    """Is a prompt short enough for ``jsonl.max_prompt_tokens``? Raises if it is, but does not suit the policy.

    A token has at least one byte, so most prompts of a large file are known to be short without tokenizing them; only
    the first `_ALWAYS` are tokenized in any case.
    """

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        self._policy, self._config = policy, config
        wanted = config.jsonl.max_prompt_tokens or sys.maxsize
        self._safe = min(wanted + 1, policy.model.config.max_positions, config.engine.kv_tokens)
        self._limit = config.jsonl.max_prompt_tokens
        self._around: int | None = None  # upper bound of the tokens of a message besides its text, including examples
        self._num_checked = 0

    def __call__(self, problem: Problem) -> bool:
        self._num_checked += 1
        if self._num_checked > _ALWAYS and self._around and _most_tokens(problem, self._around) < self._safe:
            return True
        tokens = format_prompt(self._policy.tokenizer, problem, self._config.jsonl)
        if self._around is None:
            self._around = len(tokens)
        if self._limit is not None and len(tokens) > self._limit:
            return False
        fault = _fault(tokens, self._policy, self._config.engine.kv_tokens)
        if fault is not None:
            if "where" in problem.data and len(tokens) >= self._safe:
                fault += ", or set jsonl.max_prompt_tokens to leave long ones out"
            raise ValueError(f"{problem.data.get('where', 'the prompts')}: {fault}")
        return True


def _most_tokens(problem: Problem, around: int) -> int:
    """Upper bound of the formatted prompt's tokens; `around` is the token count of another formatted prompt."""
    texts = [problem.prompt] if isinstance(problem.prompt, str) else [m["content"] for m in problem.prompt]
    return around * (len(texts) + 1) + sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


def longest_prompt(task: Task, tokenizer: PreTrainedTokenizerBase, config: TrainConfig) -> int:
    """Tokens of the longest prompt of a run, or of many of its prompts if these are generated without a known limit."""
    if isinstance(task, DataTask) and config.jsonl.max_prompt_tokens is not None:
        return config.jsonl.max_prompt_tokens
    problems: Iterable[Problem]
    if isinstance(task, DataTask):
        problems = task.problems()
    elif isinstance(task, DigitChain):
        problems = [task.longest_problem()]
    else:
        problems = chain(task.eval_problems(_MANY), map(task.train_problem, range(_MANY)))
    longest, around = 0, None
    for problem in problems:
        if around is None or _most_tokens(problem, around) > longest:  # a token has at least one byte
            tokens = len(format_prompt(tokenizer, problem, config.jsonl))
            longest, around = max(longest, tokens), around or tokens
    return longest


def _check_room_for_answer(task: DigitChain, policy: Policy, config: TrainConfig) -> None:
    """Raise if ``sampling.max_tokens`` would cut off a right answer, whose length is known for this task."""
    tokens = len(policy.tokenizer.encode(right_solution(task.longest_problem()), add_special_tokens=False))
    if tokens > config.sampling.max_tokens:
        raise ValueError(
            f"sampling.max_tokens: {config.sampling.max_tokens} cuts off right answers of {tokens} tokens; raise it, "
            f"or lower digits.max_ops (now {config.digits.max_ops})"
        )


def _fault(prompt: list[int], policy: Policy, pool: int) -> str | None:
    """What is wrong with a prompt, and the remedy; None if nothing is."""
    model = policy.model.config
    if not prompt:
        return "the prompt has no tokens; give it a text or remove it"
    if max(prompt) >= model.vocab_size:
        return (
            f"the prompt has token {max(prompt)}, but the model's vocab_size is {model.vocab_size}; "
            "give it the tokenizer it was trained with"
        )
    if len(prompt) >= model.max_positions:
        limit = f"the model's context is {model.max_positions}; shorten the prompt or remove it"
    elif len(prompt) >= pool:
        limit = f"the KV pool holds {pool}; raise engine.kv_tokens"
    else:
        return None
    return f"the prompt has {len(prompt)} tokens and leaves no room for an answer, {limit}"
