"""The report in Chromium: it draws without an error or a request, and works by mouse, keyboard, finger and on paper."""

import shutil
import time

import pytest

from gsm_sgd.reports.html import write_report
from made_runs import make_run

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
]
_PATIENCE = 300_000  # milliseconds: the machine may be busy with something else
FITS = """
    [...document.querySelectorAll(".panel:not([hidden]) .plot[data-drawn]")].every(
        (plot) => plot.querySelector(".main-svg").clientWidth === plot.clientWidth
    )
"""
PANELS = ["results", "curves", "layers", "weights", "masks", "size", "recipe"]


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


def wait_until(page, condition, argument=None):
    """Wait for what the page forbids `wait_for_function` to wait for, as that evaluates text from within the page."""
    end = time.monotonic() + _PATIENCE / 1000
    while not page.evaluate(condition, argument):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)


def open_panel(page, panel):
    """Open a panel and scroll through it, so that all of its plots are drawn."""
    page.click(f"#tab-{panel}")
    for plot in page.locator(f"#{panel} .plot").all():
        plot.scroll_into_view_if_needed()
        plot.locator(".main-svg").first.wait_for()


def shown(page):
    return [panel for panel in PANELS if page.locator(f"#{panel}").is_visible()]


@pytest.mark.parametrize("width", [360, 1280])
def test_every_panel_draws_and_fits(visit, width):
    page = visit(width)
    for panel in PANELS:
        open_panel(page, panel)
        assert shown(page) == [panel]
        plots = page.locator(f"#{panel} .plot").all()
        assert bool(plots) == (panel != "recipe")
        for plot in plots:
            assert plot.bounding_box()["width"] <= width
            assert plot.locator(".plot-container .xtick, .plot-container .xaxislayer-above").count() > 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_tabs_by_keyboard(visit):
    page = visit()
    page.focus("#tab-results")
    for key, panel in [("ArrowRight", "curves"), ("End", "recipe"), ("ArrowRight", "results"), ("ArrowLeft", "recipe")]:
        page.keyboard.press(key)
        assert shown(page) == [panel]
        assert page.evaluate("document.activeElement.id") == f"tab-{panel}"
        assert page.get_attribute(f"#tab-{panel}", "aria-selected") == "true"
        assert page.locator("[role=tab][tabindex='0']").count() == 1
    page.keyboard.press("Home")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "results"


def test_the_address_opens_a_panel(visit, address):
    page = visit()
    page.evaluate("location.hash = '#masks'")
    page.wait_for_selector("#masks", state="visible")
    assert shown(page) == ["masks"]


FOREIGN_FONTS = """
    () => {
        const font = (element, part) => getComputedStyle(element, part).fontFamily;
        const ours = font(document.body);
        const shown = [...document.querySelectorAll(".plot text, .plot tspan")].filter((text) => text.textContent);
        const buttons = [...document.querySelectorAll(".modebar-btn")];
        return [
            shown.length > 0 && buttons.length > 0,
            ...shown.map((text) => font(text)).filter((theirs) => theirs !== ours),
            ...buttons.map((button) => font(button, "::after")).filter((theirs) => theirs !== ours),
        ];
    }
"""


def test_plots_have_the_fonts_of_the_page(visit):
    page = visit()
    for panel in PANELS:
        open_panel(page, panel)
    open_panel(page, "layers")
    plot = page.locator("#layers .plot").first
    plot.locator(".points path").first.hover(force=True)
    plot.locator(".hoverlayer .hovertext").first.wait_for()
    assert page.evaluate(FOREIGN_FONTS) == [True]


@pytest.mark.parametrize(("panel", "words"), [("curves", "epoch"), ("layers", "GSM keeps"), ("results", "seed")])
def test_tooltips(visit, panel, words):
    page = visit()
    open_panel(page, panel)
    plot = page.locator(f"#{panel} .plot").first
    plot.scroll_into_view_if_needed()
    point = plot.locator(".points path, .lines path").first.bounding_box()
    page.mouse.move(point["x"] + 2, point["y"] + 2)
    page.mouse.move(point["x"] + min(4, point["width"] / 2), point["y"] + min(4, point["height"] / 2))
    tooltip = plot.locator(".hoverlayer .hovertext")
    tooltip.first.wait_for()
    assert words in tooltip.first.text_content()


def test_the_dark_has_colours_of_its_own_and_follows_the_system(visit):
    def colours():
        trace = "() => document.querySelector('#results .plot .js-line, #results .plot path.point').style.stroke"
        background = "() => getComputedStyle(document.body).backgroundColor"
        paper = "() => document.querySelector('#results .plot .main-svg').style.background"
        return [page.evaluate(script) for script in (background, paper, trace)]

    page = visit(color_scheme="light")
    open_panel(page, "results")
    light = colours()
    page.emulate_media(color_scheme="dark")
    wait_until(page, "before => document.querySelector('#results .main-svg').style.background != before", light[1])
    dark = colours()
    assert all(one != other for one, other in zip(light, dark, strict=True))
    page.emulate_media(color_scheme="light")
    wait_until(page, "before => document.querySelector('#results .main-svg').style.background == before", light[1])
    assert colours() == light


def test_paper_has_every_panel_in_light_colours(visit):
    page = visit(color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert shown(page) == PANELS
    assert not page.locator("#tabs").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator(".plot").count() == page.locator(".plot.js-plotly-plot").count()
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    page.emulate_media(media="screen", color_scheme="dark")
    assert shown(page) == ["results"]
    for panel in ("results", "layers"):
        open_panel(page, panel)
        wait_until(page, FITS)


def test_plots_fit_a_window_that_has_changed_while_another_tab_was_open(visit):
    page = visit(width=700)
    open_panel(page, "layers")
    open_panel(page, "results")
    page.set_viewport_size({"width": 1280, "height": 900})
    open_panel(page, "layers")
    wait_until(page, FITS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(visit, scheme):
    page = visit(color_scheme=scheme)
    for panel in PANELS:
        open_panel(page, panel)
    page.evaluate("document.querySelectorAll('.panel').forEach((panel) => { panel.hidden = false; })")
    found = axe.Axe().run(page).response["violations"]
    assert [(one["id"], one["nodes"][0]["html"][:200]) for one in found] == []


def test_the_tables_are_there_without_scripts(visit):
    page = visit(java_script_enabled=False)
    assert shown(page) == PANELS
    assert not page.locator(".plot").first.is_visible()
    assert page.get_by_text("The pictures need JavaScript").is_visible()
