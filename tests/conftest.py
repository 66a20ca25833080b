import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from gsm_sgd.experiments import UsageError, cifar10, mnist
from gsm_sgd.selection import stored
from ranks import Ranks

# The nets here are small: one thread is as quick, and two crawl on a machine that is busy with something else.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

# A busy machine is slow now and then, which is no failure.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(scope="session")
def mnist_files():
    """MNIST's idx files, from wherever the chain finds them."""
    try:
        return mnist.find()[1]
    except UsageError as error:
        pytest.skip(f"needs MNIST: {error}")


@pytest.fixture(scope="session")
def mnist_folder(mnist_files, tmp_path_factory):
    """A folder with MNIST in torchvision's layout."""
    folder = tmp_path_factory.mktemp("data")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in mnist_files.items():
        (raw / name).write_bytes(content)
    return folder


def _data_place(*names):
    """Return `$GSM_DATA`, or the shared data beside the checkout, if it has a folder of such a name; else skip."""
    places = [Path(os.environ["GSM_DATA"])] if os.environ.get("GSM_DATA") else []
    for place in [*places, Path(__file__).parents[2] / "shared" / "data"]:
        if any((place / name).is_dir() for name in names):
            return place
    pytest.skip(f"needs {names[0]}: set GSM_DATA to a folder that has it")


@pytest.fixture(scope="session")
def cifar10_splits():
    """The real CIFAR-10; nothing is downloaded for a test."""
    return cifar10.find(_data_place("cifar10", "CIFAR10", "cifar-10-batches-py"))[1]


@pytest.fixture(scope="session")
def public_nets():
    """A folder with the trained nets of github.com/akamaster/pytorch_resnet_cifar10."""
    return _data_place("akamaster") / "akamaster"


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """A machine with neither network, nor cache, nor a package index."""

    def refuse(*_args, **_options):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("GSM_DATA", raising=False)
    cache = tmp_path / "cache"
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: Path(cache) / name)
    return cache


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """A function that returns so many processes of one group, started when first asked for."""
    started = {}

    def of(size):
        if size not in started or started[size].closed:
            started[size] = Ranks(size, tmp_path_factory.mktemp("ranks"))
        return started[size]

    yield of
    for group in started.values():
        group.close()


@pytest.fixture
def samples(monkeypatch):
    """The samples that searches for a threshold guess from, in a list that grows as they are taken."""
    taken, guess = [], stored.guess_bracket

    def recorded(sample, *args):
        taken.append(sample)
        return guess(sample, *args)

    monkeypatch.setattr(stored, "guess_bracket", recorded)
    return taken


@pytest.fixture
def by_torch(monkeypatch):
    """Steps in torch's operations, as where step.c cannot be built."""
    monkeypatch.setattr("gsm_sgd.native.library.load_step", lambda: None)


@pytest.fixture(params=["native", "torch"])
def way(request):
    """Steps in C where they can be, and all steps in torch's operations."""
    if request.param == "torch":
        request.getfixturevalue("by_torch")
