import gzip
import http.client
import io
import pickle
import shutil
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from gsm_sgd.experiments import UsageError, data


def test_mnist_is_the_real_one(mnist_folder):
    mnist = data.mnist(mnist_folder)
    assert mnist.train.images.shape == (60_000, 1, 28, 28)
    assert mnist.test.images.shape == (10_000, 1, 28, 28)
    assert mnist.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert mnist.train.labels.bincount().tolist() == [
        5923,
        6742,
        5958,
        6131,
        5842,
        5421,
        5918,
        6265,
        5851,
        5949,
    ]
    assert mnist.train.images.mean().item() == pytest.approx(0, abs=1e-3)
    assert mnist.train.images.std().item() == pytest.approx(1, abs=1e-3)


def test_gzipped_files_in_a_flat_folder(mnist_files, tmp_path, no_network):
    for name, content in mnist_files.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content, 1))
    assert data.mnist_files(tmp_path) == mnist_files


def test_gsm_data_is_looked_in(mnist_files, mnist_folder, monkeypatch, no_network):
    monkeypatch.setenv("GSM_DATA", str(mnist_folder))
    assert data.mnist_files() == mnist_files


def test_parquet(mnist_files, tmp_path, no_network):
    """Hugging Face's layout, made from the real pixels as PNG, in two shards."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(prefix, split, shards):
        pixels = np.frombuffer(mnist_files[f"{prefix}-images-idx3-ubyte"], np.uint8, offset=16).reshape(-1, 28, 28)
        labels = np.frombuffer(mnist_files[f"{prefix}-labels-idx1-ubyte"], np.uint8, offset=8)
        for shard, part in enumerate(np.array_split(np.arange(len(labels)), shards)):
            rows = []
            for index in part:
                stream = io.BytesIO()
                Image.fromarray(pixels[index]).save(stream, "png", compress_level=1)
                rows.append({"image": {"bytes": stream.getvalue(), "path": None}, "label": int(labels[index])})
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}-{shard:05d}-of-{shards:05d}.parquet")

    write("train", "train", 2)
    write("t10k", "test", 1)
    assert data.mnist_files(tmp_path) == mnist_files

    test = tmp_path / "test-00000-of-00001.parquet"
    test.write_bytes(test.read_bytes()[:100_000])
    with pytest.raises(UsageError, match=r"test-00000-of-00001\.parquet is damaged"):
        data.mnist_files(tmp_path)


def test_another_data_sets_parquet_is_named(tmp_path, no_network):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "train-00000-of-00001.parquet"
    stream = io.BytesIO()
    Image.new("L", (5_000, 5_000)).save(stream, "png")
    good = {"bytes": stream.getvalue(), "path": None}
    for image, label in ((good, 1), ({"path": "x"}, 1), ({"bytes": b"", "path": None}, 1), (None, 1), (good, None)):
        pq.write_table(pa.Table.from_pylist([{"image": image, "label": label}]), path)
        with pytest.raises(UsageError, match=r"train-00000-of-00001\.parquet is damaged or not MNIST's"):
            data.mnist_files(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "altered", "longer", "bad_gzip", "truncated_gzip"])
def test_damaged_file_is_named(mnist_folder, tmp_path, damage, no_network):
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(mnist_folder / "MNIST" / "raw", raw)
    path = raw / "t10k-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[-1]
    elif damage == "longer":
        content += b"\0"
    elif damage == "altered":
        content[5_000] ^= 1
    else:
        path.unlink()
        path = path.with_name(f"{path.name}.gz")
        content = b"not gzip" if damage == "bad_gzip" else gzip.compress(content, 1)[:-500]
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        data.mnist_files(tmp_path)
    assert f"{path} is damaged" in str(error.value)


def test_neither_network_nor_data(no_network):
    with pytest.raises(UsageError, match="Three ways to get it"):
        data.mnist_files()
    assert not no_network.exists()


def test_folder_that_does_not_exist(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="does not exist: make it, or do without --data-dir"):
        data.mnist_files(tmp_path / "nope")
    monkeypatch.setenv("GSM_DATA", str(tmp_path / "typo"))
    with pytest.raises(UsageError, match="does not exist: make it, or do without GSM_DATA"):
        data.mnist_files()


class _Response(io.BytesIO):
    headers: ClassVar[dict[str, str]] = {}


def test_download_from_a_mirror(mnist_files, tmp_path, no_network, monkeypatch):
    """The first mirror is down, the second serves one file damaged: what is fetched is whole or not there."""
    damaged = {"train-labels-idx1-ubyte"}

    def serve(url, timeout):
        mirror, _, name = url.rpartition("/")
        if "one" in mirror:
            raise http.client.IncompleteRead(b"")
        content = mnist_files[name.removesuffix(".gz")]
        return _Response(gzip.compress(content, 1)[: 100 if name.removesuffix(".gz") in damaged else None])

    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["https://one/", "https://two/"])
    monkeypatch.setattr("urllib.request.urlopen", serve)
    with pytest.raises(UsageError, match="Three ways"):
        data.mnist_files(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    assert [path.name for path in raw.iterdir()] == ["train-images-idx3-ubyte"]
    damaged.clear()
    assert data.mnist_files(tmp_path) == mnist_files
    assert sorted(path.name for path in raw.iterdir()) == sorted(mnist_files)


def test_unpickler_builds_arrays_and_nothing_else():
    arrays = np.arange(6, dtype="<f4").reshape(2, 3), np.arange(3)
    content = pickle.dumps(arrays, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    loaded = data._ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    assert all(np.array_equal(a, b) for a, b in zip(arrays, loaded, strict=True))
    with pytest.raises(pickle.UnpicklingError, match="not allowed in a data file"):
        data._ArrayUnpickler(io.BytesIO(pickle.dumps(print))).load()


def test_hold_out_divides_the_training_set():
    whole = data.synthetic(100, 10)
    held = whole.hold_out(30)
    assert (len(held.train), len(held.test)) == (70, 30)
    images = torch.cat([held.train.images, held.test.images]).flatten(1)
    assert torch.equal(images.sort(0).values, whole.train.images.flatten(1).sort(0).values)
    for count in (0, 100):
        with pytest.raises(UsageError, match="holdout must be above 0 and below 100"):
            whole.hold_out(count)


def test_batches_cover_an_order_from_any_batch_on():
    split = data.synthetic(10, 1).train
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    labels = [labels for _, labels in split.batches(4, order)]
    assert list(map(len, labels)) == [4, 4, 2]
    assert torch.equal(torch.cat(labels), split.labels[order])
    assert torch.equal(torch.cat([labels for _, labels in split.batches(4, order, 1)]), split.labels[order[4:]])


def test_unknown_dataset():
    with pytest.raises(UsageError, match="unknown dataset 'nope'"):
        data.load("nope")
