"""The report page in a headless Chromium, from file://: keyboard, pointer, slider, widths, colours. Numbers made up."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from speechllm_prune.evaluation.statistics import largest_blocks
from speechllm_prune.reporting.analysis import analyse, choose_blocks
from speechllm_prune.reporting.build import build_report
from speechllm_prune.reporting.collect import collect
from tests.recipes.browser import Browser, find_browser
from tests.unit import fake_results as fake

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_browser() is None,
        reason="no Chromium on the PATH or in $SPEECHLLM_PRUNE_BROWSER",
    ),
]
EVIL = '<script>window.evil = 1</script><img src="x.png" onerror="window.evil = 1">'


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment whose transcripts and names want to be markup. Read only."""
    folder = tmp_path_factory.mktemp("browser") / "results" / "demo" / "1"
    fake.write_experiment(folder, (2, 4, 6, 8), num_utterances=40)
    for file in folder.glob("eval/*/*/hyps.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row["id"] += EVIL
            row["hyp"] = row["hyp"].replace("x", "<b>x</b>")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def page(experiment: Path) -> Path:
    return build_report([experiment]).page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = find_browser()
    assert executable is not None
    browser = Browser(executable, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def text_of(browser: Browser, selector: str) -> str:
    """Text of the first element that matches."""
    return str(browser.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))


def test_nothing_is_fetched_and_no_text_runs(browser, page):
    browser.open(page)
    assert browser.requested == [page.resolve().as_uri()]
    assert browser.errors == []
    assert browser.evaluate("window.evil") is None
    assert "<script>window.evil" in text_of(browser, "#worst ~ .pick")
    # Even markup that is put in afterwards does not run: the policy forbids it.
    browser.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=evil=1>')")
    browser.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'evil = 1'}))"
    )
    assert browser.evaluate("window.evil") is None


def test_the_slider_moves_line_rings_and_table_as_python_chooses(browser, page, experiment):
    data = collect(experiment)
    results = analyse(data)
    before = None
    seen = set()
    browser.open(page)
    for percent in (0, 10, 25, 31.5, 60, 100):
        tolerance = percent / 100
        choice = choose_blocks(data, results, tolerance)
        browser.evaluate(
            f"(s => {{ s.value = {percent}; s.dispatchEvent(new Event('input')); }})"
            "(document.getElementById('chooser-0-slider'))"
        )
        rows = browser.evaluate(
            "[...document.querySelectorAll('#chooser-0-chosen tbody tr')]"
            ".map(row => [...row.cells].map(c => c.textContent))"
        )
        chosen = [str(n or "none") for n in (choice.largest, choice.safe)]
        assert [row[2] for row in rows[:2]] == chosen, percent
        ringed = browser.evaluate(
            "['largest', 'safe'].map(rule => "
            "[...document.querySelectorAll(`.joint .point.${rule}`)].map(p => p.dataset.n))"
        )
        assert ringed == [[n] if n != "none" else [] for n in chosen]
        assert f"joint healing: n = {chosen[0]}, safe {chosen[1]}" in text_of(
            browser, "#chooser-0-told"
        )
        height = float(browser.evaluate("document.querySelector('.tolerance').getAttribute('y1')"))
        assert before is None or height < before  # a higher tolerance lies higher
        before = height
        seen.add(chosen[0])
        changes = {n: {k: r.degradation for k, r in f.items()} for n, f in choice.tested.items()}
        assert largest_blocks(changes, tolerance, data.eval_sets)[0] == choice.largest
    assert len(seen) > 2


def test_the_line_begins_where_the_script_would_put_it(browser, page):
    browser.open(page)
    first = float(browser.evaluate("document.querySelector('.tolerance').getAttribute('y1')"))
    html = browser.evaluate("document.querySelector('#chooser-0-chosen tbody').textContent")
    browser.evaluate(
        "document.getElementById('chooser-0-slider').dispatchEvent(new Event('input'))"
    )
    again = float(browser.evaluate("document.querySelector('.tolerance').getAttribute('y1')"))
    assert again == pytest.approx(first, abs=0.06)
    after = browser.evaluate("document.querySelector('#chooser-0-chosen tbody').textContent")
    assert "".join(html.split()) == "".join(after.split())


