import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from gsm_sgd.experiments import UsageError, cifar10, data

COUNTS = {"train": 50_000, "test": 10_000}


def png(pixels, kind="png"):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return {"bytes": stream.getvalue(), "path": None}


def write(folder, split, images, labels):
    table = pa.Table.from_pylist([{"img": img, "label": label} for img, label in zip(images, labels, strict=True)])
    pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


def test_cifar10_is_the_real_one(cifar10_splits, monkeypatch):
    monkeypatch.setattr(cifar10, "find", lambda _: (None, cifar10_splits))
    dataset = cifar10.load()
    assert dataset.train.images.shape == (50_000, 32, 32, 3)
    assert dataset.test.images.shape == (10_000, 32, 32, 3)
    assert dataset.train.labels.bincount().tolist() == [5_000] * 10
    assert dataset.test.labels.bincount().tolist() == [1_000] * 10
    stds = [dataset.train.images[..., channel].float().div(255).std().item() for channel in range(3)]
    assert [round(std, 4) for std in stds] == [0.2470, 0.2435, 0.2616]
    images, _ = next(dataset.test.batches(1_000))
    assert images.shape == (1_000, 3, 32, 32)
    assert (images.min(), images.max()) == (-1, 1)
    assert (dataset.train.margin, dataset.test.margin) == (4, 0)
    test = data.load("cifar10", None, "imagenet").test
    theirs = functional.normalize((images[:9] + 1) / 2, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(next(test.batches(9))[0], theirs)


def test_other_images_are_refused(tmp_path, no_network, monkeypatch):
    """Counts and classes are right, the colour is not."""
    monkeypatch.setattr(cifar10, "_COUNTS", {"train": 50, "test": 10})
    image = png(np.full((32, 32, 3), 125, np.uint8))
    for split, count in (("train", 50), ("test", 10)):
        write(tmp_path, split, [image] * count, [label % 10 for label in range(count)])
    with pytest.raises(UsageError, match="damaged or not CIFAR-10's: move it away and run `gsm data cifar10`"):
        cifar10.load(tmp_path)


@pytest.mark.parametrize(
    "image",
    [
        png(np.zeros((33, 32, 3), np.uint8)),
        png(np.zeros((32, 32), np.uint8)),
        png(np.zeros((32, 32, 3), np.uint8), "bmp"),
        {"bytes": b"noise", "path": None},
        {"bytes": None, "path": "img.png"},
    ],
    ids=["size", "mode", "format", "noise", "nothing"],
)
def test_files_with_other_things_in_them_are_refused(image, tmp_path, no_network):
    for split in COUNTS:
        write(tmp_path, split, [image], [0])
    with pytest.raises(UsageError, match=r"train-00000-of-00001\.parquet is damaged or not CIFAR-10's"):
        cifar10.load(tmp_path)


def test_too_many_rows_are_refused_before_anything_is_read(tmp_path, no_network, monkeypatch):
    monkeypatch.setattr(cifar10, "_COUNTS", {"train": 3, "test": 3})
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_args, **_options: pytest.fail("read"))
    for split in COUNTS:
        write(tmp_path, split, [png(np.zeros((32, 32, 3), np.uint8))] * 4, [0] * 4)
    with pytest.raises(UsageError, match="damaged"):
        cifar10.load(tmp_path)


def test_a_damaged_folder_of_torchvisions_is_named_and_not_unpickled(tmp_path, no_network):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(UsageError, match="cifar-10-batches-py is damaged"):
        cifar10.load(tmp_path)


def test_a_download_is_there_as_a_whole_or_not_at_all(tmp_path, no_network, monkeypatch):
    fetched = []

    def broken(folder, **_):
        fetched.append(Path(folder) / "cifar-10-batches-py")
        fetched[-1].mkdir()
        raise OSError("no space left")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", broken)
    with pytest.raises(UsageError, match=r"cannot be downloaded.*The cause: no space left"):
        cifar10.load(tmp_path)
    assert fetched[0].parent.parent == tmp_path
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_another_data_sets_parquet_is_not_taken(tmp_path, no_network):
    for split in COUNTS:
        pq.write_table(pa.table({"image": [1], "label": [1]}), tmp_path / f"{split}-00000-of-00001.parquet")
    with pytest.raises(UsageError, match="CIFAR-10 is not on this machine and cannot be downloaded"):
        cifar10.load(tmp_path)
