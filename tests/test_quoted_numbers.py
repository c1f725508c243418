"""Numbers in tables of README.md and docs/{kernels,engine,method}.md are rows of bench/results, as they are rounded."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
KERNELS_PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
ENGINE_PAGE = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")
METHOD_PAGE = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")

KERNELS = (
    ("tree_decode", "B32 prefix1024 suffix64 H8:8 D64", "forward"),
    ("tree_decode", "B32 unshared1088 H8:8 D64", "forward"),
    ("tree_decode", "B256 prefix64 suffix32 H4:2 D32", "forward"),
    ("tree_attention", "chain N1024 H8:8 D64", "forward"),
    ("tree_attention", "chain N1024 H8:8 D64", "both"),
    ("tree_attention", "prompt+16 N1024 H8:8 D64", "forward"),
    ("tree_attention", "prompt+16 N1024 H8:8 D64", "both"),
    ("linear_logprob", "T512 H256 V32768", "forward"),
    ("linear_logprob", "T512 H256 V32768", "both"),
    ("linear_logprob", "T2048 H64 V32", "forward"),
    ("linear_logprob", "T2048 H64 V32", "both"),
    ("policy_head", "T512 H256 V32768 policy gradient", "both"),
    ("sample", "B64 V32768", "forward"),
)
"""Lines of the table of docs/kernels.md: op, shape, pass."""
IN_THE_README = [KERNELS[i] for i in (0, 1, 6, 4, 7, 8, 9)]
BOTH = ("float32", "bfloat16")


def rows_of(name: str) -> list[dict[str, str]]:
    with (ROOT / "bench" / "results" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(header: str, page: str = README) -> list[list[str]]:
    """The cells of the table whose header begins so."""
    lines = page.partition(header)[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def agree(text: str, *numbers: float) -> bool:
    """Are the last numbers of a text these, rounded as they are written?"""
    written = re.findall(r"[-+]?[\d.]*\d", text)[-len(numbers) :]
    tolerances = [0.501 * 10.0 ** -len(number.partition(".")[2]) for number in written]
    return len(written) == len(numbers) and all(
        abs(float(number) - wanted) <= tolerance
        for number, wanted, tolerance in zip(written, numbers, tolerances, strict=True)
    )


@pytest.mark.parametrize(
    ("text", "numbers", "right"),
    [
        ("1.6 / 3.1x", (1.553, 3.051), True),
        ("**0.90** / 5.1x", (0.8979, 5.143), True),
        ("on 2 cores 254 ms", (254.4,), True),
        ("254 ms", (254.6,), False),
        ("1.6x", (1.5, 1.6), False),
    ],
)
def test_numbers_agree_where_they_are_rounded_so(text: str, numbers: tuple[float, ...], right: bool) -> None:
    assert agree(text, *numbers) == right


MACHINES = {"here": "AVX-512-BF16", "Intel": "Intel", "AVX2": "AVX2"}


class Measured:
    """The rows of one problem, its types those that it was measured in."""

    def __init__(self, problem: tuple[str, str, str]) -> None:
        rows = [row for row in rows_of("roofline_cpu.csv") if (row["op"], row["shape"], row["pass"]) == problem]
        self.rows = {place: [row for row in rows if name in row["machine"]] for place, name in MACHINES.items()}

    def ours(self, place: str, column: str) -> list[float]:
        """A number of each type, fp32 first."""
        here = {row["dtype"]: row[column] for row in self.rows[place] if row["who"] == "ibtpo"}
        return [float(here[dtype]) for dtype in BOTH if dtype in here]

    def best_peer(self, place: str) -> list[float]:
        """Microseconds."""
        times: dict[str, list[float]] = {}
        for row in self.rows[place]:
            if row["kind"] == "peer" and row["median_us"]:
                times.setdefault(row["dtype"], []).append(float(row["median_us"]))
        return [min(times[dtype]) for dtype in BOTH if dtype in times]


def in_unit(text: str, microseconds: list[float]) -> list[float]:
    return [time if "µs" in text else time / 1000 for time in microseconds]


def test_the_kernels_of_the_readme() -> None:
    for problem, (line, ours, peer, *ratios) in zip(IN_THE_README, table("| kernel, fp32 / bf16 "), strict=True):
        measured = Measured(problem)
        assert agree(ours, *in_unit(ours, measured.ours("here", "median_us"))), line
        assert agree(peer, *in_unit(peer, measured.best_peer("here"))), line
        for text, place in zip(ratios, MACHINES, strict=True):
            faster = measured.ours(place, "ratio_to_best_peer")
            assert agree(text, *(faster[:1] if place == "AVX2" else faster)), (line, place)


def test_the_kernels_of_their_page() -> None:
    lines = table("| op, fp32 / bf16 ", KERNELS_PAGE)
    for problem, (line, ours, share, *ratios) in zip(KERNELS, lines, strict=True):
        measured = Measured(problem)
        assert agree(ours, *in_unit(ours, measured.ours("here", "median_us"))), line
        assert agree(share, *(100 * number for number in measured.ours("here", "roof_share"))), line
        for text, place in zip(ratios, MACHINES, strict=True):
            assert agree(text.replace(" times as long", ""), *measured.ours(place, "ratio_to_best_peer")), (line, place)


def test_the_engine() -> None:
    speed = {
        (row["case"], row["x"], row["who"]): float(row["tokens_per_s"]) / 1000 for row in rows_of("engine_peers.csv")
    }
    cases = [("decode, built-in policy", batch) for batch in ("1", "8", "32", "128", "256")]
    cases.append(("prompt 512, 16 branches, 0.5B", "16"))
    for (case, x), (line, ours, *peers) in zip(cases, table("| thousand tokens/s "), strict=True):
        here = speed[case, x, "engine"]
        assert agree(ours, here), line
        for text, who in zip(peers, ("transformers generate", "llama.cpp"), strict=True):
            assert agree(text, speed[case, x, who], here / speed[case, x, who]), (line, who)


def test_trees_beside_chains() -> None:
    case = "trees, prompts, 0.5B"
    speed = {
        (row["x"], row["who"]): float(row["tokens_per_s"]) for row in rows_of("engine_peers.csv") if row["case"] == case
    }
    trees = ("IBTree (4, 9, 1, 1)", "IBTree (4, 9, 1, 1), 4 rounds under way", "IBTree (4, 2, 8, 1)")
    for line, *cells in table("| shape of Qwen2.5-0.5B "):
        prompts = line.split()[0]
        for text, who in zip(cells, trees, strict=True):
            assert agree(text, speed[prompts, "independent, 8"] / speed[prompts, who]), (line, who)


def test_a_training_step() -> None:
    rows = {(row["case"], row["who"]): row for row in rows_of("train_peers.csv")}
    seconds = {key: float(row["median_s"]) for key, row in rows.items()}
    cases = {
        "training step, built-in policy": ("ibtpo, grpo", "TRL, generate", "TRL, our engine"),
        "training step, prompts of 512": ("ibtpo, grpo", "TRL, generate", "TRL, our engine"),
        "update, built-in policy": ("ibtpo, trees", "TRL, trajectories given"),
    }
    for (case, (us, *them)), (line, ours, *peers) in zip(cases.items(), table("| seconds | ours "), strict=True):
        assert agree(ours, seconds[case, us]), line
        for who, text in zip(them, peers, strict=False):
            assert agree(text, seconds[case, who], seconds[case, who] / seconds[case, us]), (line, who)
        assert len(list(filter(None, peers))) == len(them)
    chains, trees = (seconds["update, built-in policy", f"ibtpo, {packed}"] for packed in ("chains", "trees"))
    assert "takes 1.6\ntimes as long" in README and agree("1.6", chains / trees)
    assert "takes 1.09 s" in README and agree("1.09", seconds["training step, built-in policy", "ibtpo, ib-tpo"])


def test_the_first_run() -> None:
    rows = {(row["commit"], row["seed"]): row for row in rows_of("make_train.csv")}
    columns = ("sampled_before", "sampled_after", "greedy_before", "greedy_after")
    for seed, (line, *cells) in enumerate(table("| held-out accuracy, sampled / greedy ")):
        for commit, text in zip(("57de120", "bfb07e9", "1724413"), cells, strict=True):
            row = rows[commit, str(seed)]
            shares = (100 * float(row[column]) for column in columns)
            assert agree(text, *shares, float(row["all_seconds"])), (line, commit)


STUDIES = {
    "| lambda: 0 ": ("lambda", ["lambda 0.03", "lambda 0.1", "lambda 0.3", "lambda 0.5", "lambda 1"]),
    "| beta: the paper's 5 ": ("beta", ["beta 0.5", "beta 1", "beta 2", "beta 10", "beta 20"]),
    "| steps: lines ": (
        "segmentation-noise",
        ["noise 0.1", "noise 0.3", "noise 1", "every 4 tokens", "every 12 tokens"],
    ),
    "| twelve trajectories: ": (
        "rounds",
        ["five, two a round", "three, four a round", "two, eight at once", "two under way", "four under way"],
    ),
    "| merge | no branch ": (
        "beyond",
        ["merged duplicates", "no branch at the root", "uniform groups ib_only", "all three", "grpo"],
    ),
    "| `ib-tpo` | `grpo` | `treerl` ": (
        "plus",
        ["ib-tpo", "grpo", "treerl", "eptree+ib-adv", "ib-tpo+ and score bonus c=1"],
    ),
}
"""Tables of docs/method.md with one line of numbers, by the beginning of their header: study, variants."""


@pytest.mark.parametrize("header", STUDIES)
def test_differences_of_studies(header: str) -> None:
    study, variants = STUDIES[header]
    rows = [row for row in rows_of(f"studies/{study}/table.csv") if row["column"] == "eval_avg"]
    [cells] = table(header, METHOD_PAGE)
    for text, variant in zip([cell for cell in cells if cell], variants, strict=True):
        [row] = [row for row in rows if row["variant"] == variant]
        mean, low, high = (float(row[f"difference_{name}"]) for name in ("mean", "low", "high"))
        numbers = (-mean, -high, -low) if study == "plus" else (mean, low, high)  # `ib-tpo+` minus the others
        assert agree(text, *numbers), variant


def test_the_speeds_of_the_engine_page() -> None:
    rows = [row for row in rows_of("engine_peers.csv") if row["case"] == "decode, built-in policy"]
    speed = {(row["x"], row["who"]): float(row["tokens_per_s"]) / 1000 for row in rows}
    whose = ("engine", "transformers generate", "transformers generate_batch", "llama.cpp")
    for who, (_, *cells) in zip(whose, table("| tokens/s at batch ", ENGINE_PAGE), strict=True):
        for batch, text in zip(("1", "8", "32", "128", "256"), cells, strict=True):
            assert agree(text, speed[batch, who]) if text else (batch, who) not in speed, (who, batch)


@pytest.mark.parametrize(
    ("header", "case", "unit", "trees"),
    [
        (
            "| prompts | IBTree (4, 9, 1, 1) | the same, ",
            "trees, prompts, 0.5B",
            1,
            ["IBTree (4, 9, 1, 1)", "IBTree (4, 9, 1, 1), 4 rounds under way", "IBTree (4, 2, 8, 1)"],
        ),
        (
            "| prompts | IBTree (4, 9, 1, 1) | (4, 5, 2, 1) ",
            "trees, prompts",
            1000,
            [f"IBTree ({numbers})" for numbers in ("4, 9, 1, 1", "4, 5, 2, 1", "4, 3, 4, 1", "4, 2, 8, 1")],
        ),
    ],
)
def test_the_trees_of_the_engine_page(header: str, case: str, unit: int, trees: list[str]) -> None:
    """Tokens a second, and in some cells how many times as long as for independent chains."""
    rows = [row for row in rows_of("engine_peers.csv") if row["case"] == case]
    speed = {(row["x"], row["who"]): float(row["tokens_per_s"]) / unit for row in rows}
    for prompts, *cells in table(header, ENGINE_PAGE):
        chains = speed[prompts, "independent, 8"]
        for who, text in zip((*trees, "independent, 8"), cells, strict=True):
            here = speed[prompts, who]
            assert agree(text, here, chains / here) if text.endswith("x") else agree(text, here), (prompts, who)


def test_what_equal_bits_cost() -> None:
    """Milliseconds of both ways, and the second over the first."""
    rows = rows_of("parity.csv")
    milliseconds = {(row["case"], row["x"], row["who"]): 1000 * float(row["median_s"]) for row in rows}
    lines = table("| | fast | bitwise | |", ENGINE_PAGE)
    cases = list(dict.fromkeys((row["case"], row["x"]) for row in rows))
    for (case, x), (line, fast, bitwise, ratio) in zip(cases, lines, strict=True):
        assert all(word in line for word in case.partition(", ")[2].split()), (case, line)
        ours = milliseconds[case, x, "bitwise"]
        assert agree(fast, milliseconds[case, x, "fast"]), line
        assert agree(bitwise, ours), line
        assert agree(ratio, ours / milliseconds[case, x, "fast"]), line


def test_tokens_of_presets() -> None:
    columns = ("trajectories", "tokens_sampled", "trajectory_tokens", "groups_without_gradient")
    lines = table("| preset | G | tokens sampled ", METHOD_PAGE)
    for row, (line, *cells) in zip(rows_of("preset_tokens.csv"), lines, strict=True):
        assert row["preset"].partition(",")[0] in line
        for column, text in zip(columns, cells, strict=True):
            assert agree(text, float(row[column]) * (100 if "%" in text else 1)), (line, column)


def test_the_bookkeeping_of_the_engine_page() -> None:
    rows = rows_of("bookkeeping.csv")
    for branches, *cells in table("| live branches ", ENGINE_PAGE):
        here = [row for row in rows if row["branches"] == branches.replace(",", "")]
        for row, text in zip(here, cells, strict=True):  # one sibling and sixteen, prompts of one length and of sixteen
            step = float(row["step_s"]) * (1e6 if "µs" in text else 1e3)
            assert agree(text, step, 100 * float(row["share"])), (branches, text)
