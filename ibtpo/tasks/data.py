"""A task read from a data file: filtered, divided into training and evaluation, shuffled every epoch.

Only numbers are kept in memory, a few bytes a row; a row is read when its problem is requested:

    file -> rows that pass the filters -> prompts held out | rows trained on -> a new order every epoch -> problem i
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from ibtpo.config import JsonlConfig
from ibtpo.printable import counted
from ibtpo.rewards import RewardSpec
from ibtpo.tasks.base import Problem, seeded
from ibtpo.tasks.grades import RewardGrades
from ibtpo.tasks.layouts import Layout, Unanswered, choose_layout, get_field, has_field, read_example, read_problem
from ibtpo.tasks.rows import Rows, fail, open_rows
from ibtpo_engine.arrays import Longs

_Hashes = npt.NDArray[np.uint64]

_SPLIT, _ORDER = range(2)  # streams of random numbers


class DataTask(RewardGrades):
    """Prompts and answers of a file, divided by seed into training and evaluation rows.

    Rows with the same prompt are always on the same side. Training passes over its rows in a new order every epoch;
    seed and problem index decide the row.

    Attributes:
        notes: sentences for the user about what was read, chosen and left out.

    Raises:
        ValueError: the file is missing or has an invalid row; file, line and field are named.
        GraderError: a reward cannot be loaded.
    """

    name = "jsonl"

    def __init__(
        self,
        path: Path,
        config: JsonlConfig,
        seed: int = 0,
        separator: str = "\n\n",
        *,
        layout: str = "auto",
        rewards: tuple[RewardSpec, ...] = (),
    ) -> None:
        self.separator = separator
        self.seed = seed
        self.notes: list[str] = []
        self._file = self._held_out_file = _File(path, layout, config)
        self._examples = _read_examples(config, self._file.layout)
        if config.eval_data is None:
            self._train, self._eval = _divide(self._file, config, seed)
        else:
            self._held_out_file = _File(config.eval_data, layout, config, rated=False)
            self._eval = _first_of_each(self._held_out_file.prompts)
            seen = np.isin(self._file.prompts, self._held_out_file.prompts)
            self._train = np.flatnonzero(~seen)
            if seen.any():
                left_out = counted(int(seen.sum()), "row")
                self.notes.append(f"{path}: {left_out} left out, since {config.eval_data} has the same prompts")
        for file in dict.fromkeys((self._file, self._held_out_file)):
            self.notes += file.notes
        self.notes.append(self._amounts())
        self._epoch, self._order = -1, np.empty(0, np.int64)
        super().__init__(rewards or (RewardSpec(config.grade),), config)

    def train_problem(self, index: int) -> Problem:
        """The training problem of this index; every ``num_train`` indices are one pass over the rows.

        Raises:
            ValueError: every row is held out.
        """
        if not len(self._train):
            of_its_own = self._held_out_file is not self._file
            remedy = "give jsonl.eval_data other prompts" if of_its_own else "lower jsonl.eval_fraction"
            raise ValueError(f"{self._file.rows.path}: no row is left to train on; {remedy}")
        epoch, row = divmod(index, len(self._train))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, seeded(self.seed, _ORDER, epoch).permutation(len(self._train))
        return self._file.problem(int(self._train[self._order[row]]), self._examples)

    @property
    def fingerprint(self) -> str:
        """The number of rows and a digest of all problems, training and held out, examples included; no paths."""
        parts = (self._file.digest, self._held_out_file.digest, self._examples)
        return f"{len(self._file.prompts):,} rows, {hashlib.blake2b(repr(parts).encode(), digest_size=4).hexdigest()}"

    @property
    def num_train(self) -> int:
        """Number of training rows."""
        return len(self._train)

    @property
    def num_eval(self) -> int:
        """Number of held-out prompts."""
        return len(self._eval)

    def eval_problems(self, n: int) -> Sequence[Problem]:
        """The first `n` held-out prompts, or all if there are fewer; each is read when it is looked at."""
        return _Problems(self._held_out_file, self._eval[:n], self._examples)

    def problems(self) -> Iterator[Problem]:
        """Every problem, training problems first."""
        for file, rows in ((self._file, self._train), (self._held_out_file, self._eval)):
            yield from _Problems(file, rows, self._examples)

    def keep(self, wanted: Callable[[Problem], bool], unwanted: str) -> None:
        """Drop every row, training and held-out, whose problem is not `wanted`; `unwanted` describes them in a note.

        Raises:
            ValueError: no training or no held-out row is left, and there were some.
        """
        path = self._file.rows.path
        train = self._wanted(self._file, self._train, wanted)
        held_out = self._wanted(self._held_out_file, self._eval, wanted)
        if (len(self._train) and not len(train)) or not len(held_out):
            raise ValueError(f"{path}: every {'held-out ' if len(train) else ''}row has {unwanted}; allow more")
        if dropped := len(self._train) + len(self._eval) - len(train) - len(held_out):
            self.notes[-1] = f"{path}: {counted(dropped, 'row')} left out, with {unwanted}"
            self._train, self._eval, self._epoch = train, held_out, -1
            self.notes.append(self._amounts())

    def _amounts(self) -> str:
        train, held_out = counted(len(self._train), "row"), counted(len(self._eval), "prompt")
        parts = [f"{train} to train on"] if len(self._train) else []  # `ibtpo eval --whole` holds out all
        return f"{self._file.rows.path}: {', '.join([*parts, f'{held_out} held out'])}"

    def _wanted(self, file: _File, rows: Longs, wanted: Callable[[Problem], bool]) -> Longs:
        mask = np.fromiter(map(wanted, _Problems(file, rows, self._examples)), bool, len(rows))
        chosen: Longs = rows[mask]
        return chosen


class _File:
    """A data file after its filters: row numbers, a hash of every row's prompt, a digest of prompts and answers.

    Without `rated`, the field of pass rates, by which training rows are filtered, may be missing.
    """

    def __init__(self, path: Path, layout: str, config: JsonlConfig, *, rated: bool = True) -> None:
        _check_filters(config)
        self.rows: Rows = open_rows(path)
        field = config.pass_rate_field
        if not (rated or field is None or has_field(self.rows[0], field)):
            config = replace(config, pass_rate_field=None, min_pass_rate=0.0, max_pass_rate=1.0)
        self.layout, note = choose_layout(layout, self.rows, config)
        self._config = config
        self.notes = [text for text in (self.rows.note, note) if text]
        prompts, answers, rates, answered = self._scan()
        if not answered.any():
            raise ValueError(
                f'{path}: no row has an answer in the field "{self.layout.answer_field}" in the form of layout '
                f"{self.layout.name}; name another field in jsonl.answer_field, or another --layout"
            )
        unrated = np.isnan(rates)
        kept = answered & (rates >= config.min_pass_rate) & (rates <= config.max_pass_rate)
        self._note(~answered, f"no answer can be read ({self._places(~answered)})")
        self._note(unrated, f'field "{config.pass_rate_field}" is null')
        self._note(
            answered & ~kept & ~unrated, f"pass rate outside [{config.min_pass_rate:g}, {config.max_pass_rate:g}]"
        )
        if config.duplicates == "drop":
            first = np.zeros(len(kept), bool)
            chosen = np.flatnonzero(kept)
            first[chosen[_first_of_each(prompts[kept] ^ answers[kept])]] = True
            self._note(kept & ~first, "same prompt and answer as an earlier row")
            kept = first
        if not kept.any():
            raise ValueError(f"{path}: no row passes the filters; widen jsonl.min_pass_rate and jsonl.max_pass_rate")
        self._kept: Longs = np.flatnonzero(kept)
        self.prompts = prompts[kept]
        self.digest = hashlib.blake2b(self.prompts.tobytes() + answers[kept].tobytes()).hexdigest()

    def problem(self, index: int, examples: tuple[tuple[str, str], ...] = ()) -> Problem:
        """The problem of the kept row number `index`."""
        row = int(self._kept[index])
        problem = read_problem(self.layout, self.rows[row], self.rows.where(row), self._config)
        return Problem(problem.prompt, problem.answer, problem.data, examples)

    def _scan(self) -> tuple[_Hashes, _Hashes, npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Check every row; returns the hashes of prompts and answers, the pass rates, and which rows have an answer."""
        number = len(self.rows)
        hashes, rates, answered = np.zeros((2, number), np.uint64), np.ones(number), np.ones(number, bool)
        field = self._config.pass_rate_field
        for i in range(number):
            row, where = self.rows[i], self.rows.where(i)
            try:
                problem = read_problem(self.layout, row, where, self._config)
            except Unanswered:
                if self._config.unanswered == "refuse":
                    raise
                answered[i] = False
                continue
            hashes[:, i] = _hash(problem.prompt), _hash([problem.answer])
            if field is not None:
                rates[i] = _check_rate(get_field(row, field, "pass_rate_field", where), field, where)
        return hashes[0], hashes[1], rates, answered

    def _places(self, wanted: npt.NDArray[np.bool_]) -> str:
        places = [self.rows.where(int(i)).removeprefix(f"{self.rows.path}, ") for i in np.flatnonzero(wanted)[:4]]
        return ", ".join([*places[:3], *(["..."] if len(places) > 3 else [])])

    def _note(self, dropped: npt.NDArray[np.bool_], why: str) -> None:
        if dropped.any():
            self.notes.append(f"{self.rows.path}: {dropped.sum():,} of {len(dropped):,} rows left out: {why}")


