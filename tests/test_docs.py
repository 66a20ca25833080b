"""The documentation holds: snippets run, tutorials show what they say, the site has all pages."""

import re

import pytest

from pages import PAGES, ROOT, check_commands, commands, run_snippets, snippets

DOCS = [page.relative_to(ROOT).as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")]
TUTORIALS = [page for page in DOCS if "/tutorials/" in page and snippets(page)]
OTHERS = [page for page in DOCS if page not in TUTORIALS and snippets(page)]
WIDEST = 88  # letters of a line of code that the site shows without scrolling


@pytest.mark.parametrize("page", OTHERS)
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(list(run_snippets(page))) == len(snippets(page))


def follow(page, capsys):
    """Run a tutorial as it stands, check what it says is printed, and return what is defined and printed."""
    names = list(run_snippets(page, dict))[-1]
    printed = capsys.readouterr().out
    for output in re.findall(r"^```text\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S):
        assert output in printed
    return names, printed


@pytest.mark.slow
def test_mnist(tmp_path, monkeypatch, capsys, mnist_folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSM_DATA", str(mnist_folder))
    names, printed = follow("docs/tutorials/mnist.md", capsys)
    assert names["masks"].num_kept == 4_436
    assert names["accuracy"]() > 0.975
    assert [printed.count(f": {phase}, ") > 0 for phase in ("ramp", "search", "fade", "done")] == [True] * 4
    density = [row.nonzeros / row.params for row in names["masks"].table()]
    assert density[-1] > 10 * density[0]  # far denser
    assert names["file"].stat().st_size < 30_000


@pytest.mark.slow
def test_your_own_cnn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, printed = follow("docs/tutorials/cnn.md", capsys)
    assert "488 of 4880 weights" in printed
    dense, pruned = (float(number) for number in re.findall(r": ([\d.]+)%", printed))
    assert min(dense, pruned) > 90
    assert abs(dense - pruned) < 3  # equally well


@pytest.mark.slow
def test_a_transformer(capsys):
    names, printed = follow("docs/tutorials/transformer.md", capsys)
    assert "with 1,638 weights: " in printed
    assert names["masks"].num_kept == 1_638
    assert not {"tokens.weight", "positions.weight", "head.weight"} & names["masks"].keys()
    assert min(names["accuracy"](names[net]) for net in ("dense", "sparse")) > 0.97


@pytest.mark.slow
def test_a_faster_onnx_file(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    names, printed = follow("docs/tutorials/channels.md", capsys)
    assert names["accuracy"](names["slim"]) > 0.9
    dense, narrow = (int(size.replace(",", "")) for size in re.findall(r"onnx: ([\d,]+) bytes", printed))
    assert narrow < dense / 2


@pytest.mark.parametrize("page", [page for page in DOCS if commands(page)])
def test_commands_parse(page):
    check_commands(page)


@pytest.mark.parametrize("page", TUTORIALS + OTHERS)
def test_code_fits_the_page(page):
    assert [line for block in snippets(page) for line in block.splitlines() if len(line) > WIDEST] == []


def test_every_public_name_is_in_the_reference():
    """Of each package that a user imports from; Sphinx fails where a name in the reference is none."""
    import gsm_sgd
    from gsm_sgd import callbacks, export, methods, structured

    reference = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.rst"))
    documented = set(re.findall(r"^\.\. auto\w+:: \S*?(\w+)$", reference, re.M)) | {"Block", "NM"}  # of automodules
    for package in (gsm_sgd, callbacks, export, methods, structured):
        assert set(package.__all__) - documented == set(), package.__name__
