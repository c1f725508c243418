"""The tasks: problems are reproducible, held-out ones are held out, grading and exact values are right."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ibtpo.config import DigitChainConfig, JsonlConfig, TrainConfig
from ibtpo.rewards import boxed, final_answer, marked_answer
from ibtpo.tasks import Problem, TeachableTask, format_prompt, make_task
from ibtpo.tasks.data import DataTask
from ibtpo.tasks.digit_chain import (
    SYMBOLS,
    DigitChain,
    all_facts,
    char_tokenizer,
    imperfect_teacher,
    parse_prompt,
    result,
    right_solution,
)
from ibtpo.tasks.gym import GymTask
from ibtpo.tasks.rows import open_rows

EXACT = JsonlConfig(grade="exact")


# ---- digit chain ----


def test_worked_answer_is_the_documented_one() -> None:
    problem = parse_prompt("7*8-5+3*9=?\n")
    assert problem.answer == "6"
    assert right_solution(problem) == "7*8=6\n6-5=1\n1+3=4\n4*9=6\n6."


@pytest.mark.parametrize("prompt", ["7*8-5", "7*8=?", "7*1=?\n", "17*8=?\n", "7/2=?\n", "=?\n"])
def test_a_prompt_of_another_form_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="prompt"):
        parse_prompt(prompt)


def test_facts_are_left_to_right_and_modulo_ten() -> None:
    assert len(set(all_facts())) == 240
    for a, operation, b in all_facts():
        assert result((a, operation, b)) == eval(f"({a}{operation}{b}) % 10")
    assert right_solution(parse_prompt("3-9*2=?\n")) == "3-9=4\n4*2=8\n8."


@pytest.mark.parametrize("ops", [(1, 1), (2, 2), (8, 12)])
def test_held_out_problems_are_never_drawn_in_training(ops: tuple[int, int]) -> None:
    config = DigitChainConfig(min_ops=ops[0], max_ops=ops[1])
    held_out = {p.prompt for seed in (0, 1) for p in DigitChain(config, seed).eval_problems(200)}
    trained = [DigitChain(config, seed).train_problem(i) for seed in (0, 1, -3) for i in range(300)]
    assert not held_out & {p.prompt for p in trained}
    assert {len(p.data["chain"]) for p in trained} == set(range(ops[0], ops[1] + 1))


def test_problems_depend_on_seed_and_index_alone() -> None:
    one, two, other = (DigitChain(DigitChainConfig(), seed) for seed in (5, 5, 6))
    backwards = [two.train_problem(i) for i in reversed(range(20))][::-1]
    assert [one.train_problem(i) for i in range(20)] == backwards
    assert one.eval_problems(5) == two.eval_problems(9)[:5]
    assert one.train_problem(0) != other.train_problem(0)


def test_the_teacher_errs_at_its_own_rates() -> None:
    """Error rates 0.9*u^k: mean 0.9/(k+1); each fact's mistakes come at its rate, half of them its fixed digit."""
    rates = [m.rate for seed in range(30) for m in imperfect_teacher(seed, 4.0).values()]
    assert np.mean(rates) == pytest.approx(0.18, abs=0.01)
    assert max(rates) <= 0.9
    task, rng = DigitChain(DigitChainConfig(min_ops=1, max_ops=1), 0), np.random.default_rng(0)
    fact, mistakes = max(task.teacher.items(), key=lambda item: item[1].rate)
    problem = parse_prompt("{}{}{}=?\n".format(*fact))
    digits = [int(task.worked_solution(problem, rng).text[-2]) for _ in range(4000)]
    wrong = [digit for digit in digits if digit != result(fact)]
    assert mistakes.digit != result(fact)
    assert len(wrong) / len(digits) == pytest.approx(mistakes.rate, abs=0.03)
    assert wrong.count(mistakes.digit) / len(wrong) == pytest.approx(0.5 + 0.5 / 9, abs=0.03)
    assert set(digits) == set(range(10))


def test_after_a_mistake_the_chain_goes_on_from_it() -> None:
    task, rng = DigitChain(DigitChainConfig(teacher_exponent=0.1), 0), np.random.default_rng(0)
    text = task.worked_solution(task.train_problem(0), rng).text
    lines = text.removesuffix(".").split("\n")
    assert all(after[0] == before[-1] for before, after in pairwise(lines))
    assert task.grade(task.train_problem(0), text, truncated=False) == 0.0


