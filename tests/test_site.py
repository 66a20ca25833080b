"""The documentation site in Chromium: it fits a phone, needs nothing of other sites, and can be searched."""

import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.skipif(find_spec("furo") is None, reason="needs furo: pip install -e '.[docs]'"),
]

DOCS = Path(__file__).parent.parent / "docs"
PATIENCE = 300_000  # milliseconds: the machine may be busy with something else
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site."""
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-d",
        folder / "doctrees",
        DOCS,
        folder / "html",
    ]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "html"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def page(address):
    """A page on a phone; in the end nothing may have gone wrong, nor been asked of another site."""
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page, wrong = chromium.new_page(viewport=PHONE), []
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(address) else None)
        yield page
        chromium.close()
        assert wrong == []


CUT_OFF = """
    () => {
        const scrolls = (element) => element.tagName != "ARTICLE"
            && (["auto", "scroll"].includes(getComputedStyle(element).overflowX) || scrolls(element.parentElement));
        return [...document.querySelectorAll("article *")]
            .filter((element) => element.getBoundingClientRect().right > innerWidth && !scrolls(element.parentElement))
            .map((element) => element.outerHTML.slice(0, 200));
    }
"""


def test_pages_fit_a_phone(site, address, page):
    """What is wider, as tables and code, scrolls within itself."""
    names = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html") if "_modules" not in path.parts)
    assert len(names) > 40
    for name in names:
        page.goto(address + name)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], name
        assert page.evaluate(CUT_OFF) == [], name


def test_docstrings_read_as_they_stand(address, page):
    page.goto(f"{address}reference/schedules.html")
    equations = "".join(page.locator("pre").all_inner_texts())
    assert "z <- beta z + eta w\nw <- w - alpha z " in equations
    assert "x = (1 - lambda) (lambda - beta) / lambda\nNesterov: " in equations
    page.goto(f"{address}reference/optimizers.html")
    text = page.inner_text("article")
    assert '"taylor" |w g|, "fisher" |w| sqrt(v)' in text
    page.goto(f"{address}reference/masks.html")
    text = page.inner_text("article")
    assert ".apply_(model)" in text
    assert "\\" not in text


def test_wide_tables_can_be_scrolled(address, page):
    page.goto(f"{address}results.html")
    table = page.locator(".table-wrapper").first
    assert table.evaluate("(box) => box.scrollWidth > box.clientWidth + 50")
    table.evaluate("(box) => { box.scrollLeft = 40 }")
    assert table.evaluate("(box) => box.scrollLeft") == 40


def test_search(address, page):
    page.goto(f"{address}search.html?q=passive")
    page.wait_for_selector("ul.search li a")
    assert "How passive weights vanish" in page.inner_text("ul.search")


def test_site_is_dark_where_the_reader_wants_it(address, page):
    page.goto(address)
    grounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    light, dark = (sum(map(int, ground.strip("rgba()").split(",")[:3])) for ground in grounds)
    assert light > 700
    assert dark < 100
