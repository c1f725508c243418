"""The engine as the rollout backend of TRL's GRPOTrainer: sampling in this process, on the trainer's own parameters.

TRL calls `rollout_func(prompts, trainer)` with every prompt `num_generations` times in a row and expects one completion
for each. Here equal neighbours are one tree, so a prompt is computed once, and any search with as many leaves can
replace independent chains. Log-probs come from the pass that sampled the tokens.

python examples/trl_grpo.py --model CHECKPOINT_FOLDER --steps 20 "7*8-5=?" "3+9*4=?"      (needs: pip install trl)
"""

import argparse
import math
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from ibtpo.tasks.digit_chain import parse_prompt, right_solution
from ibtpo_engine import Engine, Growth, Node, Sampling, Search, Tree, borrow, load_tokenizer
from ibtpo_engine.generate import independent

_NAMES = {  # settings of `generate`, and their names in `Sampling`
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "eos_token_id": "stop_tokens",
    "suppress_tokens": "logit_bias",
}
_ALLOWED = {"repetition_penalty": 1.0, "do_sample": True}  # others, at values that have no effect


class TreeRollouts:
    """A `rollout_func`; the trainer's model may be one of PEFT with a LoRA adapter.

    Args:
        search: number of completions -> a search whose trees have that many leaves.
        kv_tokens: size of the engine's pool in tokens.
        seed: decides every sample, with the order of the prompts.
    """

    def __init__(
        self, search: Callable[[int], Search] = independent, *, kv_tokens: int = 50_000, seed: int = 0
    ) -> None:
        self.search = search
        self.kv_tokens = kv_tokens
        self.seed = seed
        self.engine: Engine | None = None
        self.num_trees = 0

    def __call__(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        if self.engine is None:
            model = borrow(trainer.accelerator.unwrap_model(trainer.model))
            self.engine = Engine(model, kv_tokens=self.kv_tokens, seed=self.seed)
        self.engine.weights_changed()  # by the optimizer, since the last call
        groups = [(prompt, len(list(same))) for prompt, same in groupby(prompts)]
        first = self.num_trees + (trainer.accelerator.process_index << 40)  # keys are unique across processes and calls
        self.num_trees += len(groups)
        keys = range(first, first + len(groups))

        def search(tree: Tree) -> Growth:
            return self.search(groups[tree.key - first][1])(tree)

        ids = [self._encode(prompt, trainer) for prompt, _ in groups]
        trees = dict(self.engine.run(search, ids, self._sampling(trainer), keys=keys))
        self.engine.release()  # leaves the memory to the update
        rollouts: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
        for i, (prompt, count) in enumerate(groups):
            leaves = trees[i].leaves()
            if len(leaves) != count:
                raise ValueError(f"the search grew {len(leaves)} completions of {prompt!r}; GRPOTrainer wants {count}")
            for leaf in leaves:
                rollouts["prompt_ids"].append(ids[i])
                rollouts["completion_ids"].append(leaf.prefix()[trees[i].prompt_len :].tolist())
                rollouts["logprobs"].append(np.concatenate(list(_logprobs(leaf))).tolist())
        return rollouts

    @staticmethod
    def _encode(prompt: Any, trainer: GRPOTrainer) -> list[int]:
        tokenizer = trainer.processing_class
        if isinstance(prompt, str):
            return list(tokenizer(prompt)["input_ids"])
        options = {"add_generation_prompt": True, "return_dict": True} | trainer.chat_template_kwargs
        return list(tokenizer.apply_chat_template(prompt, **options)["input_ids"])

    @staticmethod
    def _sampling(trainer: GRPOTrainer) -> Sampling:
        """The settings TRL would give to `generate`: `generation_kwargs` take precedence over the trainer's own."""
        args = trainer.args
        given = {
            "temperature": args.temperature,
            "top_p": args.top_p,
            "top_k": args.top_k,
            "min_p": args.min_p,
            "repetition_penalty": args.repetition_penalty,
            "max_new_tokens": args.max_completion_length,
            "eos_token_id": trainer.eos_token_ids,  # the tokenizer's, and those of the model's generation config
        } | (args.generation_kwargs or {})
        given = {name: value for name, value in given.items() if value is not None}
        if odd := {name: value for name, value in given.items() if name not in _NAMES and value != _ALLOWED.get(name)}:
            raise ValueError(f"GRPOConfig: the engine does not sample with {odd}; it knows {', '.join(_NAMES)}")
        options = {_NAMES[name]: value for name, value in given.items() if name in _NAMES}
        stops, forbidden = options["stop_tokens"], options.pop("logit_bias", ())
        options["stop_tokens"] = (stops,) if isinstance(stops, int) else tuple(stops)
        return Sampling(**options, logit_bias=dict.fromkeys(forbidden, -math.inf))


def _logprobs(leaf: Node) -> Iterator[Any]:
    """Log-probs of the tokens below the prompt, node by node, under the distribution sampled from."""
    return (node.logprob for node in leaf.path() if node.start >= node.tree.prompt_len)


def reward(prompts: list[str], completions: list[str], **fields: Any) -> list[float]:
    """Share of characters that agree with the correct derivation."""
    right = [right_solution(parse_prompt(prompt)) for prompt in prompts]
    return [sum(map(str.__eq__, c, r)) / len(r) for c, r in zip(completions, right, strict=True)]


def lora(rank: int) -> Any:
    """An adapter on every projection."""
    from peft import LoraConfig  # here, since it is optional

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="checkpoint folder (Qwen3, Qwen2 or Llama, dense)")
    parser.add_argument("--output", default="runs/trl_grpo", help="where TRL puts its files")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=0, help="train a LoRA adapter (needs: pip install peft)")
    parser.add_argument("problems", nargs="+", help="two or more")
    args = parser.parse_args()
    if len(args.problems) < 2:  # TRL drops an incomplete last batch, and would train on nothing
        parser.error("a batch of 16 completions, 8 a prompt, takes two problems")
    rollouts = TreeRollouts()
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        processing_class=load_tokenizer(args.model),
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": problem + "\n"} for problem in args.problems]),
        rollout_func=rollouts,
        peft_config=lora(args.rank) if args.rank else None,
        args=GRPOConfig(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=48,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
        ),
    )
    trainer.train()
    print(f"{rollouts.num_trees} trees, {rollouts.engine.stats()['sampled']} tokens sampled by the engine")


if __name__ == "__main__":
    main()