def test_strict_grades_the_derivation_and_last_the_final_digit() -> None:
    problem = parse_prompt("7*8-5=?\n")
    strict, last = DigitChain(DigitChainConfig(), 0), DigitChain(DigitChainConfig(grade="last"), 0)
    right, lucky = "7*8=6\n6-5=1\n1.", "7*8=4\n4-5=1\n1."
    assert strict.grade(problem, right, False) == last.grade(problem, right, False) == 1.0
    assert strict.grade(problem, right.removesuffix("."), False) == 1.0  # the stop token may be left out of the text
    assert (strict.grade(problem, lucky, False), last.grade(problem, lucky, False)) == (0.0, 1.0)
    assert strict.grade(problem, right, True) == last.grade(problem, right, True) == 0.0
    for text in ("", ".", "11.", "7*8=6\n6-5=1.", right + right):
        assert strict.grade(problem, text, False) == 0.0
    assert last.grade(problem, "11.", False) == 0.0


def test_the_teacher_is_right_as_often_as_its_facts_are_together() -> None:
    task, rng = DigitChain(DigitChainConfig(min_ops=3, max_ops=3, teacher_exponent=1.0), 4), np.random.default_rng(0)
    problem = task.eval_problems(1)[0]
    steps = right_solution(problem).splitlines()[:-1]  # "7*8=6", ...
    exact = math.prod(1 - task.teacher[int(step[0]), step[1], int(step[2])].rate for step in steps)
    sampled = np.mean([task.grade(problem, task.worked_solution(problem, rng).text, False) for _ in range(6000)])
    assert len(steps) == 3 and 0.05 < exact < 0.95
    assert sampled == pytest.approx(exact, abs=0.025)


@given(st.text(SYMBOLS, max_size=40))
def test_the_character_tokenizer_gives_the_text_back(text: str) -> None:
    tokenizer = char_tokenizer()
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_the_character_tokenizer_is_an_ordinary_tokenizer_folder(tmp_path: Path) -> None:
    text = "7*8-5+3*9=?\n" + right_solution(parse_prompt("7*8-5+3*9=?\n"))
    char_tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.eos_token, len(loaded)) == (".", len(SYMBOLS) + 1)
    assert loaded.pad_token_id != loaded.eos_token_id
    assert format_prompt(loaded, parse_prompt("7*8=?\n"), JsonlConfig()) == loaded.encode("7*8=?\n")


# ---- registry and prompts ----


def test_make_task_names_what_is_known_and_guesses_the_nearest() -> None:
    task = make_task(TrainConfig(seed=3))
    assert isinstance(task, DigitChain) and isinstance(task, TeachableTask) and task.seed == 3
    with pytest.raises(ValueError, match=r'did you mean "digit-chain".*jsonl.*reasoning-gym:NAME'):
        make_task(TrainConfig(task="digitchain"))
    with pytest.raises(ValueError, match="--data"):
        make_task(TrainConfig(task="jsonl"))


def test_format_prompt_applies_the_chat_template_once() -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ {'system': '+', 'user': '-'}[m['role']] + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}={% endif %}"
    )

    def text(prompt: str | list[dict[str, str]], **config: object) -> str:
        return tokenizer.decode(format_prompt(tokenizer, Problem(prompt, ""), JsonlConfig(**config)))

    assert text("12") == "-12="
    assert text("12", system_prompt="7") == "+7-12="
    own = [{"role": "system", "content": "9"}, {"role": "user", "content": "1"}]
    assert text(own, system_prompt="7") == "+9-1="
    assert text("12", chat_template=False) == "12"
    assert text("12", chat_template=False, system_prompt="7") == "7\n\n12"
    with pytest.raises(ValueError, match="chat template"):
        text(own, chat_template=False)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('System role not supported') }}", "TemplateError: System role not supported"),
        ("{% for %}", "TemplateSyntaxError: "),
        ("{{ messages[9].content.text }}", "UndefinedError: "),
        ("{{ messages[0] + 1 }}", "TypeError: "),
    ],
)
def test_a_chat_template_that_raises_is_told_with_the_row(template: str, said: str) -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = template
    problem = Problem("12", "", {"where": "rows.jsonl, line 7"})
    with pytest.raises(ValueError, match=r"--jsonl\.system-prompt") as error:
        format_prompt(tokenizer, problem, JsonlConfig(system_prompt="7"))
    message = "rows.jsonl, line 7: the tokenizer's chat template cannot format messages of system, user"
    assert str(error.value).startswith(f"{message} ({said}")