class _Problems(Sequence[Problem]):
    """Problems of these kept rows of a file, each read when it is looked at."""

    def __init__(self, file: _File, rows: Longs, examples: tuple[tuple[str, str], ...]) -> None:
        self._file, self._rows, self._examples = file, rows, examples

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> _Problems: ...
    def __getitem__(self, index: int | slice) -> Problem | _Problems:
        if isinstance(index, slice):
            return _Problems(self._file, self._rows[index], self._examples)
        return self._file.problem(int(self._rows[index]), self._examples)


def _hash(value: str | list[str] | list[dict[str, str]]) -> int:
    """64-bit hash of a text or messages; two of a million rows collide with a probability of about 3e-8."""
    text = value if isinstance(value, str) else json.dumps(value)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _check_filters(config: JsonlConfig) -> None:
    for name, value, default in (("min", config.min_pass_rate, 0.0), ("max", config.max_pass_rate, 1.0)):
        if value != default and config.pass_rate_field is None:
            raise ValueError(
                f"jsonl.{name}_pass_rate: {value:g} needs to know where the pass rates are; name their field with "
                "--jsonl.pass-rate-field"
            )


def _check_rate(value: object, field: str, where: str) -> float:
    """A row's pass rate; NaN if it is null, as for a prompt that was not tried with a model."""
    if value is None or value != value:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        fail(where, f'field "{field}" is {value!r}', "a pass rate is a number from 0 to 1")
    return float(value)


