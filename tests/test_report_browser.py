"""The report in Chromium: figures can be read at every width, in light and dark, by everybody, and on paper."""

import shutil

import pytest

from gsm_sgd.reports.html import write_report
from made_runs import make_run

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
]
_PATIENCE = 300_000  # milliseconds: the machine may be busy with something else
SMALLEST = 8  # CSS pixels of a letter


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A report of a lottery of two seeds, a deep net, and a run that is not finished."""
    folder = tmp_path_factory.mktemp("report")
    runs = [make_run(folder / f"s{seed}", seed=seed)[0] for seed in (0, 1)]
    runs.append(make_run(folder / "deep", "resnet56", preset="paper", command="prune")[0])
    runs.append(make_run(folder / "unfinished", "lenet5")[0])
    (runs[-1] / "result.json").unlink()
    write_report(runs, folder / "report.html")
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, address):
    """Open the report in a window of its own; in the end nothing may have gone wrong, nor been asked for."""
    contexts, wrong = [], []

    def opened(width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        context.set_default_timeout(_PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if request.url != address else None)
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


TEXTS = """
    () => [...document.querySelectorAll("svg")].map((svg) => {
        const box = svg.getBoundingClientRect();
        return [...svg.querySelectorAll("text")].map((text) => {
            const own = text.getBoundingClientRect();
            const style = getComputedStyle(text);
            return {
                text: text.textContent,
                size: parseFloat(style.fontSize) * box.width / svg.viewBox.baseVal.width,
                font: style.fontFamily,
                cut: Math.max(box.left - own.left, own.right - box.right, box.top - own.top, own.bottom - box.bottom),
            };
        });
    })
"""


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_figures_can_be_read(visit, width):
    page = visit(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    font = page.evaluate("getComputedStyle(document.body).fontFamily")
    figures = page.evaluate(TEXTS)
    assert len(figures) > 20
    for texts in figures:
        assert texts
        assert [text for text in texts if text["size"] < SMALLEST or text["cut"] > 1 or text["font"] != font] == []


COLOURS = """
    () => ["ink", "blue", "orange", "purple", "grid"].map((name) => {
        const selector = `[style*="stroke: var(--${name})"], [style*="fill: var(--${name})"]`;
        const style = getComputedStyle(document.querySelector(selector));
        return style.fill + style.stroke;
    })
"""


def test_colours_follow_the_system_and_paper_is_light(visit):
    def colours():
        return [*page.evaluate(COLOURS), page.evaluate("getComputedStyle(document.body).backgroundColor")]

    page = visit(color_scheme="light")
    light = colours()
    assert light[-1] == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark")
    assert all(one != other for one, other in zip(light, colours(), strict=True))
    page.emulate_media(media="print", color_scheme="dark")
    assert colours() == light
    assert not page.locator("nav").is_visible()
    assert all(figure.is_visible() for figure in page.locator("section svg").all())
    assert not page.locator("details svg").first.is_visible()  # what a reader would have to open
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_parts_and_figures_are_reached_by_keyboard(visit):
    page = visit(width=360)
    page.locator("nav a", has_text="Diagnostics").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('#diagnostics').getBoundingClientRect().top") < 100
    page.locator("#curves figure").first.focus()
    page.keyboard.press("ArrowRight")
    for _ in range(100):  # it scrolls smoothly; the page forbids the evaluation that wait_for_function needs
        if page.evaluate("document.querySelector('#curves figure').scrollLeft") > 0:
            return
        page.wait_for_timeout(50)
    pytest.fail("the figure does not scroll")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(visit, scheme):
    page = visit(color_scheme=scheme)
    assert page.locator("svg").count() == page.locator("svg[role=img][aria-label]").count() > 0
    found = axe.Axe().run(page).response["violations"]
    assert [(one["id"], one["nodes"][0]["html"][:200]) for one in found] == []


def test_a_click_sorts_a_table(visit):
    page = visit()
    table = page.locator("table.sortable").first
    cells = lambda: table.locator("tbody tr > :nth-child(6)").all_text_contents()  # noqa: E731
    head = table.locator("thead th").nth(5)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    falling = cells()
    head.locator("button").press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert cells() == falling[::-1] != falling
    assert falling == sorted(falling, reverse=True)
