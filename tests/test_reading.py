"""Files of others: what is no regular file, does not end, or inflates is refused before it is read."""

import io
import os
import pickle
import struct
import zipfile

import pytest
import torch

from gsm_sgd.experiments import UsageError
from gsm_sgd.experiments.pretrained import load_pretrained
from gsm_sgd.experiments.reading import load_tensors, open_regular, parse_json, read_json, read_yaml
from gsm_sgd.experiments.rundir import read_weights
from gsm_sgd.export.container import is_sparse
from gsm_sgd.export.hdf5_file import read_hdf5


@pytest.fixture
def specials(tmp_path):
    """A FIFO that nobody writes to, a device without an end, a folder, and a link to itself."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    return [tmp_path / name for name in ("fifo", "device", "folder", "loop")]


def test_only_regular_files_are_opened(specials, tmp_path):
    for path in specials:
        with pytest.raises(OSError, match=r"not a regular file|Is a directory|symbolic links"):
            open_regular(path)
        with pytest.raises(UsageError, match=f"{path} is not a safetensors file"):
            read_weights(path)
        with pytest.raises(UsageError, match=f"{path} is not an HDF5 file"):
            read_hdf5(path)
        assert not is_sparse(path)
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "link", 5) as stream:
        assert stream.read() == b"12345"
    with pytest.raises(OSError, match="it has more than 4 bytes"):
        open_regular(tmp_path / "file", 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested more than 16 deep"),
        ("[" * 18 + "]" * 18, "nested more than 16 deep"),
        ('{"a": NaN}', "infinite, none, or gigantic"),
        ('{"a": [-Infinity]}', "infinite, none, or gigantic"),
        ('{"a": 1e999}', "infinite, none, or gigantic"),
        (f'{{"a": 1{"0" * 400}}}', "infinite, none, or gigantic"),
        (f'{{"a": 1{"0" * 5_000}}}', "integer string conversion"),
        ('{"a": 1, "a": 2}', "a name stands twice"),
        ("{", "Expecting property name"),
        ("\udcff", "utf-8"),
    ],
)
def test_json_that_is_none(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text.encode(errors="surrogateescape"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [1]\nb: *a\n", "it has an alias"),
        ("a: &a [*a]\n", "it has an alias"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", "it has an alias"),
        ("[" * 10_000, "nested more than 16 deep"),
        ("a: .nan", "infinite, none, or gigantic"),
        ("a: .inf", "infinite, none, or gigantic"),
        ("a: 1" + "0" * 400, "infinite, none, or gigantic"),
        ("a: !!set {x}", "it has a set"),
        ("a: 2001-01-01", "it has a date"),
        ("1: x", "a key that is no text"),
        ("a: !!int ''", "."),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("# " + "x" * 2**16, "it has more than 65,536 bytes"),
    ],
)  # fmt: skip
def test_yaml_that_stands_for_more(text, message, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises((ValueError, OSError), match=message):
        read_yaml(tmp_path / "x.yaml")


def test_what_is_well_is_read(tmp_path):
    value = {"a": [1, 2.5, None, True, "x"], "b": {"c": {}}}
    (tmp_path / "x").write_text('{"a": [1, 2.5, null, true, "x"], "b": {"c": {}}}')
    assert read_json(tmp_path / "x") == value
    assert read_yaml(tmp_path / "x") == value


def zipped(path, entries, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)


def test_weights_that_inflate_are_refused_before_they_do(tmp_path, monkeypatch):
    """A compressed archive, entries that share their bytes, and a pickle of 40 bytes that asks for 2 GB."""
    torch.save({"w": torch.zeros(2**20)}, tmp_path / "net.pt")
    with zipfile.ZipFile(tmp_path / "net.pt") as archive:
        entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    zipped(tmp_path / "small.pt", entries, compression=zipfile.ZIP_DEFLATED)
    assert (tmp_path / "small.pt").stat().st_size < 2**16
    content = bytearray((tmp_path / "net.pt").read_bytes())
    at = content.rindex(b"PK\1\2", 0, content.rindex(b"data/0"))
    content[at + 24 : at + 28] = struct.pack("<I", 2**31)  # the size of an entry that is stored as it is
    (tmp_path / "lying.pt").write_bytes(content)
    bomb = b"\x80\x02cbuiltins\nbytearray\nJ" + struct.pack("<i", 2**31 - 1) + b"\x85R."
    zipped(tmp_path / "bomb.pt", {"data.pkl": bomb, "version": "3\n", "byteorder": "little"})
    (tmp_path / "legacy.pt").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + bomb)
    os.mkfifo(tmp_path / "fifo.pt")
    assert load_tensors(tmp_path / "net.pt")["w"].shape == (2**20,)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was inflated"))
    for name, message in (
        ("small.pt", "it is compressed, as torch never does"),
        ("lying.pt", "its entries are larger than the file"),
        ("bomb.pt", "it holds a bytearray"),
        ("legacy.pt", "it holds a bytearray"),
        ("fifo.pt", "it is not a regular file"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            load_tensors(tmp_path / name)
        with pytest.raises(UsageError, match="neither safetensors nor a state dict that can be loaded safely"):
            load_pretrained(torch.nn.Linear(2, 2), "net", str(tmp_path / name))


def test_older_files_of_torch_are_loaded(tmp_path):
    stream = io.BytesIO()
    torch.save({"w": torch.arange(3)}, stream, _use_new_zipfile_serialization=False)
    (tmp_path / "old.pt").write_bytes(stream.getvalue())
    assert load_tensors(tmp_path / "old.pt")["w"].tolist() == [0, 1, 2]
