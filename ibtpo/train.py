"""A training run: grow trees, update on them, measure, save; from a fresh start or a checkpoint."""

from __future__ import annotations

import gc
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
from ibtpo_engine import Engine, Model, Sampling, Tree
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ibtpo.config import TrainConfig
from ibtpo.evaluate import evaluate
from ibtpo.grow import Grower, Interrupted
from ibtpo.metrics import tree_metrics
from ibtpo.optim import MasterAdamW
from ibtpo.policy import Policy, built_in_policy, load_policy
from ibtpo.progress import Tracker, track
from ibtpo.report import write_report
from ibtpo.runlog import RunFolder, latest_checkpoint, tree_record
from ibtpo.search import make_search
from ibtpo.steps import StepSplitter
from ibtpo.tasks import DigitChain, JsonlTask, Problem, Task, TeachableTask, format_prompt, make_task
from ibtpo.update import Updater, frozen_copy
from ibtpo.warmstart import warm_start

START = "start"  # in the run folder: the warm-started policy, where a frozen reference of it is needed


@dataclass
class State:
    """How far a run is; with the weights and the optimizer, all that is needed to go on."""

    step: int = 0
    sampled_tokens: int = 0
    next_problem: int = 0


class Trainer:
    """One run in one process.

    Args:
        config: the run.
        folder: its open run folder.
        policy: trained in place.
        task: poses and grades.
        engine: samples from the policy.
        console: where progress goes.
    """

    def __init__(
        self, config: TrainConfig, folder: RunFolder, policy: Policy, task: Task, engine: Engine, console: Console
    ) -> None:
        self.config = config
        self.folder = folder
        self.policy = policy
        self.task = task
        self.console = console
        self.state = State()
        self.stop_requested = False
        self.stop_signal = 0  # the signal that asked for it
        self.sampling = make_sampling(config, policy)
        self.optimizer = MasterAdamW(policy.model, config.optim)
        self.engine = engine
        self.grower = Grower(engine, task, policy.tokenizer, config.jsonl, lambda: self.stop_requested)
        splitter = StepSplitter(policy.tokenizer, config.search.separator, step_tokens=config.search.step_tokens)
        self.search = make_search(config.search, config.ib, splitter, config.sampling.max_tokens)
        self.held_out = task.eval_problems(config.eval.prompts)
        self._updater: Updater | None = None
        self._started = False  # is there a policy worth saving?

    def run(self) -> None:
        """Evaluate, train until the token budget is spent, evaluate; Ctrl-C or SIGTERM saves a checkpoint.

        Raises:
            Interrupted: the run was stopped; a checkpoint was written, unless the warm start was still under way.
        """
        with self._stop_on_signal():
            try:
                if self.state.step == 0:
                    self._start()
                self._train()
                self._evaluate("Evaluating after")
            except Interrupted:
                kept = f"saved {self._checkpoint()}" if self._started else "nothing is saved of a warm start"
                how = f"{kept}; go on with: ibtpo train --resume {self.folder.path}"
                raise Interrupted(f"stopped at step {self.state.step}; {how}", self.stop_signal) from None

    def resume(self) -> None:
        """Go on from the folder's last checkpoint; without one the run starts over."""
        last = latest_checkpoint(self.folder.path)
        if last is None:
            return
        try:
            self.state = State(**json.loads((last.path / "state.json").read_text(encoding="utf-8")))
            self.optimizer.load_state(load_file(last.path / "optimizer.safetensors"))
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise ValueError(
                f"resume: {last.path} is damaged, its state.json or optimizer.safetensors cannot be read ({error}); "
                "remove this folder to go on from the checkpoint before it, or give it to --model to start a new run"
            ) from None
        self.engine.weights_changed()
        self._started = True

    # ---- phases ----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self.config.model == "built-in" and not self._started:
            self._warm_start()
        self._started = True
        self._checkpoint()
        self._evaluate("Evaluating before")

    def _warm_start(self) -> None:
        task, config = self.task, self.config.warm_start
        assert isinstance(task, TeachableTask)  # see train()
        begin = time.perf_counter()
        with track(self.console, "Warm start", config.updates) as tracker:

            def on_update(update: int, loss: float) -> None:
                tracker.advance(1, f"loss {loss:.3f}")
                if self.stop_requested:
                    raise Interrupted

            loss = warm_start(
                self.policy, task, config, seed=self.config.seed, problem=task.train_problem, on_update=on_update
            )
        self.engine.weights_changed()
        if Updater.needs_reference(self.config):
            self.policy.save(self.folder.path / START)
        seconds = time.perf_counter() - begin
        self.folder.log(0, {"warm_start_loss": loss, "warm_start_seconds": seconds})

    def _evaluate(self, title: str) -> None:
        with track(self.console, title, 2 * len(self.held_out)) as tracker:
            values = evaluate(
                self.grower,
                self.held_out,
                self.sampling,
                self.config.eval.samples,
                on_prompt=lambda tree: tracker.advance(1),
            )
        self.folder.log(self.state.step, values)

    def _train(self) -> None:
        self._updater = Updater(self.policy.model, self.optimizer, self._reference(), self.config)
        with track(self.console, "Training", self.config.sampled_tokens) as tracker:
            tracker.advance(self.state.sampled_tokens)
            while self.state.sampled_tokens < self.config.sampled_tokens:
                self._step(tracker)
                if self.stop_requested:
                    raise Interrupted
        self._checkpoint()

    def _step(self, tracker: Tracker) -> None:
        begin = time.perf_counter()
        before = self.engine.stats()
        problems, keys = self._next_problems()
        trees, reward_seconds = self.grower.grow(problems, keys, self.search, self.sampling)
        sampled = time.perf_counter()
        assert self._updater is not None
        values = tree_metrics(trees) | self._updater.update(trees)
        self.engine.weights_changed()
        end = time.perf_counter()
        computed = self.engine.stats()["computed"] - before["computed"]
        values |= {
            "tokens_computed": computed,
            "sampling_efficiency": values["trajectory_tokens"] / computed,
            "sampling_seconds": sampled - begin - reward_seconds,
            "reward_seconds": reward_seconds,
            "training_seconds": end - sampled,
            "step_seconds": end - begin,
            "tokens_per_second": values["tokens_sampled"] / (sampled - begin - reward_seconds),
        }
        self._finish_step(values, trees, problems)
        tracker.advance(
            int(values["tokens_sampled"]),
            f"step {self.state.step}  avg-rate (iid) {values['avg_rate_iid']:.2f}  eff-rate {values['eff_rate']:.2f}",
        )

    def _finish_step(self, values: dict[str, float], trees: list[Tree], problems: list[Problem]) -> None:
        state = self.state
        state.step += 1
        state.sampled_tokens += int(values["tokens_sampled"])
        state.next_problem += len(problems)
        if isinstance(self.task, JsonlTask) and self.task.grader is not None:
            values |= {"grade_timeouts": self.task.grader.timeouts, "grade_failures": self.task.grader.failures}
        if self.policy.model.device.type == "cuda":
            values["peak_memory"] = float(torch.cuda.max_memory_allocated(self.policy.model.device))
        self.folder.log(state.step, values)
        self._keep_tree(trees[0], problems[0])
        if state.step % self.config.checkpoint_every == 0:
            self._checkpoint()
        if self.config.eval.every and state.step % self.config.eval.every == 0:
            self._evaluate(f"Evaluating at step {state.step}")

    def _next_problems(self) -> tuple[list[Problem], list[int]]:
        indices = range(self.state.next_problem, self.state.next_problem + self.config.prompts_per_step)
        return [self.task.train_problem(index) for index in indices], list(indices)

    def _keep_tree(self, tree: Tree, problem: Problem) -> None:
        """Keep the first tree of a step for the report."""
        if self.config.report_trees:
            record = tree_record(
                tree, self.policy.tokenizer.decode, answer=problem.answer, title=f"step {self.state.step}"
            )
            self.folder.add_tree(self.state.step, record)

    # ---- saving and stopping ---------------------------------------------------------------------------------

    def _reference(self) -> Model | None:
        """The frozen starting policy, if the configuration needs it."""
        if not Updater.needs_reference(self.config):
            return None
        if self.state.step == 0:
            return frozen_copy(self.policy.model)
        start = self.folder.path / START if self.config.model == "built-in" else Path(self.config.model)
        model = self.policy.model
        return frozen_copy(load_policy(start, dtype=model.dtype, device=model.device).model)

    def _checkpoint(self) -> Path:
        def write(path: Path) -> None:
            self.policy.save(path)
            save_file(self.optimizer.state(), path / "optimizer.safetensors")
            (path / "state.json").write_text(json.dumps(asdict(self.state)), encoding="utf-8")

        return self.folder.checkpoint(self.state.step, write)

    @contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM asks for a stop at the next safe point; a second Ctrl-C stops at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.stop_requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_requested, self.stop_signal = True, number
            self.console.print("\nstopping at the next safe point; Ctrl-C again to stop at once", highlight=False)

        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's
            return
        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def make_sampling(config: TrainConfig, policy: Policy) -> Sampling:
    """The engine's sampling parameters of a run."""
    sampling = config.sampling
    return Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        stop_tokens=policy.stops,
    )


