import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from gsm_sgd.experiments import UsageError, image_folder
from gsm_sgd.experiments.image_folder import Folder
from gsm_sgd.experiments.recipes import find_recipe
from gsm_sgd.experiments.rundir import RunFolder


@pytest.fixture(autouse=True)
def few_workers(monkeypatch):
    monkeypatch.setattr(image_folder, "_WORKERS", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of two classes and several sizes: a dark class and a bright one, with noise."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for label, (name, level) in enumerate((("bright", 200), ("dark", 30))):
            (root / split / name).mkdir(parents=True)
            for number in range(count + label):
                size = (40 + 3 * number, 50 + 5 * number, 3)
                pixels = random.integers(level - 20, level + 20, size).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root


def small(split):
    return Folder(split.samples, split.training, size=32)


def test_folders_become_classes(folder):
    dataset = image_folder.load(folder)
    assert (len(dataset.train), len(dataset.test), dataset.classes) == (13, 7, 2)
    (images, labels), *rest = small(dataset.test).batches(5)
    assert images.shape == (5, 3, 32, 32)
    assert labels.tolist() == [0, 0, 0, 1, 1]
    assert [len(labels) for _, labels in rest] == [2]
    means = images.mean((1, 2, 3))
    assert means[:3].min() > 1 > -1 > means[3:].max()  # normalised: bright is above zero, dark below


def test_an_epoch_is_a_function_of_seed_and_epoch_and_goes_on_anywhere(folder, monkeypatch):
    train = small(image_folder.load(folder).train)
    state = torch.random.get_rng_state()
    whole = list(train.shuffled(4, 5, 2))
    assert [len(labels) for _, labels in whole] == [4, 4, 4, 1]
    assert torch.cat([labels for _, labels in whole]).bincount().tolist() == [6, 7]
    monkeypatch.setattr(image_folder, "_WORKERS", 0)  # nor does it matter who decodes
    for ours, theirs in zip(train.shuffled(4, 5, 2, first=1), whole[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    other = next(iter(train.shuffled(4, 5, 3)))
    assert not torch.equal(other[0], whole[0][0])
    list(train.batches(13))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_held_out_images_are_not_cut_at_random(folder):
    held = image_folder.load(folder).hold_out(4)
    assert (len(held.train), len(held.test)) == (9, 4)
    (first, _), (second, _) = (next(iter(small(held.test).batches(4))) for _ in range(2))
    assert torch.equal(first, second)


def test_bad_folders(folder, tmp_path, no_network):
    with pytest.raises(UsageError, match="ImageNet has to be there already: pass --data-dir FOLDER"):
        image_folder.load(tmp_path)
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(UsageError, match="does not have images in folders by class"):
        image_folder.load(tmp_path)
    for name in ("train/cat", "val/dog"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name / "0.png")
    with pytest.raises(UsageError, match="differ in their folders"):
        image_folder.load(tmp_path)


def test_images_stand_in_torchvisions_order(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for place in ("train", "val"):
        for name in ("b", "a", "A/deep"):
            shutil.copytree(folder / "val" / "dark", tmp_path / place / "dark" / name)
    dataset = image_folder.load(tmp_path)
    assert dataset.train.samples == ImageFolder(tmp_path / "train").samples
    assert dataset.test.samples == ImageFolder(tmp_path / "val").samples


def test_what_is_no_file_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "val" / "dark" / "0.png").unlink()
    os.mkfifo(tmp_path / "val" / "dark" / "0.png")
    with pytest.raises(UsageError, match=r"0\.png is damaged, no image, or far too slim"):
        list(small(image_folder.load(tmp_path).test).batches(5))
    (tmp_path / "val" / "dark" / "0.png").unlink()
    (tmp_path / "val" / "dark" / "0.png").symlink_to("nowhere")
    with pytest.raises(UsageError, match=r"does not have images in folders by class: .*0\.png"):
        image_folder.load(tmp_path)


def test_a_damaged_image_is_named(tmp_path):
    path = tmp_path / "0.jpg"
    path.write_bytes(b"noise")
    with pytest.raises(UsageError, match=r"0\.jpg is damaged, no image, or far too slim: replace it"):
        list(Folder([(str(path), 0)], training=False).batches(1))  # though a worker meets it


def test_an_image_that_would_become_huge_is_named(tmp_path):
    path = tmp_path / "0.png"
    Image.new("RGB", (60_000, 1)).save(path)  # 13 GB once its shorter side is scaled to 256
    with pytest.raises(UsageError, match=r"0\.png is damaged, no image, or far too slim"):
        list(Folder([(str(path), 0)], training=False).batches(1))


def test_workers_leave_the_terminal_alone(tmp_path, capfd):
    path = tmp_path / "0.png"
    Image.new("P", (40, 40)).save(path, transparency=b"\0" * 256)
    Image.open(path).convert("RGB")  # warns in later versions of Pillow
    list(Folder([(str(path), 0)], training=False).batches(1))
    assert capfd.readouterr().err == ""


def test_a_run_goes_on_with_the_images_that_it_began_with(folder, tmp_path):
    assert image_folder.load(folder).identity == image_folder.load(folder).hold_out(4).identity
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    assert image_folder.load(other).identity == image_folder.load(folder).identity  # wherever they are
    (other / "train" / "dark" / "9.png").write_bytes((other / "train" / "dark" / "0.png").read_bytes())
    recipe = find_recipe("resnet50")
    for _ in range(2):
        with RunFolder(tmp_path / "run", recipe) as run:
            run.check_data(image_folder.load(folder).identity)
    other_images = pytest.raises(UsageError, match="has been trained on other images than these: choose another --out")
    with RunFolder(tmp_path / "run", recipe) as run, other_images:
        run.check_data(image_folder.load(other).identity)
