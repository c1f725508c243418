"""The training loop: grow trees, update the policy on them, log, save; it can be stopped and resumed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ibtpo.checkpoints import latest_checkpoint
from ibtpo.config import TrainConfig
from ibtpo.console import say
from ibtpo.disk import RunFolderError, flush_tree, no_space, write_atomically
from ibtpo.distributed import ALONE, Group, Mode, make_grower, make_learner
from ibtpo.dynamic_sampling import grow_mixed
from ibtpo.evaluation import evaluate
from ibtpo.grow import Grower
from ibtpo.memory_plan import MemoryPlan
from ibtpo.metrics import tree_metrics
from ibtpo.model_card import CARD, model_card, save_generation_config
from ibtpo.optim import NonFinite, OtherForm
from ibtpo.policy import Policy, load_policy
from ibtpo.process_memory import peak_host_memory
from ibtpo.progress import Tracker, step_note, track
from ibtpo.run_format import CONFIG
from ibtpo.runlog import RunFolder
from ibtpo.search import make_search
from ibtpo.setup import find_nonfinite, make_sampling
from ibtpo.steps import step_splitter
from ibtpo.stopping import Interrupted, StopRequest
from ibtpo.tasks import DataTask, Problem, Task, TeachableTask
from ibtpo.treelog import tree_record
from ibtpo.update import Updater, frozen_copy
from ibtpo.warmstart import WarmStart, warm_start_of
from ibtpo_engine import Engine, Model, OutOfPages, Tree
from ibtpo_engine.adapter_folder import is_adapter_folder

START = "start"  # folder in the run folder: the warm-started policy, which a resumed run loads as its frozen reference


@dataclass
class State:
    """Progress of a run; with the weights and the optimizer state, all that is needed to resume.

    Random numbers need no state: samples are keyed by seed, tree (the problem's index) and position, problems by seed
    and index.
    """

    step: int = 0
    sampled_tokens: int = 0
    next_problem: int = 0
    nonfinite_in_a_row: int = 0
    reward_counts: dict[str, float] = field(default_factory=dict)  # `Task.counts`, summed over the whole run
    problems: str | None = None  # `DataTask.fingerprint` of a data file; None in older checkpoints


class Trainer:
    """One training run, in one process or in several, of which only rank 0 logs and saves.

    Args:
        config: configuration of the run.
        folder: its open run folder.
        policy: trained in place.
        task: poses problems and grades completions.
        engine: samples from the policy.
        console: shows progress.
        on_step: called with the number of each training step, once it is logged and saved; an exception ends the run.
        plan: its planned memory, logged beside the measured peak; also says whether the KV pool is released in updates.
        group: the processes of the run.
        mode: how several processes train: data-parallel or sharded.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        policy: Policy,
        task: Task,
        engine: Engine,
        console: Console,
        on_step: Callable[[int], None] = lambda step: None,
        plan: MemoryPlan | None = None,
        *,
        group: Group = ALONE,
        mode: Mode = "ddp",
    ) -> None:
        self.config = config
        self.folder = folder
        self.policy = policy
        self.task = task
        self.console = console
        self.on_step = on_step
        self.plan = plan
        self.state = State(problems=task.fingerprint if isinstance(task, DataTask) else None)
        self.stop = StopRequest()
        self.sampling = make_sampling(config, policy)
        self.group, self.mode = group, mode
        self.model, self.optimizer = make_learner(config, policy.model, group, mode)
        self.engine = engine
        grower = Grower(engine, task, policy.tokenizer, config.jsonl, self.stop.requested)
        self.grower = make_grower(grower, group)
        self.splitter = step_splitter(policy.tokenizer, config.search)
        self.held_out = task.eval_problems(config.eval.prompts)
        self._updater: Updater | None = None
        self._started = False  # is there a policy worth saving?
        self._whole = True  # do policy, optimizer, state and log belong to the same step?

    def run(self) -> None:
        """Evaluate, train until the token budget is spent, evaluate; Ctrl-C, SIGTERM or SIGHUP saves a checkpoint.

        Raises:
            Interrupted: the run was stopped; a checkpoint was written, unless the warm start was still in progress.
            NonFinite: too many optimizer steps in a row, or the weights to be saved, hold NaN or Inf.
            RunFolderError: the disk is full.
            GraderError: too many gradings failed. This and any other error carries a note that says how to resume and
                from which checkpoint: the last step's, unless the error came in the middle of an update.
        """
        with self.stop.on_signals(self.console, at_once=self.group.size == 1):  # torchrun sends a Ctrl-C twice
            try:
                if self.state.step == 0:
                    self._start()
                self._evaluate_if_due()
                self._train()
                self._evaluate("Evaluating after")
            except Interrupted:
                self._agree_to_stop()
                kept = f"saved {self._checkpoint()}" if self._started else "nothing is saved of a warm start"
                how = f"{kept}; continue with: ibtpo train --resume {self.folder.path}"
                raise Interrupted(f"stopped at step {self.state.step}; {how}", self.stop.signal) from None
            except (NonFinite, RunFolderError):  # nothing can be saved; their messages say how to go on
                raise
            except Exception as error:
                kept = self._keep_last_step()
                larger = " and a larger --engine.kv-tokens" if isinstance(error, OutOfPages) else ""
                error.add_note(f"{kept}; continue with: ibtpo train --resume {self.folder.path}{larger}")
                raise

    def resume(self) -> None:
        """Resume from the folder's last intact checkpoint; a run killed before its first checkpoint starts over.

        Raises:
            ValueError: the checkpoint is of another version, its optimizer state has another form, or the data file has
                changed since.
        """
        last = self.folder.last
        if last is None:
            return
        try:
            state = State(**json.loads((last.path / "state.json").read_text(encoding="utf-8")))
            self.optimizer.load_state(load_file(last.path / "optimizer.safetensors"))
        except OtherForm as error:
            raise ValueError(
                f"resume: {error}; restore it in {self.folder.path / CONFIG}, or start a new run from the weights "
                f"with --model {last.path}"
            ) from None
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise ValueError(
                f"resume: state.json or optimizer.safetensors of {last.path} are not of this version ({error}); "
                f"resume with the version that wrote them, or start a new run from its weights with --model {last.path}"
            ) from None
        problems = self.state.problems
        if state.problems not in (None, problems):
            raise ValueError(
                f"resume: {self.config.data}, jsonl.eval_data or jsonl.few_shot has changed (before: {state.problems}, "
                f"now: {problems}), so the problems would not be the same; restore the file, or start a new run from "
                f"the weights with --model {last.path}"
            )
        self.state = replace(state, problems=problems)
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
        with track(self.console, "Warm start", config.max_updates) as tracker:

            def on_update(state: WarmStart) -> None:
                tracker.total = state.total
                tracker.advance(1, f"loss {state.loss:.3f}, {state.excess:.3f} above the teacher's")
                if self._agree_to_stop():
                    raise Interrupted

            end = warm_start_of(
                self.config,
                self.policy,
                task,
                self.grower,
                self.sampling,
                on_update=on_update,
                agreed=lambda excess: self.group.gather(excess, "compare their warm starts")[0],
            )
        self.group.copy_from_leader(self.policy.model.parameters())
        self.engine.weights_changed()
        self.model, self.optimizer = make_learner(self.config, self.policy.model, self.group, self.mode)
        if self.group.leads:
            self.policy.save(self.folder.path / START)
            flush_tree(self.folder.path / START)
        seconds = time.perf_counter() - begin
        self.folder.log(
            0,
            {
                "warm_start_updates": end.updates,
                "warm_start_loss": end.loss,
                "warm_start_excess": end.excess,
                "warm_start_seconds": seconds,
            },
        )

    def _evaluate(self, title: str) -> None:
        """Measure held-out accuracy at this step, unless the log of a resumed run already has it."""
        known = any(row["step"] == self.state.step for row in self.folder.evaluations)
        if self.group.gather(known, "evaluate")[0]:  # rank 0 writes the log
            self._renew_card()  # a run killed after logging may not have written it
            return
        counted = self.task.counts()
        with track(self.console, title, 2 * len(self.held_out)) as tracker:
            values = evaluate(
                self.grower,
                self.held_out,
                self.sampling,
                self.config.eval.samples,
                on_prompt=lambda tree: tracker.advance(1),
            )
        self.engine.weights_changed()  # drop prefixes cached in evaluation: a resumed run lacks them
        values |= {f"eval_{name}": value for name, value in self._counted_since(counted).items()}
        self.folder.log(self.state.step, values)
        self._renew_card()

    def _evaluate_if_due(self) -> None:
        if self.config.eval.every and self.state.step and self.state.step % self.config.eval.every == 0:
            self._evaluate(f"Evaluating at step {self.state.step}")

    def _train(self) -> None:
        self._updater = Updater(
            self.model, self.optimizer, self._reference(), self.config, group=self.group, full=self.policy.model
        )
        self._updater.nonfinite_in_a_row = self.state.nonfinite_in_a_row
        with track(self.console, "Training", self.config.sampled_tokens) as tracker:
            tracker.advance(self.state.sampled_tokens)
            while self.state.sampled_tokens < self.config.sampled_tokens:
                self._step(tracker)
                if self._agree_to_stop():
                    raise Interrupted
        self._checkpoint()

    def _step(self, tracker: Tracker) -> None:
        begin = time.perf_counter()
        before = self.engine.stats()
        counted = self.task.counts()
        trees, problems, reward_seconds = self._grow()
        self._whole = False
        for name, value in self._counted_since(counted).items():  # saved: a resumed run adds to them
            self.state.reward_counts[name] = self.state.reward_counts.get(name, 0) + value
        sampled = time.perf_counter()
        assert self._updater is not None
        spent = min(self.state.sampled_tokens / self.config.sampled_tokens, 1.0)
        self.optimizer.scale = 1.0 - (1.0 - self.config.optim.final_share) * spent
        values = tree_metrics(trees)
        with self._pool_released():
            values |= self._updater.update(trees)
        self.engine.weights_changed()
        end = time.perf_counter()
        computed = sum(self.group.gather(self.engine.stats()["computed"] - before["computed"], "count tokens"))
        values |= {
            "tokens_computed": computed,
            "sampling_efficiency": values["trajectory_tokens"] / computed,
            "sampling_seconds": sampled - begin - reward_seconds,
            "reward_seconds": reward_seconds,
            "training_seconds": end - sampled,
            "step_seconds": end - begin,
            "tokens_per_second": values["tokens_sampled"] / (sampled - begin - reward_seconds),
        }
        self._warn_of_chains(values)
        self._finish_step(values, trees, problems)
        tracker.advance(int(values["tokens_sampled"]), step_note(self.state.step, values))

    def _finish_step(self, values: dict[str, float], trees: list[Tree], problems: list[Problem]) -> None:
        state = self.state
        state.step += 1
        state.sampled_tokens += int(values["tokens_sampled"])
        state.next_problem += len(problems)
        assert self._updater is not None
        state.nonfinite_in_a_row = self._updater.nonfinite_in_a_row
        values |= state.reward_counts
        values |= self._memory()
        self.folder.log(state.step, values)
        self._keep_trees(trees, problems)
        self._whole = True
        if state.step % self.config.checkpoint_every == 0:
            self._checkpoint()
        self._evaluate_if_due()
        self.on_step(state.step)

    def _warn_of_chains(self, values: dict[str, float]) -> None:
        """Warn if no trajectory of the first step has a second reasoning step: trees can branch at the prompt only."""
        search = self.config.search
        if self.state.step == 0 and search.is_guided and values.get("response_steps") == 1.0:
            found = f"{search.separator!r} (search.separator)" if search.step_tokens is None else "search.step_tokens"
            say(
                self.console,
                f"warning: no trajectory of the first step has a second reasoning step, since {found} ends none; "
                "trees can branch at the prompt only. Look at the texts in `ibtpo view`, and set search.separator to "
                "the text between steps",
                style="yellow",
            )

    @contextmanager
    def _pool_released(self) -> Iterator[None]:
        """Release the KV pool during the block if the plan says so; the update makes its contents stale anyway."""
        if self.plan is None or not self.plan.release:
            yield
            return
        self.engine.release()
        yield
        if self.policy.model.device.type == "cuda":
            torch.cuda.empty_cache()  # return the update's fragmented memory, so that the pool fits again
        self.engine.restore()

    def _memory(self) -> dict[str, float]:
        device = self.policy.model.device
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_host_memory()
        peak = max(self.group.gather(peak, "measure memory"))
        return {"peak_memory": float(peak)} | ({} if self.plan is None else {"memory_planned": float(self.plan.total)})

    def _counted_since(self, before: Mapping[str, float]) -> dict[str, float]:
        """`Task.counts` since `before`, summed over all processes, which have the same names."""
        new = {name: value - before[name] for name, value in self.task.counts().items()}
        counts = self.group.gather(new, "count rewards")
        return {name: sum(count[name] for count in counts) for name in new}

    def _grow(self) -> tuple[list[Tree], list[Problem], float]:
        """Trees on the next problems, all problems drawn for them, and the seconds spent in grading."""
        config = self.config
        return grow_mixed(
            self.grower,
            self.task.train_problem,
            make_search(config.search, config.ib, self.splitter, config.sampling.max_tokens),
            self.sampling,
            first=self.state.next_problem,
            count=config.prompts_per_step,
            redraws=config.search.redraws,
        )

    def _keep_trees(self, trees: list[Tree], problems: list[Problem]) -> None:
        """Keep the first trees of a step for the viewer and the report."""
        kept = list(zip(trees, problems, strict=True))[: self.config.trees_per_step]
        for index, (tree, problem) in enumerate(kept):
            record = tree_record(
                tree, self.policy.tokenizer.decode, piece=self.splitter.text, answer=problem.answer, index=index
            )
            self.folder.add_tree(self.state.step, record, most_bytes=self.config.trees_megabytes * 1e6)

    # ---- saving and stopping ---------------------------------------------------------------------------------

    def _reference(self) -> Model | None:
        """The frozen starting policy, if the configuration needs it; with new adapters, the model without them."""
        if not self.config.needs_reference:
            return None
        if self.policy.model.adapters is not None and not is_adapter_folder(self.config.model):
            return self.policy.model
        if self.state.step == 0:
            return frozen_copy(self.policy.model)
        start = self.folder.path / START if self.config.model == "built-in" else Path(self.config.model)
        model = self.policy.model
        return frozen_copy(load_policy(start, dtype=model.dtype, device=model.device).model)

    def _checkpoint(self) -> Path:
        if fault := find_nonfinite(self.policy.model):
            raise NonFinite(
                f"{fault} at step {self.state.step}; nothing was saved. Lower optim.lr and continue from the last "
                f"checkpoint with --resume {self.folder.path}"
            )

        optimizer = self.optimizer.state()  # gathered from all processes

        def write(path: Path) -> None:
            self.policy.save(path)
            save_generation_config(self.policy, self.config, path)
            (path / CARD).write_text(self._card(), encoding="utf-8")
            save_file(optimizer, path / "optimizer.safetensors")
            (path / "state.json").write_text(json.dumps(asdict(self.state)), encoding="utf-8")

        return self.folder.checkpoint(self.state.step, write, keep=self.config.safeguards.keep_checkpoints)

    def _keep_last_step(self) -> str:
        """Save the last step if possible; returns which checkpoint the run can be resumed from.

        Sampling, grading and evaluation change nothing that a checkpoint holds, so it can be saved if they fail.
        Saving needs all processes of a group, and the others may have ended.
        """
        if self._started and self._whole and self.group.size == 1:
            with suppress(Exception):  # must not hide the error that ends the run
                return f"saved {self._checkpoint()}"
        last = latest_checkpoint(self.folder.path)
        return "nothing is saved" if last is None else f"saved before: {last.path}"

    def _card(self) -> str:
        return model_card(
            self.config,
            step=self.state.step,
            sampled_tokens=self.state.sampled_tokens,
            rows=self.folder.evaluations,
            chat=bool(self.policy.tokenizer.chat_template),
            adapters=self.policy.model.adapters is not None,
        )

    def _renew_card(self) -> None:
        """Rewrite the model card of this step's checkpoint, if there is one, with the latest evaluation; on rank 0."""
        if not self.group.leads:
            return
        last = latest_checkpoint(self.folder.path)
        if last is not None and last.step == self.state.step:
            with no_space(self.folder.path, "everything"):
                write_atomically(last.path / CARD, self._card())

    def _agree_to_stop(self) -> bool:
        """Has any process been asked to stop? If so, all processes stop."""
        agreed = max(self.group.gather(self.stop.signal, "ask who was told to stop"))
        if agreed:  # a signal that arrived since the exchange must not be overwritten by 0
            self.stop.signal = agreed
        return agreed != 0
