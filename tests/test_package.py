"""The sdist and the wheel: what is in them, and that the wheel works where nothing else of this checkout is."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import gsm_sgd

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("build") is None, reason="needs build: pip install build")]

ROOT = Path(__file__).parent.parent
LISTING = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
)
SOURCES = {path for path in LISTING.stdout.split() if (ROOT / path).exists()}
needs_git = pytest.mark.skipif(not SOURCES, reason="needs a git checkout, to know what belongs to it")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the sdist, and of the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    isolation = [] if find_spec("hatchling") is None else ["--no-isolation"]
    run([sys.executable, "-m", "build", *isolation, "--outdir", folder, ROOT])
    return folder


def run(command, **options):
    """Run a command and return what it prints."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, env=environment, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_git
def test_sdist_is_the_checkout(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert files - {"PKG-INFO"} == {path for path in SOURCES if not path.startswith(".ci/")}


@needs_git
def test_wheel_is_the_package_and_nothing_else(built):
    files = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    package = {path.removeprefix("src/") for path in SOURCES if path.startswith("src/")}
    assert {"gsm_sgd/py.typed", "gsm_sgd/native/step.c", "gsm_sgd/reports/page/report.html"} <= package
    assert {path for path in files if ".dist-info/" not in path} == package
    assert any(path.endswith("licenses/LICENSE") for path in files)


def test_wheel_works_in_an_empty_environment(built, tmp_path):
    """What it depends on is lent from here: to install torch again would take minutes."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    here = sysconfig.get_path("purelib")
    there = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    (there / "lent.pth").write_text(f"{here}\n")  # a folder named in a .pth file lends no editable installs
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install"]
    run([*pip, "--quiet", "--no-deps", "--no-index", "--ignore-installed", next(built.glob("*.whl"))])
    found = run([python, "-c", "import gsm_sgd; print(gsm_sgd.GSM, gsm_sgd.__file__)"], cwd=tmp_path)
    assert found.split()[-1] == str(there / "gsm_sgd" / "__init__.py")
    assert "lenet300" in run([there.parents[2] / "bin" / "gsm", "list"], cwd=tmp_path)


def tags():
    """Return the tags of the checkout's commit."""
    done = subprocess.run(["git", "tag", "--points-at", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return [tag for tag in done.stdout.split() if tag.startswith("v")]


def test_the_version_is_the_one_that_the_package_states(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.name.startswith(f"gsm_sgd-{gsm_sgd.__version__}-")
    assert all(tag == f"v{gsm_sgd.__version__}" for tag in tags())


def test_the_changelog_has_the_version():
    assert f"\n## {gsm_sgd.__version__} (" in (ROOT / "CHANGELOG.md").read_text()