@pytest.mark.parametrize("template", [None, "{{ messages[-1].content }}"])
def test_a_prompt_with_characters_the_vocabulary_lacks_is_told_with_the_row(template: str | None) -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=r"^rows\.jsonl, line 7: the tokenizer cannot encode the prompt .*vocabulary"):
        format_prompt(tokenizer, Problem("two and 2", "", {"where": "rows.jsonl, line 7"}), JsonlConfig())


def test_options_are_handed_to_the_chat_template() -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{% if think is false and n == [1] and word == 'on' %}+{% else %}-{% endif %}"

    def text(*options: str) -> str:
        config = JsonlConfig(chat_template_options=options)
        return tokenizer.decode(format_prompt(tokenizer, Problem("12", ""), config))

    assert (text(), text("think=false", "n=[1]", "word=on")) == ("-", "+")
    for wrong in ("think", "=1", "a b=1", "tokenize=true"):
        with pytest.raises(ValueError, match=r"jsonl\.chat_template_options: .* is not NAME=VALUE"):
            text(wrong)


# ---- JSONL ----


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_jsonl_rows_are_divided_by_prompt_and_shuffled_every_epoch(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i}+{i}?", "answer": 2 * i} for i in range(50)]
    path = write_jsonl(tmp_path / "data.jsonl", rows + rows[:10])  # some rows twice
    task = DataTask(path, EXACT, seed=1)
    held_out = [p.prompt for p in task.eval_problems(100)]
    epochs = [[task.train_problem(e * task.num_train + i).prompt for i in range(task.num_train)] for e in range(2)]
    assert len(held_out) == len(set(held_out)) == 5
    assert not set(held_out) & set(epochs[0])
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert task.train_problem(3) == DataTask(path, EXACT, seed=1).train_problem(3)
    assert held_out != [p.prompt for p in DataTask(path, EXACT, seed=2).eval_problems(100)]


def test_jsonl_exact_grading_takes_the_stripped_last_line(tmp_path: Path) -> None:
    task = DataTask(write_jsonl(tmp_path / "d", [{"prompt": p, "answer": " 4 "} for p in "ab"]), EXACT)
    problem = task.train_problem(0)
    assert task.grade(problem, "two and two\n\n 4 \n\n", False) == 1.0
    assert task.grade(problem, "4 or 5", False) == task.grade(problem, "", False) == 0.0
    assert task.grade(problem, "4", True) == 0.0


def test_jsonl_math_grading_runs_in_workers(tmp_path: Path) -> None:
    task = DataTask(write_jsonl(tmp_path / "d", [{"prompt": p, "answer": "1/2"} for p in "ab"]), JsonlConfig())
    try:
        right, wrong = (task.grade(task.train_problem(0), rf"so \boxed{{{x}}}", False) for x in ("0.5", "2"))
        assert not isinstance(right, float) and not isinstance(wrong, float)
        assert (right.result(60), wrong.result(60)) == (1.0, 0.0)
        assert task.grade(task.train_problem(0), r"\boxed{0.5}", True) == 0.0
    finally:
        task.close()


