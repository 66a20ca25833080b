"""Whether a sparse file's certificate is true."""

from pathlib import Path

from ..budget import kept_weights
from ..experiments import UsageError
from ..experiments.loop import evaluate
from ..names import prunable_parameters
from .rebuild import build, load_data, recipe_of
from .sparse import SparseFile, certify, read_sparse

_SAME = 0.05  # points of accuracy that a machine's arithmetic may turn


class CertificateError(Exception):
    """A certificate does not tell the truth."""


def verify(path: Path) -> SparseFile:
    """Return a sparse file after computing N, Q, what each layer keeps, and the hash, from its tensors.

    Raises:
        UsageError: the file is missing or damaged.
        CertificateError: the certificate says something else.
    """
    file = read_sparse(path)
    stated = file.certificate
    true = certify(file.tensors, file.prunable)
    for title, said, found in (
        ("prunable weights", stated.prunable, true.prunable),
        ("nonzeros", stated.nonzeros, true.nonzeros),
        ("nonzeros by layer", stated.kept, true.kept),
        ("sha256 of the weights", stated.sha256, true.sha256),
    ):
        if said != found:
            raise CertificateError(f"{path} states {title} {said}, but has {found}")
    return file


def verify_accuracy(path: Path, file: SparseFile, data_dir: Path | None, allowed: str | None) -> str:
    """Measure the accuracy again and hold the certificate against the net, and say what was found.

    Args:
        path: the file, for messages.
        file: its content.
        data_dir: folder of the data; default $GSM_DATA.
        allowed: as of `recipe_of`.

    Raises:
        UsageError: the file states no accuracy or recipe, or the data cannot be had.
        CertificateError: it states another accuracy, by more than arithmetic may differ between machines, is not of all
            layers that are prunable in the net, or does not have the recipe's compression ratio.
    """
    stated = file.certificate.top1
    if stated is None or file.recipe is None:
        raise UsageError(f"{path} states no accuracy: do without --accuracy")
    recipe = recipe_of(file.recipe, path, allowed)
    dataset = load_data(recipe, data_dir)
    model = build(recipe, file.tensors, dataset.classes)
    prunable = prunable_parameters(model)
    if set(prunable) != set(file.prunable):
        other = sorted(set(prunable) ^ set(file.prunable))[0]
        raise CertificateError(f"{path} certifies other layers than those that are prunable in {recipe.model}: {other}")
    if file.certificate.nonzeros > kept_weights(file.certificate.prunable, recipe.compression):
        raise CertificateError(f"{path} states a compression ratio of {recipe.compression:g}, but keeps more weights")
    found = evaluate(model, dataset.test)
    if not abs(found - stated) <= _SAME:
        raise CertificateError(f"{path} states an accuracy of {stated:.2f} %, but has {found:.2f} %")
    images = f"{recipe.holdout:,} held-out training images" if recipe.holdout else "the test set"
    return f"{found:.2f} % on {images} of {recipe.dataset}"