def _first_of_each(values: npt.NDArray[np.uint64]) -> Longs:
    """Index of the first occurrence of each distinct value, in order."""
    return np.sort(np.unique(values, return_index=True)[1])


def _divide(file: _File, config: JsonlConfig, seed: int) -> tuple[Longs, Longs]:
    """Rows to train on, and the first row of each held-out prompt, in random order."""
    first = _first_of_each(file.prompts)  # one row a prompt
    path, number = file.rows.path, len(first)
    everything = config.eval_fraction == 1 and config.eval_count is None
    if number < 2 and not everything:
        noted = f", or look at what was read ({'; '.join(file.notes)})" if file.notes else ""
        raise ValueError(
            f"{path}: {counted(len(file.prompts), 'row')} with {counted(number, 'different prompt')}; at least 2 "
            f"different prompts are needed, one to train on and one to hold out for evaluation: add rows{noted}"
        )
    if everything:
        return np.empty(0, np.int64), first
    wanted = config.eval_count or max(1, round(config.eval_fraction * number))
    if config.eval_count is not None and wanted >= number:
        raise ValueError(f"jsonl.eval_count: {wanted} of the {number} prompts of {path} leave none to train on")
    shuffled = seeded(seed, _SPLIT).permutation(number)[: min(wanted, number - 1)]
    held_out = np.isin(file.prompts, file.prompts[first[shuffled]])
    return np.flatnonzero(~held_out), first[shuffled]


def _read_examples(config: JsonlConfig, layout: Layout) -> tuple[tuple[str, str], ...]:
    if config.few_shot is None:
        return ()
    rows = open_rows(config.few_shot)
    return tuple(read_example(layout, rows[i], rows.where(i)) for i in range(len(rows)))