def test_jsonl_reads_messages_blank_lines_numbers_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    chat = [{"role": "user", "content": "héllo\u2028"}]
    first_line = json.dumps({"prompt": chat, "answer": 3.5}, ensure_ascii=False)
    lines = ["\ufeff", first_line, "", " \f\r", '{"prompt": "b", "answer": "x"}\r', ""]
    path.write_bytes("\n".join(lines).encode())
    task = DataTask(path, JsonlConfig(grade="exact", eval_fraction=1.0))
    first, second = task.eval_problems(2)
    assert (first.prompt, first.answer, first.data["where"]) == (chat, "3.5", f"{path}, line 2")
    path.write_bytes(b"\xef\xbb\xbf" + first_line.encode() + b"\n")
    assert open_rows(path)[0]["prompt"] == chat
    assert (second.prompt, second.answer, second.data["where"]) == ("b", "x", f"{path}, line 5")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", r"the file is empty"),
        (b"\n \n", r"the file is empty"),
        (b"\xef\xbb\xbf", r"the file is empty"),
        (b'{"prompt": "a", "answer": "b"}\n{"prompt": "a"', r"line 2: malformed JSON at column"),
        (b'[{"prompt": "a", "answer": "b"}]\n', r"one JSON array, not one object per line; convert it"),
        (b'[\n  [{"from": "human", "value": "a"}]\n]\n', r"one JSON array, not one object per line; convert it"),
        (b'["a", "b"]\n', r"line 1: expected an object, found a list"),
        (b"\x1f\x8b\x08", r"a compressed file; unpack it"),
        (b"PAR1", r"a Parquet file; give it a name that ends in .parquet"),
        (b'{"text": "a", "answer": "b"}\n', r'line 1: field "prompt" is missing \(fields found: \'text\''),
        (b'{"prompt": "a"}\n', r'line 1: field "answer" is missing.*jsonl.answer_field'),
        (b'{"prompt": 7, "answer": "b"}\n', r'line 1: field "prompt" is a number'),
        (b'{"prompt": "  ", "answer": "b"}\n', r'line 1: field "prompt" is empty'),
        (b'{"prompt": [], "answer": "b"}\n', r"empty list of messages"),
        (b'{"prompt": [{"role": "user"}], "answer": "b"}\n', r"message 0 .* is not a chat message"),
        (b'{"prompt": [{"role": "user", "content": ""}], "answer": "b"}\n', r"last message .* is empty"),
        (
            b'{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "42"}], "answer": "42"}\n',
            r"line 1: the last message of field \"prompt\" is the assistant's; the policy writes that turn",
        ),
        (b'{"prompt": "a", "answer": null}\n', r'line 1: field "answer" is null'),
        (b'{"prompt": "a", "answer": true}\n', r'line 1: field "answer" is a truth value'),
        (b'{"prompt": "a", "answer": " "}\n', r'line 1: field "answer" is empty'),
        (b'{"prompt": "a", "answer": NaN}\n', r"line 1: NaN is not JSON"),
        (b'{"prompt": "a", "answer": 1e999}\n', r'line 1: field "answer" is inf'),
        (b'{"prompt": "a", "answer": %s}\n' % (b"1" * 5000), r"line 1: a number with thousands of digits"),
        (b'{"prompt": "a\\ud800", "answer": "b"}\n', r'line 1: field "prompt" holds half of a character'),
        (
            b'{"prompt": [{"role": "user", "content": "\\udc00"}], "answer": "b"}\n',
            r'"prompt" holds half of a character',
        ),
        (b'{"prompt": "a", "answer": "\\ud800"}\n', r'line 1: field "answer" holds half of a character'),
        (b'{"prompt": "\xff", "answer": "b"}\n', r"line 1: not UTF-8"),
        (b'{"prompt": "a", "answer": "b"}\n', r"at least 2 different prompts"),
        (b'{"prompt": "a", "answer": "b"}\n' * 3, "1 row with 1 different prompt;"),
    ],
)
def test_jsonl_names_file_line_field_and_remedy(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=expected) as caught:
        DataTask(path, EXACT)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 400


def test_a_jsonl_file_cut_short_while_in_use_is_an_error_and_no_signal(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}" * 500, "answer": "1"}) + "\n\n" for i in range(40)))
    rows = open_rows(path)
    assert rows[39]["prompt"] == "39" * 500
    os.truncate(path, 5000)
    assert rows[1]["prompt"] == "1" * 500
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 79: the file was cut short while it was in use"):
        rows[39]
    with pytest.raises(IndexError):
        rows[40]


def test_jsonl_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such file.*--data"):
        DataTask(tmp_path / "nowhere.jsonl", EXACT)


# ---- reasoning-gym ----


FAKE_GYM = '''
"""As much of reasoning-gym as the adapter and its grading process use."""
import random

class Sums:
    def __init__(self, size, seed):
        self.size, self.seed = size, seed

    def __getitem__(self, index):
        assert 0 <= index < self.size
        a = random.Random(f"{self.seed} {index}").randrange(100_000)
        return {"question": f"{a} + 1 =", "answer": str(a + 1), "metadata": {"range": (1, 2)}}

def create_dataset(name, size, seed):
    return Sums(size, seed)

def get_score_answer_fn(name):
    def score(answer, entry):
        assert entry["metadata"]["range"] == (1, 2)
        if answer == "crash":
            raise RuntimeError(answer)
        return {entry["answer"]: 1.0, "nan": float("nan"), "big": 7.0}.get(answer, 0.01)
    return score
'''