def make_engine(config: TrainConfig, policy: Policy) -> Engine:
    """The engine of a run, borrowing the policy's parameters.

    Raises:
        ValueError: there is no memory for its pool.
    """
    try:
        return Engine(
            policy.model,
            kv_tokens=config.engine.kv_tokens,
            seed=config.seed,
            max_branches=config.engine.max_branches,
            prefill_tokens=config.engine.prefill_tokens,
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


def train(config: TrainConfig, console: Console) -> Path:
    """Run or resume a training run to its end.

    Everything that can be wrong with the input is checked before the run folder is made.

    Returns:
        the run folder; the trained policy is its last checkpoint.

    Raises:
        ValueError: the input cannot be used; the message names file, field and remedy.
        Interrupted: stopped by Ctrl-C or SIGTERM, with a checkpoint to continue from.
    """
    if config.sampling.temperature == 0:
        raise ValueError("sampling.temperature: 0 is greedy, all trajectories would be alike; set it above 0 to train")
    out = config.resume or config.out or default_folder(config)
    source: Path | str = config.model
    if config.resume is not None and (last := latest_checkpoint(config.resume)) is not None:
        source = last.path
    dtype, device = getattr(torch, config.dtype), choose_device(config.device)
    if source == "built-in":
        policy = built_in_policy(config.seed, dtype=dtype, device=device)
    else:
        policy = load_policy(source, dtype=dtype, device=device)
    task = make_task(config)
    try:
        if source == "built-in" and not isinstance(task, TeachableTask):
            raise ValueError(
                f"model: the built-in policy knows the characters of digit-chain only, task {task.name} needs a "
                "checkpoint; give one with --model DIR"
            )
        check_prompts(task, policy, config)
        engine = make_engine(config, policy)
        opened = RunFolder.create(out, config) if config.resume is None else RunFolder.open(out)
        gc.collect()
        gc.freeze()  # what is loaded by now stays; the collector need not walk it while trees come and go
        with opened as folder:
            trainer = Trainer(config, folder, policy, task, engine, console)
            if config.resume is not None:
                trainer.resume()
            try:
                trainer.run()
            finally:
                report = write_report(out)
                console.print(f"report: {report}", highlight=False, soft_wrap=True)
    finally:
        gc.unfreeze()
        task.close()
    return out


def default_folder(config: TrainConfig) -> Path:
    """runs/<task>-<method>-<date and time>."""
    return Path("runs") / f"{config.task.replace(':', '-')}-{config.advantage.kind}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_prompts(task: Task, policy: Policy, config: TrainConfig) -> None:
    """Raise ValueError, naming the line of a data file, if a prompt is not for this policy or leaves it no room."""
    if isinstance(task, JsonlTask):
        problems = [task.train_problem(index) for index in range(task.num_train)] + task.eval_problems(sys.maxsize)
    elif isinstance(task, DigitChain):
        problems = [task.longest_problem()]
    else:
        problems = task.eval_problems(config.eval.prompts)
    for problem in problems:
        fault = _fault(format_prompt(policy.tokenizer, problem, config.jsonl), policy, config.engine.kv_tokens)
        if fault is not None:
            from_file = isinstance(task, JsonlTask)
            where = f"{config.data}, line {problem.data['line']}" if from_file else f"task {task.name}"
            raise ValueError(f"{where}: {fault}")


def _fault(prompt: list[int], policy: Policy, pool: int) -> str | None:
    """What is wrong with a prompt, and the remedy."""
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
