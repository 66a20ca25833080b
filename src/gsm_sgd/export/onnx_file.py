"""A net as ONNX, which is given away only if onnxruntime computes from it what torch computes from the net."""

from typing import NamedTuple

import torch
from torch import nn

from ..experiments import UsageError
from .extras import needed

_IMAGES = 16  # for the comparison
_TOLERANCE = 1e-4  # of the largest logit, or of 1 if that is more


class OnnxFile(NamedTuple):
    """The content of a file, and by how much onnxruntime's logits of so many random images differ from torch's."""

    content: bytes
    difference: float
    images: int


def to_onnx(model: nn.Module, shape: tuple[int, ...]) -> OnnxFile:
    """Return a net as ONNX, for batches of any size: input `images`, output `logits`.

    Args:
        model: a classifier.
        shape: (channels, height, width) of an image.

    Raises:
        UsageError: a package is missing, or the net cannot be exported.
        RuntimeError: onnxruntime computes something else from it.
    """
    onnxruntime = needed("onnxruntime", "ONNX")
    for module in ("onnx", "onnxscript"):
        needed(module, "ONNX")
    model = model.cpu().eval()
    images = torch.randn(_IMAGES, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
        try:
            program = torch.onnx.export(
                model, (images,), dynamo=True, verbose=False, input_names=["images"], output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
        except Exception as error:  # a net of anybody's can fail in any way
            raise UsageError(f"torch.onnx cannot export {type(model).__name__}: {error}") from error
    assert program is not None
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    difference = float((torch.from_numpy(logits) - expected).abs().max())
    bound = _TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= bound:  # nor if it is not a number
        raise RuntimeError(f"onnxruntime's logits differ from torch's by {difference:.2g}, more than {bound:.2g}")
    return OnnxFile(content, difference, _IMAGES)