@pytest.fixture
def fake_gym(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = tmp_path / "reasoning_gym"
    package.mkdir()
    (package / "__init__.py").write_text(FAKE_GYM)
    (package / "factory.py").write_text('DATASETS = {"chain_sum": None, "countdown": None}')
    for name in [name for name in sys.modules if name.split(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("reasoning_gym", "reasoning_gym.factory"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("fake_gym")
def test_gym_problems_are_reproducible_and_held_out() -> None:
    name = "reasoning-gym:chain_sum"
    with closing(make_task(TrainConfig(task=name))) as task, closing(GymTask(name)) as other:
        trained = [task.train_problem(i).prompt for i in range(200)]
        assert trained[::-1] == [other.train_problem(i).prompt for i in reversed(range(200))]
        assert not set(trained) & {p.prompt for p in task.eval_problems(100)}
        assert task.name == name


@pytest.mark.usefixtures("fake_gym")
def test_gym_grades_the_final_answer_in_workers_and_counts_what_fails() -> None:
    task = GymTask("reasoning-gym:chain_sum")
    problem = task.train_problem(0)

    def grade(text: str) -> float:
        future = task.grade(problem, text, False)
        assert not isinstance(future, float)
        return future.result(60)

    with closing(task):
        for text in ("{}", r"thus \boxed{{{}}}", "<answer>1</answer> no, <answer> {} </answer>", "so\n{}\n"):
            assert grade(text.format(problem.answer)) == 1.0
        assert task.grade(problem, problem.answer, True) == 0.0
        assert [grade(text) for text in ("3", "crash", "nan", "big")] == [0.01, 0.0, 0.0, 0.0]
        assert task.counts() == {"reward_timeouts": 0, "reward_failures": 3}


def test_gym_speaks_with_the_package_itself() -> None:
    pytest.importorskip("reasoning_gym")
    task = GymTask("reasoning-gym:chain_sum", seed=1)
    problem = task.train_problem(3)
    assert problem == task.train_problem(3) and problem.prompt != task.train_problem(4).prompt

    def grade(text: str) -> float:
        future = task.grade(problem, text, False)
        assert not isinstance(future, float)
        return future.result(60)

    with closing(task):
        assert [grade(f"<answer>{text}</answer>") for text in (problem.answer, "none")] == [1.0, 0.0]
    assert task.counts() == {"reward_timeouts": 0, "reward_failures": 0}


@pytest.mark.usefixtures("fake_gym")
def test_gym_suggests_the_nearest_dataset() -> None:
    with pytest.raises(ValueError, match='did you mean "chain_sum"'):
        GymTask("reasoning-gym:chainsum")


def test_gym_says_how_to_install_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        make_task(TrainConfig(task="reasoning-gym:chain_sum"))


def test_final_answer_reads_nested_braces() -> None:
    assert final_answer(r"\boxed{1} then \boxed{\frac{1}{2}} done") == r"\frac{1}{2}"
    assert final_answer(r"\boxed{\frac{1}{2") == r"\frac{1}{2"
    assert final_answer("") == ""


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so $\boxed 5$.", "5"),
        (r"$\boxed 12$ and more", "12"),
        (r"\(x = \boxed -\frac12\)", r"-\frac12"),
        (r"\boxed\frac34$", r"\frac34"),
        (r"it is \boxed 1,200.", "1,200"),
        (r"\boxed {5}", "5"),
        (r"$\fbox{5}$", "5"),
        (r"\boxed{\fbox{5}}", "5"),
        (r"\boxed{4} is in the \boxed form", "4"),
        (r"\boxedtext{4}", None),
    ],
)
def test_boxes_are_read_as_the_published_files_write_them(text: str, content: str | None) -> None:
    assert boxed(text) == content


def test_a_box_in_the_thinking_is_no_answer() -> None:
    assert marked_answer(r"<think>\boxed{3}</think> I do not know.") is None
    assert marked_answer(r"<think>\boxed{3}</think> \boxed{4}") == "4"


def test_teacher_knows_the_probability_of_what_it_writes() -> None:
    """Solutions of one short problem, by their frequency; all of them together have probability 1."""
    task, rng = DigitChain(DigitChainConfig(min_ops=1, max_ops=1, teacher_exponent=0.5), 3), np.random.default_rng(0)
    problem = task.train_problem(0)
    draws = [task.worked_solution(problem, rng) for _ in range(4000)]
    probability = {solution.text: math.exp(solution.logprob) for solution in draws}
    assert sum(probability.values()) == pytest.approx(1.0)
    for text, p in probability.items():
        share = sum(solution.text == text for solution in draws) / len(draws)
        assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / len(draws)) + 1e-9)
