"""The report in a real browser: drawn, reachable by keyboard, as wide as the screen, and silent.

Needs Debian's packages chromium and chromium-driver (or another Chrome with its chromedriver), and selenium.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reports import made, with_everything

from kvoffload.config import OffloadConfig
from kvoffload.profiler.drawing import page as pages
from kvoffload.profiler.drawing import sections

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="needs a browser: apt-get install chromium chromium-driver"
)
WIDTHS = (1280, 400)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
DEADLINE_S = 60
CHARTS = {
    *("roofline-chart", "planned-timeline", "measured-timeline", "split-chart", "batch-chart", "context-chart"),
    *("memory-chart", "compared-chart"),
}


class Browser:
    """One window of a headless browser."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path, width: int, scheme: str = "light") -> None:
        """Load a page and wait until its charts are drawn."""
        from selenium.webdriver.support.ui import WebDriverWait

        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.prefer(scheme)
        self.driver.get(path.as_uri())
        WebDriverWait(self.driver, DEADLINE_S).until(lambda _: self.run("return document.body.dataset.drawn"))

    def prefer(self, scheme: str) -> None:
        """Light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a script."""
        return self.driver.execute_script(script, *arguments)

    def press(self, key: str) -> None:
        """One key."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver, duration=0).send_keys(key).perform()

    def console(self) -> list[dict[str, Any]]:
        """What the console got since the last call."""
        found: list[dict[str, Any]] = self.driver.get_log("browser")
        return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)  # with a path nothing is looked for in the network
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(DEADLINE_S)
    yield Browser(driver)
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(pages.html(sections.page(with_everything(), "opt-6.7b", "made")), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", WIDTHS)
def test_every_chart_is_drawn_and_the_page_asks_for_nothing(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    assert browser.console() == []
    assert browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)") == []
    drawn = browser.run(
        """const figures = JSON.parse(document.getElementById('figures').textContent);
        return Object.fromEntries([...document.querySelectorAll('.chart')].map(chart => {
            const box = chart.querySelector('svg.main-svg').getBoundingClientRect();
            const traces = [...chart.querySelectorAll('.cartesianlayer .trace')];
            const filled = traces.filter(trace => trace.querySelector('.point, .js-line'));
            return [chart.id, [box.width, box.height, filled.length, figures[chart.id].data.length]];
        }))"""
    )
    assert set(drawn) == CHARTS
    for name, (wide, high, filled, traces) in drawn.items():
        assert wide >= 0.85 * min(width, 1152), name
        assert high >= 200, name
        assert filled == traces > 0, name


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_screen(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    browser.run("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    beyond = browser.run(
        """return [...document.querySelectorAll('body *')].filter(element =>
            !element.closest('.scroll, .skip, svg') && element.getBoundingClientRect().right > innerWidth + 1
        ).map(element => element.outerHTML.slice(0, 80))"""
    )
    assert beyond == []


def test_the_tab_key_reaches_the_skip_link_the_navigation_and_every_section(browser: Browser, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(page, WIDTHS[0])
    names = browser.run("return [...document.querySelectorAll('section')].map(section => section.id)")
    visited: list[list[str]] = []
    for _ in range(60):
        browser.press(Keys.TAB)
        visited.append(
            browser.run(
                """const at = document.activeElement, section = at.closest('section');
                return [at.className || at.tagName, at.getAttribute('href') || '', section ? section.id : ''];"""
            )
        )
        if visited[-1][0] == "BODY":
            break
    assert visited[0][:2] == ["skip", "#main"]
    assert [href for _, href, _ in visited[1 : 1 + len(names)]] == [f"#{name}" for name in names]
    assert list(dict.fromkeys(section for _, _, section in visited if section)) == names


def test_enter_follows_the_navigation_and_opens_a_table(browser: Browser, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(page, WIDTHS[0])
    browser.run("document.querySelector('nav a[href=\"#split\"]').focus()")
    browser.press(Keys.ENTER)
    assert browser.run("return location.hash") == "#split"
    top = browser.run("return document.querySelector('#split h2').getBoundingClientRect().top")
    assert 0 <= top <= 450  # in view, and not behind the navigation
    assert top >= browser.run("return document.querySelector('nav').getBoundingClientRect().bottom")
    browser.run("document.querySelector('#split summary').focus()")
    browser.press(Keys.ENTER)
    assert browser.run("return document.querySelector('#split details').open")


def test_charts_take_the_colours_of_the_page_light_and_dark(browser: Browser, page: Path) -> None:
    def brightness() -> tuple[float, float]:
        """Of the letters in a chart and of the page behind them, 0 to 255."""
        colours = browser.run(
            """const label = document.querySelector('#split-chart .xtick text');
            return [getComputedStyle(label).fill, getComputedStyle(document.body).backgroundColor];"""
        )
        letters, back = ([float(part) for part in colour[4:-1].split(",")] for colour in colours)
        return sum(letters) / 3, sum(back) / 3

    browser.open(page, WIDTHS[0])
    letters, back = brightness()
    assert back - letters > 150
    browser.prefer("dark")
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser.driver, DEADLINE_S).until(lambda _: brightness()[0] > 150)
    letters, back = brightness()
    assert letters - back > 150


def test_words_are_large_enough_to_read_on_a_narrow_screen(browser: Browser, page: Path) -> None:
    browser.open(page, WIDTHS[1])
    sizes = browser.run(
        """const words = 'p, dd, figcaption, td, summary, .xtick text, .ytick text, .legendtext';
        return [...document.querySelectorAll(words)].map(one => parseFloat(getComputedStyle(one).fontSize))"""
    )
    assert min(sizes) >= 12


OVERLAPPING = """const touch = (one, other) => one.left < other.right && other.left < one.right
        && one.top < other.bottom && other.top < one.bottom;
    return [...document.querySelectorAll('.chart')].flatMap(chart => {
        const shown = [...chart.querySelectorAll(arguments[0])].filter(one => one.style.visibility !== 'hidden');
        const boxes = shown.map(one => [one.textContent, one.getBoundingClientRect()]);
        return boxes.flatMap(([name, box], idx) => boxes.slice(idx + 1).filter(([, other]) => touch(box, other))
            .map(([other]) => `${chart.id}: ${name}, ${other}`));
    })"""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("words", [".xtick text", ".ytick text", ".textpoint text"])
def test_no_two_ticks_or_names_of_dots_overlap(browser: Browser, page: Path, words: str, width: int) -> None:
    browser.open(page, width)
    assert browser.run(OVERLAPPING, words) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_names_of_dots_are_shown_where_no_dot_is_and_inside_the_chart(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    shown, covered = browser.run(
        """const chart = document.getElementById('roofline-chart'), edge = chart.getBoundingClientRect();
        const labels = [...chart.querySelectorAll('.textpoint text')].filter(one => one.style.visibility !== 'hidden');
        const dots = [...chart.querySelectorAll('.point')].map(one => one.getBoundingClientRect());
        const isCovered = (box) => box.right > edge.right || dots.some(dot => {
            const [x, y] = [(dot.left + dot.right) / 2, (dot.top + dot.bottom) / 2];
            return box.left < x && x < box.right && box.top < y && y < box.bottom;
        });
        return [labels.length, labels.filter(one => isCovered(one.getBoundingClientRect())).map(one => one.textContent)]
        """
    )
    assert shown >= 4
    assert covered == []


def test_legends_are_no_piles_on_a_narrow_screen(browser: Browser, page: Path) -> None:
    browser.open(page, WIDTHS[1])
    legends = browser.run(
        """return [...document.querySelectorAll('.legend')].map(list => [list.getBoundingClientRect().height,
            [...list.children].map(one => one.textContent.length)])"""
    )
    short = [(height, len(names)) for height, names in legends if max(names) <= 26]
    assert len(short) >= 5
    for height_px, entries in short:
        assert height_px <= 24 * -(-(entries + 1) // 2)


@pytest.mark.parametrize("width", [1280, 1920])
def test_a_wide_screen_is_used(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width)
    words, table, chart, pair = browser.run(
        """const box = (name) => document.querySelector(name).getBoundingClientRect();
        return [box('#roofline .words'), box('#ways table'), box('#memory-chart'), [box('#batch-chart').bottom,
            box('#context-chart').top]]"""
    )
    for box in (words, table, chart):
        assert box["width"] >= 0.94 * width
    assert (pair[0] > pair[1]) == (width == 1920), "side by side where both are still wide"


def test_an_old_browser_is_told_what_the_charts_need(browser: Browser, page: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    script = browser.driver.execute_cdp_cmd(
        "Page.addScriptToEvaluateOnNewDocument", {"source": "delete window.DecompressionStream"}
    )
    try:
        browser.driver.get(page.as_uri())
        WebDriverWait(browser.driver, DEADLINE_S).until(
            lambda _: browser.run("return document.getElementById('old-browser').offsetHeight > 0")
        )
        assert "later one; the tables hold the same numbers" in browser.run(
            "return document.getElementById('old-browser').innerText.replace(/[()]/g, '')"
        )
    finally:
        browser.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
    browser.open(page, WIDTHS[0])
    assert browser.run("return document.getElementById('old-browser').offsetHeight") == 0


WHOLE = OffloadConfig(device_weights_gib="all")  # weights are not streamed


def test_a_report_of_a_model_that_fits_nowhere_is_drawn_too(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(
        pages.html(sections.page(made("mixtral-8x7b", batch=1, config=WHOLE), "mixtral", "made")), encoding="utf-8"
    )
    browser.open(path, WIDTHS[1])
    assert browser.console() == []
    assert browser.run("return document.body.dataset.drawn") == "2"
    assert browser.run("return document.documentElement.scrollWidth") <= WIDTHS[1]
