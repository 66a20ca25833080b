import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gsm_sgd import cli
from gsm_sgd.experiments import models
from gsm_sgd.export import csr, inference, sparse_linear
from gsm_sgd.export.csr import CsrLinear
from gsm_sgd.masks import apply_masks_, magnitude_masks, prunable_parameters
from test_cli import SHORT, fails


def pruned(model, compression):
    weights = prunable_parameters(model)
    apply_masks_(weights, magnitude_masks(weights, compression))
    return model


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    density=st.sampled_from([0.0, 0.03, 0.5, 1.0]),
    batch=st.sampled_from([(), (1,), (7,), (3, 2)]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_sparse_layer_computes_what_the_dense_one_does(shape, density, batch, bias, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(*shape, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) < density)
    sparse = CsrLinear(layer)
    inputs = torch.randn(*batch, shape[0], dtype=dtype)
    for given_inputs in (inputs, inputs.mT.contiguous().mT if inputs.ndim > 1 else inputs):  # features first in memory
        outputs = sparse(given_inputs)
        assert outputs.shape == layer(inputs).shape
        torch.testing.assert_close(outputs, layer(inputs).detach(), rtol=1e-5, atol=1e-5)
    assert len(sparse.value) == int(layer.weight.count_nonzero())


def test_a_sparse_layer_is_saved_loaded_and_copied():
    layer = pruned(nn.Linear(20, 10), 5)
    inputs = torch.randn(4, 20)
    sparse = copy.deepcopy(CsrLinear(layer))
    again = CsrLinear(layer)
    again.load_state_dict(sparse.state_dict())
    assert torch.equal(again(inputs), CsrLinear(layer)(inputs))
    assert "20, 10, 40 of 200 weights" in str(sparse)


def test_half_precision_is_refused():
    with pytest.raises(ValueError, match=r"float32 or float64 weights, not torch\.bfloat16"):
        CsrLinear(nn.Linear(3, 3, dtype=torch.bfloat16))


def test_sparse_linear_swaps_what_is_faster(monkeypatch):
    """Told that sparse layers are faster the wider they are."""
    monkeypatch.setattr(csr, "seconds_of", lambda functions, inputs: [2.0, 200 / inputs.shape[1]])
    model = pruned(models.build("lenet300", 0), 60)
    images = torch.randn(5, 1, 28, 28)
    expected = model(images).detach()
    assert sparse_linear(model, batch=5) is model
    assert [type(layer) for layer in model.children()] == [CsrLinear, CsrLinear, nn.Linear]
    torch.testing.assert_close(model(images).detach(), expected, rtol=1e-5, atol=1e-5)


def test_a_dense_layer_of_many_weights_is_left_alone():
    """A product of dense matrices is far quicker than one with as many weights in sparse rows."""
    model = nn.Sequential(nn.Linear(500, 500))
    assert type(sparse_linear(model, batch=64)[0]) is nn.Linear


def test_bench_inference(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(csr, "_SECONDS", 1e-4)
    out = tmp_path / "runs"
    assert cli.run(["prune", "lenet300", *SHORT, "--out", str(out)]) == 0
    (run,) = out.iterdir()
    capsys.readouterr()
    assert cli.run(["bench", "inference", str(run)]) == 0
    said, told = capsys.readouterr()
    assert told.startswith(f"{run}: 6 measurements\n")
    rows = json.loads((run / "inference.json").read_text())["rows"]
    assert {(row["engine"], row["batch"], row["threads"]) for row in rows} == {
        (engine, batch, threads)
        for engine in (inference.DENSE, inference.SPARSE, inference.ONNX)
        for batch in (1, 16, 256)
        for threads in (1, 2)
    }
    for row in rows:
        assert row["milliseconds"] > 0
        if row["engine"] == inference.DENSE:
            assert row["ratio"] == 1
            assert row["ratio_spread"] == 0
        assert f"{row['milliseconds']:.3g} ± {row['milliseconds_spread']:.0%}" in said
        assert f"{row['ratio']:.2f} ± {row['ratio_spread']:.0%}" in said
    assert "Linear layers in CSR are " in said
    assert cli.run(["report", str(run), "-o", str(tmp_path / "report.html")]) == 0
    assert inference.SPARSE in (tmp_path / "report.html").read_text()


def test_an_engine_that_computes_something_else_is_refused():
    engines = {inference.DENSE: nn.Identity(), inference.SPARSE: lambda images: images + 1e-3}
    with pytest.raises(RuntimeError, match=r"sparse layers' logits differ from dense ones' by 0\.001"):
        inference._by_turns(engines, torch.rand(2, 3), 1)


def test_bad_usage(capsys, tmp_path):
    assert fails(capsys, "bench", "inference") == (
        "name the folders of the runs to measure: gsm bench inference RUN..."
    )
    assert "choose one of step, inference" in fails(capsys, "bench", "nothing")
    assert "is not a run's folder" in fails(capsys, "bench", "inference", tmp_path)