def test_slider_by_keyboard(browser, page):
    browser.open(page)
    browser.evaluate("document.getElementById('chooser-0-slider').focus()")
    browser.press("ArrowRight")
    assert text_of(browser, "#chooser-0-told").startswith("25.5 % worse")
    label = "document.getElementById('chooser-0-slider').getAttribute('aria-valuetext')"
    assert browser.evaluate(label) == "25.5 percent"


def test_heatmap_by_keyboard_and_pointer(browser, page, experiment):
    speech = collect(experiment).measurements["speech"]
    browser.open(page)
    browser.evaluate("document.querySelector('.heatmap svg').focus()")

    def read() -> tuple[int, int, float]:
        found = re.match(r"n = (\d+), l = (\d+): d = ([\d.]+)\.", text_of(browser, ".readout"))
        assert found is not None
        return int(found[1]), int(found[2]), float(found[3])

    def expected(n: int, l: int) -> tuple[int, int, float]:
        return n, l, pytest.approx(speech.matrix[n - 1, l], abs=6e-5)

    assert read() == expected(1, speech.path[1])
    for key in ("ArrowUp", "ArrowUp", "ArrowUp", "Home"):
        browser.press(key)
    assert read() == expected(4, speech.path[4])
    start = speech.path[4]
    assert (
        f"Removes layers {start} to {start + 3} of 12 (33.3\u00a0%), layer {start + 4} receives. On the"
        in text_of(browser, ".readout")
    )
    browser.press("ArrowLeft")
    assert read() == expected(4, start - 1)
    for _ in range(20):
        browser.press("ArrowUp")  # as far as the triangle goes
    assert read() == expected(12, 0)
    assert "no layer is left to receive" in text_of(browser, ".readout")
    box = browser.evaluate(
        "(r => { r.scrollIntoView({block: 'center'}); const b = r.getBoundingClientRect(); "
        "return [b.x + b.width / 2, b.y + b.height / 2]; })(document.querySelectorAll('.heatmap rect')[3])"
    )
    browser.move(*box)
    assert read() == expected(1, 3)


def test_picked_table_is_the_only_one_shown(browser, page):
    browser.open(page)
    shown = "[...document.querySelectorAll('#forgetting ~ .pick > .option')].filter(o => o.offsetHeight).length"
    names = "[...document.querySelectorAll('#forgetting ~ .pick option')].map(o => o.textContent)"
    assert browser.evaluate(shown) == 1
    assert len(browser.evaluate(names)) == 3 * 4
    browser.evaluate("document.querySelector('#forgetting ~ .pick select').focus()")
    browser.press("ArrowDown")
    caption = "[...document.querySelectorAll('#forgetting ~ .pick caption')].find(c => c.offsetHeight).textContent"
    assert browser.evaluate(caption) == browser.evaluate(names)[1]


def test_everything_reached_by_tab_has_a_name(browser, page):
    browser.open(page)
    seen = []
    for _ in range(400):
        browser.press("Tab")
        found = browser.evaluate(
            "(e => e === document.body ? null : [e.tagName, (e.getAttribute('aria-label') "
            "|| e.labels?.[0]?.textContent || e.textContent || '').trim()])(document.activeElement)"
        )
        if found is None:
            break
        seen.append(found)
    kinds = {tag.lower() for tag, _ in seen}
    assert {"a", "input", "svg", "select", "div"} <= kinds, kinds
    assert [tag for tag, name in seen if not name] == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 1600])
def test_nothing_sticks_out_or_disappears(browser, page, width, dark, tmp_path):
    browser.open(page, width, dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    # What scrolls sideways by itself may be wider than the window; nothing else may.
    outside = browser.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1 "
        "&& !e.closest('.scroll, figure:not(.interactive), .unseen')).map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []
    faint = browser.evaluate(CONTRAST)
    assert faint == []
    assert browser.screenshot(tmp_path / "page.png").stat().st_size > 50_000


# Text and its ground in the page's own colours, by the contrast that WCAG 2 asks for (4.5 : 1).
CONTRAST = """
(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = colour.map((c) => (c /= 255, c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const colour = rgb(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const found = new Set();
  for (const e of document.querySelectorAll("main *, header *, footer *")) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || !e.offsetHeight) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color).slice(0, 3)), light(ground(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.add(`${e.tagName}.${e.className} ${ratio.toFixed(2)}`);
  }
  return [...found];
})()
"""
