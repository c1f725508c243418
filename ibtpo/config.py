"""Every setting of a run, in one place: frozen dataclasses with a sentence a field.

The defaults are the paper's (arXiv 2605.28109, section 5) wherever it names a value. What the paper leaves open is a
field too, with the reading we chose as default; `docs/method.md` gives the reasons.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ibtpo.validation import check_choice, check_range


@dataclass(frozen=True, kw_only=True)
class IBConfig:
    """The information-bottleneck estimates: node values, step probabilities, IB-Score (paper, section 2)."""

    beta: float = 5.0
    """Weight of "tells about the right answer" against "is diverse"; large beta looks at the covariance alone."""
    step_probability: Literal["geometric", "product", "mean", "min"] = "geometric"
    """pi(s) of a step of many tokens: exp(mean log-prob), exp(sum), mean or minimum token probability."""
    zero_parent: Literal["one", "zero", "smooth"] = "one"
    """phat(s)/phat(parent) where the parent's value is 0: no evidence (1), dead (0); smooth: Laplace in every ratio."""
    value: Literal["leaf_mean", "recursive", "shrunk"] = "leaf_mean"
    """phat of a node: share of the reward over the leaves below, mean of its children's values, or `shrinkage`."""
    shrinkage: float = 1.0
    """k of `shrunk`: phat = (reward below + k*phat(parent))/(leaves below + k), a prior worth k leaves; ours."""
    score_beta: Literal["fixed", "balanced"] = "fixed"
    """beta in the ranking: `beta`, or the one at which gain and confidence spread equally over a tree's nodes; ours."""
    score_bonus: float = 0.0
    """c: searches rank nodes by IB-Score + c times its estimated standard error; 0: by the score alone (paper)."""
    duplicates: Literal["separate", "merge"] = "separate"
    """The same step sampled twice under one parent: two draws, or one node with pooled leaves."""

    def __post_init__(self) -> None:
        check_range("ib.beta", self.beta, low=0.0, low_open=True)
        check_range("ib.shrinkage", self.shrinkage, low=0.0)
        check_range("ib.score_bonus", self.score_bonus, low=0.0)


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How a group of trajectories is sampled for a prompt (paper, section 3)."""

    method: Literal["ibtree", "independent", "random-tree", "eptree", "treepo", "tree-grpo", "vineppo"] = "ibtree"
    """ibtree: branch where the IB-Score is highest; random-tree: anywhere; independent: chains; the rest: rivals."""
    group_size: int = 8
    """G, trajectories a prompt for `independent`, `treepo` and `vineppo`; the other trees derive theirs."""
    initial_branches: int = 4
    """B0, independent trajectories a tree begins with: B0 + (L-1)*K*B in all; M trees of `eptree` and `tree-grpo`."""
    rounds: int = 9
    """L, rounds of growth, the initial one included."""
    nodes_per_round: int = 1
    """K, nodes branched in a round; `eptree` and `tree-grpo` branch so many in each of their trees."""
    branches_per_node: int = 1
    """B, new trajectories from each of them."""
    segment_tokens: int = 512
    """Length of a segment, the step of `treepo`."""
    deepest_share: float = 0.875
    """Share of `sampling.max_tokens` from which on `eptree` begins no branches."""
    value_rollouts: int = 9
    """K, rollouts of `vineppo` that tell the value of a step; they are sampled, not trained on."""
    lookahead: int = 1
    """Rounds of `ibtree` and `random-tree` under way at once; 1 (paper): a round knows the outcome of all before."""
    redraws: int = 0
    """Times a training step draws further prompts for groups whose rewards are all equal (DAPO); 0 takes what comes."""
    stop_uniform_after: int = 0
    """Trajectories after which a tree of equal rewards leaves its rest to the step's mixed ones; 0: never; ours."""
    branch_at_root: bool = True
    """May the prompt itself be branched again?"""
    separator: str = "\n\n"
    """Text that ends a step; the token that completes it belongs to the step it ends."""
    step_tokens: int | None = None
    """If set, steps are runs of this many tokens and `separator` is ignored."""
    boundary_noise: float = 0.0
    """Share of the step boundaries moved to a random token between their neighbours (the paper's robustness test)."""

    def __post_init__(self) -> None:
        for name in ("group_size", "initial_branches", "rounds", "nodes_per_round", "branches_per_node", "lookahead"):
            check_range(f"search.{name}", getattr(self, name), low=1)
        check_range("search.redraws", self.redraws, low=0)
        check_range("search.stop_uniform_after", self.stop_uniform_after, low=0)
        if self.lookahead > 1 and not self.is_guided:
            raise ValueError(
                f"search.lookahead: {self.lookahead} is for rounds that are chosen one after the other, as ibtree and "
                f"random-tree do; search.method={self.method} has none, set it to 1"
            )
        if self.stop_uniform_after:
            self._check_stop()
        check_range("search.boundary_noise", self.boundary_noise, low=0.0, high=1.0)
        for name in ("segment_tokens", "value_rollouts"):
            check_range(f"search.{name}", getattr(self, name), low=1)
        check_range("search.deepest_share", self.deepest_share, low=0.0, high=1.0, low_open=True)
        if self.step_tokens is not None:
            check_range("search.step_tokens", self.step_tokens, low=1)
        elif not self.separator:
            raise ValueError('search.separator: "" must be at least one character, or set search.step_tokens')

    def _check_stop(self) -> None:
        name, value, least = "search.stop_uniform_after", self.stop_uniform_after, max(self.initial_branches, 2)
        if not self.is_guided:
            raise ValueError(
                f"{name}: {value} moves rounds between trees, which search.method={self.method} does not grow by; "
                "use ibtree or random-tree, or set it to 0"
            )
        if not least <= value < self.trajectories:
            raise ValueError(
                f"{name}: {value} must be at least {least}, the trajectories a tree begins with (and 2), and below "
                f"{self.trajectories}, those it has in all; or 0: never"
            )

    @property
    def is_guided(self) -> bool:
        """Whether a tree grows by rounds of which each is chosen after the last."""
        return self.method in ("ibtree", "random-tree")

    @property
    def rounds_alone(self) -> int:
        """Rounds, the initial one included, before a tree meets the others of its step (`stop_uniform_after`)."""
        later = self.stop_uniform_after - self.initial_branches
        return 1 + -(-later // (self.nodes_per_round * self.branches_per_node))

    @property
    def most_trajectories(self) -> int:
        """The most trajectories that a prompt may have: more than G only where other trees leave theirs."""
        if not self.stop_uniform_after:
            return self.trajectories
        return self.trajectories + (self.rounds - self.rounds_alone) * self.nodes_per_round * self.branches_per_node

    @property
    def trajectories(self) -> int:
        """G, trajectories a prompt."""
        if self.method in ("independent", "treepo", "vineppo"):
            return self.group_size
        later = (self.rounds - 1) * self.nodes_per_round * self.branches_per_node
        if self.method in ("eptree", "tree-grpo"):
            return self.initial_branches * (1 + later)
        return self.initial_branches + later


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """Step-level advantages (paper, section 4)."""

    kind: Literal["ib-tpo", "grpo", "treerl", "treepo", "tree-grpo", "vineppo"] = "ib-tpo"
    """ib-tpo: A_GL + lambda*A_IB on every node; grpo: (R - mean)/std on every trajectory; the rest: rivals."""
    ib_weight: float = 0.1
    """lambda, weight of the local term A_IB; the paper saw 0.5 collapse."""
    pi_ref: Literal["sampling", "reference"] = "sampling"
    """Policy whose step probability scales A_IB: the one that sampled, or the frozen reference."""
    uniform_groups: Literal["skip", "ib_only"] = "skip"
    """Groups whose rewards are all equal: no gradient, or A_IB alone."""
    std: Literal["population", "sample"] = "population"
    """Denominator of the group's reward deviation: G or G - 1."""
    std_eps: float = 1e-6
    """Added to that deviation."""

    def __post_init__(self) -> None:
        check_range("advantage.ib_weight", self.ib_weight, low=0.0)
        check_range("advantage.std_eps", self.std_eps, low=0.0)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The clipped policy-gradient objective and what is averaged over what."""

    clip_low: float = 0.2
    """Ratios below 1 - clip_low carry no gradient where the advantage is negative."""
    clip_high: float = 0.2
    """Ratios above 1 + clip_high carry no gradient where the advantage is positive."""
    kl_coef: float = 0.001
    """Weight of the KL penalty (k3 estimator) to the frozen starting policy; 0 keeps no reference model."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus: the loss falls by this times the mean entropy of the policy, in nats."""
    entropy_advantage_coef: float = 0.0
    """Weight of the mean of entropy times advantage (IBRO): more entropy where the advantage is positive."""
    aggregation: Literal["token", "sequence", "dr_grpo"] = "token"
    """token: mean over all tokens of the optimizer step; sequence: mean of trajectory means; dr_grpo: sum/(G*max)."""
    prefix_weight: Literal["trajectory", "sqrt", "node"] = "trajectory"
    """Weight of a token shared by m trajectories: m, sqrt(m) or 1."""
    old_logprob: Literal["sampler", "recompute"] = "sampler"
    """Where the old policy's log-probs come from; with top-p, top-k or min-p they are always recomputed."""

    def __post_init__(self) -> None:
        check_range("loss.clip_low", self.clip_low, low=0.0, high=1.0)
        check_range("loss.clip_high", self.clip_high, low=0.0)
        for name in ("kl_coef", "entropy_coef", "entropy_advantage_coef"):
            check_range(f"loss.{name}", getattr(self, name), low=0.0)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up; master weights in fp32 when the model is bf16."""

    lr: float = 1e-6
    """Learning rate after the warm-up."""
    beta1: float = 0.9
    """Decay of the gradient's running mean."""
    beta2: float = 0.99
    """Decay of the squared gradient's running mean."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    warmup_steps: int = 5
    """Optimizer steps over which the learning rate rises linearly from 0."""
    final_share: float = 1.0
    """Share of the learning rate left when the run's tokens are spent; in between it falls linearly with them."""
    grad_clip: float = 1.0
    """Largest L2 norm of the gradient; longer ones are scaled down."""
    state: Literal["float32", "8bit"] = "float32"
    """How the running means are kept; 8bit (bitsandbytes) takes 2 bytes a weight instead of 8."""

    def __post_init__(self) -> None:
        check_range("optim.lr", self.lr, low=0.0, low_open=True)
        check_range("optim.beta1", self.beta1, low=0.0, high=1.0, high_open=True)
        check_range("optim.beta2", self.beta2, low=0.0, high=1.0, high_open=True)
        check_range("optim.eps", self.eps, low=0.0, low_open=True)
        check_range("optim.weight_decay", self.weight_decay, low=0.0)
        check_range("optim.warmup_steps", self.warmup_steps, low=0)
        check_range("optim.final_share", self.final_share, low=0.0, high=1.0)
        check_range("optim.grad_clip", self.grad_clip, low=0.0, low_open=True)
        check_choice("optim.state", self.state, ("float32", "8bit"))


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters trained in the weights' place; the KL reference is then the model with its adapters off."""

    rank: int = 0
    """Rank of the adapters; 0 trains the weights themselves."""
    alpha: float = 32.0
    """An adapter counts alpha / rank times."""
    targets: Literal["all", "attention", "mlp"] = "all"
    """Projections adapted: q, k, v, o (attention), gate, up, down (mlp), or all of them."""

    def __post_init__(self) -> None:
        check_range("lora.rank", self.rank, low=0)
        check_range("lora.alpha", self.alpha, low=0.0, low_open=True)
        check_choice("lora.targets", self.targets, ("all", "attention", "mlp"))


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn."""

    temperature: float = 0.7
    """Logits are divided by it; 0 is greedy."""
    top_p: float = 0.95
    """Smallest set of tokens with at least this probability is kept; 1 keeps all."""
    top_k: int = 0
    """Number of most likely tokens kept; 0 keeps all."""
    min_p: float = 0.0
    """Tokens less than this many times as likely as the most likely one are dropped; 0 drops none."""
    max_tokens: int = 2048
    """Most new tokens a trajectory may have below the prompt; what is cut off there gets reward 0."""

    def __post_init__(self) -> None:
        check_range("sampling.temperature", self.temperature, low=0.0)
        check_range("sampling.top_p", self.top_p, low=0.0, high=1.0, low_open=True)
        check_range("sampling.top_k", self.top_k, low=0)
        check_range("sampling.min_p", self.min_p, low=0.0, high=1.0)
        check_range("sampling.max_tokens", self.max_tokens, low=1)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The generation engine."""

    kv_tokens: int = 200_000
    """Tokens of keys and values the pool holds (pages of 16)."""
    max_branches: int = 256
    """Most branches decoded in one step."""
    prefill_tokens: int = 2048
    """Most prompt tokens computed in one step; longer prompts are computed in chunks."""
    release: Literal["auto", "always", "never"] = "auto"
    """Hand the pool's memory back while the policy is updated; auto: on a GPU, or where the run does not fit else."""

    def __post_init__(self) -> None:
        check_range("engine.kv_tokens", self.kv_tokens, low=16)
        check_range("engine.max_branches", self.max_branches, low=1)
        check_range("engine.prefill_tokens", self.prefill_tokens, low=16)
        check_choice("engine.release", self.release, ("auto", "always", "never"))


@dataclass(frozen=True, kw_only=True)
class DigitChainConfig:
    """The built-in task: left-to-right arithmetic mod 10, one operation a step."""

    min_ops: int = 8
    """Fewest operations in a prompt."""
    max_ops: int = 12
    """Most operations in a prompt."""
    grade: Literal["strict", "last"] = "strict"
    """strict: every line of the derivation must be right; last: only the final digit."""
    teacher_exponent: float = 4.0
    """k of the warm-start teacher: each fact is wrong with its own probability 0.9*u^k, u uniform."""

    def __post_init__(self) -> None:
        check_range("digits.min_ops", self.min_ops, low=1)
        check_range("digits.max_ops", self.max_ops, low=self.min_ops)
        check_range("digits.teacher_exponent", self.teacher_exponent, low=0.0, low_open=True)


@dataclass(frozen=True, kw_only=True)
class JsonlConfig:
    """A data file of prompts and answers (docs/data.md), and how completions are graded."""

    prompt_field: str | None = None
    """Field with the prompt, a string or a list of chat messages; dots step into objects. By default the layout's."""
    answer_field: str | None = None
    """Field with the reference answer. By default the layout's."""
    data_fields: tuple[str, ...] = ()
    """Further fields that a reward of your own gets, in `data`."""
    template: str | None = None
    """What the policy is shown, with {prompt} where the prompt goes. By default the layout's."""
    system_prompt: str | None = None
    """Put before every prompt as the chat's system message."""
    few_shot: Path | None = None
    """Data file of the same layout whose rows are all shown as worked examples before every prompt."""
    chat_template: bool = True
    """Format prompts with the tokenizer's chat template where it has one."""
    max_prompt_tokens: int | None = None
    """Rows whose formatted prompt has more tokens are left out."""
    pass_rate_field: str | None = None
    """Field with how often a model solves the prompt, from 0 to 1, by which rows are left out."""
    min_pass_rate: float = 0.0
    """Rows with a lower pass rate are left out."""
    max_pass_rate: float = 1.0
    """Rows with a higher pass rate are left out."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Rows with the same prompt and answer as an earlier one."""
    eval_fraction: float = 0.1
    """Share of the prompts held out for evaluation (at least one); 1 holds out all, for `ibtpo eval`."""
    eval_count: int | None = None
    """Number of prompts held out, instead of a share."""
    eval_data: Path | None = None
    """Data file to evaluate on, instead of holding out rows; its prompts are left out of training."""
    grade: Literal["math", "exact"] = "math"
    """Without --reward. math: math-verify decides equality; exact: the stripped last line equals the answer."""
    grade_workers: int = 1
    """Worker processes that grade."""
    grade_timeout: float = 5.0
    """Seconds after which a reward counts as 0 (and is counted as timed out)."""
    max_failed_share: float = 0.5
    """Stop when more than this share of the last 100 gradings failed or timed out; 1 never stops."""

    def __post_init__(self) -> None:
        if self.template is not None and "{prompt}" not in self.template:
            raise ValueError(f"jsonl.template: {self.template!r} has no {{prompt}}; write it where the prompt goes")
        if self.max_prompt_tokens is not None:
            check_range("jsonl.max_prompt_tokens", self.max_prompt_tokens, low=1)
        check_range("jsonl.min_pass_rate", self.min_pass_rate, low=0.0, high=1.0)
        check_range("jsonl.max_pass_rate", self.max_pass_rate, low=self.min_pass_rate, high=1.0)
        check_range("jsonl.eval_fraction", self.eval_fraction, low=0.0, high=1.0)
        if self.eval_count is not None:
            check_range("jsonl.eval_count", self.eval_count, low=1)
        check_range("jsonl.grade_workers", self.grade_workers, low=1)
        check_range("jsonl.grade_timeout", self.grade_timeout, low=0.0, low_open=True)
        check_range("jsonl.max_failed_share", self.max_failed_share, low=0.0, high=1.0)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out accuracy, always from independent rollouts."""

    prompts: int = 256
    """Held-out prompts."""
    samples: int = 8
    """k of avg@k, pass@k and maj@k: independent samples a prompt; a greedy pass is always added."""
    every: int = 0
    """Evaluate every so many training steps; 0: before and after training only."""

    def __post_init__(self) -> None:
        check_range("eval.prompts", self.prompts, low=1)
        check_range("eval.samples", self.samples, low=1, high=1000)
        check_range("eval.every", self.every, low=0)


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """Supervised training of the built-in policy on the task's worked solutions, from random weights."""

    excess: float = 0.06
    """Loss above the teacher's own entropy, in nats a token, at or below which the learning rate may begin to fall."""
    pass_share: float = 0.4
    """Sampled pass rate, as a share of the teacher's own, that it waits for too; 0 leaves it to the loss alone."""
    decay_updates: int = 100
    """Updates over which it falls, along a cosine, to a tenth; the warm start ends there."""
    max_updates: int = 1200
    """Updates at most, the decay included, whatever was measured."""
    batch_size: int = 64
    """Worked solutions an update."""
    lr: float = 3e-3
    """Learning rate before it falls."""
    warmup_steps: int = 50
    """Updates over which the learning rate rises linearly from 0."""

    def __post_init__(self) -> None:
        check_range("warm_start.excess", self.excess, low=0.0, low_open=True)
        check_range("warm_start.pass_share", self.pass_share, low=0.0)
        check_range("warm_start.decay_updates", self.decay_updates, low=1)
        check_range("warm_start.max_updates", self.max_updates, low=1)
        check_range("warm_start.batch_size", self.batch_size, low=1)
        check_range("warm_start.lr", self.lr, low=0.0, low_open=True)
        check_range("warm_start.warmup_steps", self.warmup_steps, low=0)


@dataclass(frozen=True, kw_only=True)
class SafeguardConfig:
    """What a run keeps for the worst, and when it gives up."""

    keep_checkpoints: int = 3
    """Checkpoints kept, the newest ones."""
    nonfinite_steps: int = 5
    """Optimizer steps in a row that may be skipped for a NaN or Inf in loss or gradient; the next one ends the run."""

    def __post_init__(self) -> None:
        check_range("safeguards.keep_checkpoints", self.keep_checkpoints, low=1)
        check_range("safeguards.nonfinite_steps", self.nonfinite_steps, low=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run."""

    model: str = "built-in"
    """A Hugging Face checkpoint folder, a run folder (its newest checkpoint), or "built-in": tiny, warm-started."""
    task: str = "digit-chain"
    """digit-chain, jsonl (set by --data), or reasoning-gym:NAME."""
    data: Path | None = None
    """Prompts and answers: JSONL, Parquet, or a folder of datasets' save_to_disk; sets the task to jsonl."""
    layout: Literal["auto", "plain", "gsm8k", "math", "dapo", "aime"] = "auto"
    """How the data file is written: which fields, where the answer stands, the prompt's template; auto: as it looks."""
    reward: tuple[str, ...] = ()
    """NAME[:WEIGHT] ...: math, exact, format, regex=PATTERN, package.module:function; by default the task's own."""
    out: Path | None = None
    """Run folder to create; by default runs/<task>-<preset>-<date and time>. Of `ibtpo eval`: where completions go."""
    resume: Path | None = None
    """Run folder to continue from its last checkpoint."""
    seed: int = 0
    """Decides prompts, samples and initial weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type the model computes in; master weights are float32 either way."""
    parity: Literal["fast", "bitwise"] = "fast"
    """bitwise: the trainer finds the sampler's log-probs to the last bit (CPUs only); fast: within rounding."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""
    distributed: Literal["auto", "ddp", "fsdp"] = "auto"
    """Under torchrun. ddp: a whole copy in every process; fsdp: shares of one; auto: ddp if that fits."""
    distributed_timeout: float = 1800.0
    """Seconds that the processes of a run wait for the last of them, before it is named and the run ends."""
    sampled_tokens: int = 600_000
    """Training ends when this many tokens have been sampled."""
    prompts_per_step: int = 24
    """Prompts (trees) a training step."""
    mini_batches: int = 2
    """Optimizer steps the trees of a training step are divided over."""
    micro_batch_tokens: int = 16_384
    """Most packed tokens in one forward and backward; larger trees are split at nodes, the gradient is the same."""
    gradient_checkpointing: bool = False
    """Keep no activations inside decoder layers, compute them again in the backward: less memory, the same gradient."""
    checkpoint_every: int = 10
    """Training steps between checkpoints; the last one is always written."""
    trees_per_step: int = 4
    """Grown trees kept of every training step, for `ibtpo view`."""
    trees_megabytes: float = 256.0
    """Most disk the kept trees may take; beyond it steps are dropped evenly over the run."""
    report_trees: int = 48
    """Of the kept trees, how many the report holds, spread over the run."""
    log: str = ""
    """Log to wandb, trackio or both (wandb,trackio) as well; TensorBoard events are always written."""
    ib: IBConfig = field(default_factory=IBConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    jsonl: JsonlConfig = field(default_factory=JsonlConfig)
    digits: DigitChainConfig = field(default_factory=DigitChainConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    safeguards: SafeguardConfig = field(default_factory=SafeguardConfig)

    def __post_init__(self) -> None:
        if self.advantage.kind == "vineppo" and self.search.method != "vineppo":
            raise ValueError("advantage.kind: vineppo needs the rollouts of search.method=vineppo; set that too")
        if self.search.method == "treepo" and self.search.segment_tokens >= self.sampling.max_tokens:
            limit = f"sampling.max_tokens={self.sampling.max_tokens}"
            raise ValueError(f"search.segment_tokens: {self.search.segment_tokens} must be below {limit}")
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("parity", self.parity, ("fast", "bitwise"))
        check_choice("distributed", self.distributed, ("auto", "ddp", "fsdp"))
        check_range("distributed_timeout", self.distributed_timeout, low=0.0, low_open=True)
        check_choice("layout", self.layout, ("auto", "plain", "gsm8k", "math", "dapo", "aime"))
        check_range("sampled_tokens", self.sampled_tokens, low=1)
        check_range("prompts_per_step", self.prompts_per_step, low=1)
        check_range("mini_batches", self.mini_batches, low=1, high=self.prompts_per_step)
        check_range("micro_batch_tokens", self.micro_batch_tokens, low=1)
        check_range("checkpoint_every", self.checkpoint_every, low=1)
        check_range("trees_per_step", self.trees_per_step, low=0)
        check_range("trees_megabytes", self.trees_megabytes, low=0.0, low_open=True)
        check_range("report_trees", self.report_trees, low=0)
        check_choice("log", self.log, ("", "wandb", "trackio", "wandb,trackio", "trackio,wandb"))
