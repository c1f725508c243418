"""The page in a real browser: what it shows is what the run holds, whatever text that is, while it grows and after."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import EXECUTABLE, NO_BROWSER, Browser
from run_folders import HOSTILE, add_tree, log_steps, make_run

from ibtpo.runlog import RunFolder
from ibtpo.viewer import Viewer, export_page

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason=NO_BROWSER)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(autouse=True)
def nothing_goes_wrong(browser: Browser) -> Iterator[None]:
    browser.errors.clear()
    yield
    assert browser.errors == [] and browser.dialogs == []


@contextmanager
def served(*runs: Path) -> Iterator[str]:
    with Viewer(runs, 0) as viewer:
        thread = threading.Thread(target=viewer.serve)
        thread.start()
        try:
            yield viewer.url
        finally:
            viewer.stop()
            thread.join()


def texts(browser: Browser, selector: str) -> list[str]:
    found = browser.run(f"[...document.querySelectorAll({selector!r})].map((node) => node.textContent)")
    assert isinstance(found, list)
    return found


def open_trees(browser: Browser, url: str, boxes: int = 2) -> None:
    browser.open(f"{url}#trees")
    browser.wait(f"document.querySelectorAll('.tree .node').length >= {boxes}")


def test_an_exported_page_opens_from_a_file(tmp_path: Path, browser: Browser) -> None:
    run = make_run(tmp_path / "run", steps=30, trees=6)
    url = export_page([run], tmp_path / "page.html", trees=100).as_uri()
    browser.open(url)
    assert texts(browser, ".result .name b") == ["Sampled, avg@2", "Sampled, pass@2", "Greedy"]
    browser.run("location.hash = 'curves'")
    browser.wait("document.querySelectorAll('#app .chart:not([hidden])').length > 0")
    shown = browser.run(
        "[...document.querySelectorAll('section:not([hidden]) .chart:not([hidden])')].map((c) => c.dataset.metrics)"
    )
    assert {"reward", "eff_rate", "loss", "eval_avg"} <= set(shown) and "lr" not in shown
    # something was drawn: the canvas of a chart in sight is not blank
    drawn = "(() => { const c = document.querySelector('section:not([hidden]) .chart:not([hidden]) canvas'); return c.width > 0 && c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v > 0); })()"  # noqa: E501
    browser.wait(drawn)
    open_trees(browser, url, 7)
    assert texts(browser, ".tree .step")[:3] == ["prompt", "7*8=6", "6-5=1"]
    assert texts(browser, ".tree .turn text") == ["2"]
    assert texts(browser, ".prompts .count") == ["6 trees"]


def test_only_trees_branched_by_ib_score_come_with_the_remark_on_their_reward(tmp_path: Path, browser: Browser) -> None:
    guided, chains = (make_run(tmp_path / name, steps=3, trees=1) for name in ("guided", "chains"))
    (chains / "config.yaml").write_text("search: {method: independent}\n", encoding="utf-8")
    for runs, said in (([guided], 1), ([chains], 0), ([chains, guided], 1)):
        browser.open(export_page(runs, tmp_path / "page.html", trees=1).as_uri())
        assert len(texts(browser, ".result")) > 0
        assert sum("guided tree is not accuracy" in text for text in texts(browser, ".warning")) == said


def test_the_curve_of_a_thinned_run_is_its_mean_around_which_the_extremes_lie(tmp_path: Path, browser: Browser) -> None:
    run = make_run(tmp_path / "run", steps=1, trees=0)
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(2, 8001):
            file.write(json.dumps({"step": step, "tokens_sampled": 10, "loss": float(step % 8 == 0)}) + "\n")
    browser.open(export_page([run], tmp_path / "page.html", trees=0).as_uri())
    assert "curves: lowest, highest and mean of every 8 steps" in texts(browser, ".facts li")
    loss = "runs[0].series('loss', 'tokens').slice(10)"
    assert browser.run(f"[...new Set({loss}.map((p) => p[1]))].sort()") == [0, 1]
    assert browser.run(f"smoothed({loss}, 0.6).at(-1)") == [pytest.approx(1000 + 7999 * 10), pytest.approx(1 / 8)]


@pytest.mark.parametrize("width", [1500, 700, 320])
def test_a_narrow_window_needs_no_scrolling_sideways(tmp_path: Path, browser: Browser, width: int) -> None:
    run = make_run(tmp_path / "run", steps=30, trees=1)
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    try:
        for tab in ("overview", "curves"):
            browser.open(f"{export_page([run], tmp_path / 'page.html', trees=1).as_uri()}#{tab}")
            assert browser.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    finally:
        browser.call("Emulation.clearDeviceMetricsOverride")


def test_boxes_never_meet_and_the_keyboard_walks_them(tmp_path: Path, browser: Browser) -> None:
    run = make_run(tmp_path / "run", steps=1, trees=1)
    open_trees(browser, export_page([run], tmp_path / "page.html", trees=1).as_uri(), 7)
    places = browser.run(
        "[...document.querySelectorAll('.tree .node > rect')].map((r) => [+r.getAttribute('x'), +r.getAttribute('y')])"
    )
    assert len({tuple(place) for place in places}) == len(places) == 7
    picked = "document.querySelector('.tree .picked .step').textContent"
    browser.run("document.querySelector('svg.tree').focus()")
    assert browser.run(picked) == "6-5=1"
    for key, text in (("ArrowLeft", "7*8=6"), ("ArrowRight", "6-5=1"), ("ArrowDown", "6-5=2"), ("Home", "prompt")):
        browser.press(key)
        assert browser.run(picked) == text
    before = browser.run("document.querySelector('svg.tree > g').getAttribute('transform')")
    browser.press("+")
    assert browser.run("document.querySelector('svg.tree > g').getAttribute('transform')") != before


def test_numbers_have_a_minus_sign_everywhere(tmp_path: Path, browser: Browser) -> None:
    run = make_run(tmp_path / "run", steps=1, trees=1)
    browser.open(export_page([run], tmp_path / "page.html", trees=1).as_uri())
    shown = browser.run("[0.25, -12345, 0.0000000123, -0.0000000123].map(number)")
    assert shown == ["0.25", "\u221212.3k", "1.23e\u22128", "\u22121.23e\u22128"]


def test_a_step_is_shown_with_heat_that_can_be_switched(tmp_path: Path, browser: Browser) -> None:
    run = make_run(tmp_path / "run", steps=1, trees=1)
    open_trees(browser, export_page([run], tmp_path / "page.html", trees=1).as_uri(), 7)
    browser.run("document.querySelectorAll('.tree .node')[3].dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    assert texts(browser, ".tokens .own") == ["6-5=2\n"]
    heat = "[...document.querySelectorAll('.tokens .own bdi')].map((t) => parseFloat(t.style.getPropertyValue('--h')) || 0)"  # noqa: E501
    by_logprob = browser.run(heat)
    assert by_logprob[0] == 0 and by_logprob[1] == 100  # log-probs 0 and -5
    browser.press("h")
    assert browser.run("document.querySelectorAll('.tokens .own .entropy').length") == 2
    browser.press("h")
    assert browser.run(heat) == [0, 0]


def test_hostile_text_stays_text(tmp_path: Path, browser: Browser) -> None:
    run = make_run(tmp_path / "<img src=x onerror=alert(0)>", steps=2, trees=0, model=f"models/{HOSTILE}")
    with RunFolder.open(run, step=2) as folder:
        add_tree(folder, 2, prompt=HOSTILE, text=HOSTILE, answer=HOSTILE)
    page = export_page([run], tmp_path / "page.html", trees=9)
    with served(run) as live:
        for url in (page.as_uri(), live):
            open_trees(browser, url, 7)
            browser.run(
                "document.querySelectorAll('.tree .node')[1].dispatchEvent(new MouseEvent('click', {bubbles: true}))"
            )
            assert (
                browser.run("document.querySelectorAll('img, b > img, iframe').length + document.scripts.length") == 2
            )
            assert browser.run("window.hacked") is None
            [own] = texts(browser, ".tokens .own")
            assert "</script><script>" in own and "\u241b[31m" in own and "\u27e8202E\u27e9" in own
            assert "\x1b" not in own and "\u202e" not in browser.run("document.body.innerText")


def test_a_live_run_grows_without_reloading(tmp_path: Path, browser: Browser) -> None:
    run = make_run(tmp_path / "run", steps=2, trees=1)
    with served(run) as url:
        open_trees(browser, url, 7)
        browser.run("window.same = true")
        assert texts(browser, ".count") == ["1 trees"]
        with RunFolder.open(run, step=2) as folder:
            log_steps(folder, range(3, 6))
            add_tree(folder, 5)
        browser.wait("document.querySelector('.count').textContent === '2 trees'")
        browser.wait("document.querySelector('.status.live').textContent.startsWith('step 5')")
        with RunFolder.open(run, step=3):  # resumed from step 3: what came after is gone
            pass
        browser.wait("document.querySelector('.status').textContent.startsWith('step 3')")
        assert browser.run("window.same") and texts(browser, ".count") == ["1 trees"]


def test_two_runs_lie_side_by_side(tmp_path: Path, browser: Browser) -> None:
    runs = [make_run(tmp_path / name, steps=3, trees=3) for name in ("first", "second")]
    open_trees(browser, export_page(runs, tmp_path / "page.html", trees=9).as_uri(), 14)
    assert texts(browser, ".pane header .runname") == ["first", "second"]
    assert texts(browser, ".count") == ["6 trees"]
    browser.run("location.hash = 'overview'")
    browser.wait("!document.querySelector('.charts').closest('section').hidden")
    dots = "map((node) => getComputedStyle(node, '::before').backgroundColor)"
    of_the_top, of_the_results = (
        browser.run(f"[...document.querySelectorAll('{place} .runname')].{dots}") for place in (".names", ".results")
    )
    assert of_the_top == of_the_results and len(set(of_the_top)) == 2
    browser.run("document.querySelector('.charts').scrollIntoView()")
    browser.wait("document.querySelectorAll('.key span').length > 0")
    assert {"first", "second"} <= set(texts(browser, ".charts .key span"))


def test_thousands_of_steps_and_hundreds_of_trees_stay_quick(tmp_path: Path, browser: Browser) -> None:
    run = make_run(tmp_path / "run", steps=0, trees=0)
    with RunFolder.open(run) as folder:
        log_steps(folder, range(1, 2001), events=False)
        for i in range(300):
            add_tree(folder, 1 + i, prompt=f"{i}*2=?")
    with served(run) as url:
        open_trees(browser, url, 7)
        assert browser.run("document.querySelectorAll('.space .row').length") < 60  # only those in sight
        seconds = browser.run(
            "(() => { const t = performance.now(); tabs.curves.refresh(); shared.charts.forEach((c) => { c.force = true; c.draw(); }); return (performance.now() - t) / 1000; })()"  # noqa: E501
        )
        assert seconds < 2.0
        browser.run("tabs.trees.table.text.value = '123*'; tabs.trees.table.refresh()")
        assert texts(browser, ".count") == ["1 of 300"]
        browser.run("tabs.trees.table.text.value = ''; tabs.trees.table.from.value = 299; tabs.trees.table.refresh()")
        assert texts(browser, ".count") == ["2 of 300"]
