import copy
import json

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from gsm_sgd import cli, magnitude_masks, prunable_parameters
from gsm_sgd.experiments import models
from gsm_sgd.export import csr, inference, sparse_linear
from gsm_sgd.export.csr import CsrLinear
from test_cli import SHORT, fails

pytestmark = pytest.mark.slow


def pruned(model, compression):
    weights = prunable_parameters(model)
    magnitude_masks(weights, compression=compression).apply_(weights)
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
    assert [type(getattr(model, name)) for name in ("fc1", "fc2", "fc3")] == [CsrLinear, CsrLinear, nn.Linear]
    torch.testing.assert_close(model(images).detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def always(monkeypatch):
    """As on a machine where sparse layers are always faster."""
    monkeypatch.setattr(csr, "seconds_of", lambda functions, inputs: [2.0, 1.0])


def swapped(model):
    return [name for name, module in model.named_modules() if isinstance(module, CsrLinear)]


def check_same(model, inputs, call=lambda model, inputs: model(inputs), names=None):
    """The net with sparse layers gives the dense one's outputs, twice; and is sparse in the layers named."""
    model = model.eval()
    sparse = sparse_linear(copy.deepcopy(model))
    if names is not None:
        assert swapped(sparse) == names
    for _ in range(2):
        expected = call(model, inputs).detach()
        found = call(sparse, inputs).detach()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()) + 1e-30)
    return sparse


class Reading(nn.Module):
    """A net that does something with the weight of its layer."""

    def __init__(self, forward):
        super().__init__()
        self.f, self.read = pruned(nn.Linear(20, 20), 10), forward

    def forward(self, inputs):
        return self.read(self.f, inputs)


def with_normalized_weight(layer, inputs):
    layer.weight.data = layer.weight / layer.weight.norm()
    return layer(inputs)


@torch.no_grad()
def with_halved_weight(layer, inputs):
    layer.weight.mul_(0.5)
    layer.bias.mul_(0.5)
    return layer(inputs)


READERS = {
    "weight": lambda layer, inputs: F.linear(inputs, layer.weight),
    "weight and bias": lambda layer, inputs: F.linear(inputs, layer.weight, layer.bias),
    "transposed": lambda layer, inputs: F.linear(layer(inputs), layer.weight.t()),
    "type and device": lambda layer, inputs: layer(inputs.to(layer.weight.device, layer.weight.dtype)),
    "sizes": lambda layer, inputs: layer(inputs) / layer.in_features / layer.out_features,
    "first parameter": lambda layer, inputs: layer(inputs.to(next(layer.parameters()).dtype)),
    "normalized": with_normalized_weight,
    "halved": with_halved_weight,
}


@pytest.mark.parametrize("forward", READERS.values(), ids=READERS)
def test_a_net_may_read_and_change_the_weight_of_a_sparse_layer(forward, always):
    check_same(Reading(forward), torch.randn(3, 20), names=["f"])


def test_a_weight_read_in_inference_mode_serves_training_of_what_is_before_it(always):
    layer = sparse_linear(nn.Sequential(pruned(nn.Linear(4, 4), 2)))[0]
    with torch.inference_mode():
        assert layer.weight.shape == (4, 4)
    inputs = torch.randn(2, 4, requires_grad=True)
    layer(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad[0], layer.weight.sum(0))


def test_autocast_computes_as_in_the_dense_layer(always):
    model = nn.Sequential(pruned(nn.Linear(20, 10), 5))
    sparse = check_same(model, torch.randn(3, 20), names=["0"])
    inputs = torch.randn(3, 20)
    assert sparse.to("meta")(inputs.to("meta")).shape == (3, 10)  # which knows of no autocast
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sparse_linear(copy.deepcopy(model))(inputs), model(inputs))


class Counting:
    """A hook that counts its calls and doubles what it is given."""

    def __init__(self):
        self.calls = 0

    def __call__(self, module, inputs, outputs=None):
        self.calls += 1
        given = inputs if outputs is None else outputs
        return tuple(2 * one for one in given) if isinstance(given, tuple) else 2 * given


HOOKS = {
    "forward": lambda layer, hook: layer.register_forward_hook(hook),
    "pre": lambda layer, hook: layer.register_forward_pre_hook(hook),
    "backward": lambda layer, hook: layer.register_full_backward_hook(hook),
    "backward pre": lambda layer, hook: layer.register_full_backward_pre_hook(hook),
    "state": lambda layer, hook: layer.register_state_dict_post_hook(hook),
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_layers_with_hooks_stay_and_no_hook_is_called(register, always):
    model, hook = nn.Sequential(pruned(nn.Linear(20, 10), 5)), Counting()
    register(model[0], hook)
    sparse_linear(model)
    assert type(model[0]) is nn.Linear
    assert hook.calls == 0


def test_measuring_calls_nobody_s_hooks_and_draws_no_random_numbers(monkeypatch):
    monkeypatch.setattr(csr, "_SECONDS", 1e-5)
    model, hook = nn.Sequential(pruned(nn.Linear(20, 10), 5)), Counting()
    model.register_forward_hook(hook)
    state = torch.random.get_rng_state()
    sparse_linear(model, batch=np.int64(3))
    assert hook.calls == 0
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        assert type(sparse_linear(model)[0]) in (nn.Linear, CsrLinear)
    finally:
        handle.remove()
    assert hook.calls == 0
    assert torch.equal(torch.random.get_rng_state(), state)


class Own(nn.Linear):
    def forward(self, inputs):
        return 3 * super().forward(inputs)


def own_forward():
    layer = nn.Linear(20, 10)
    layer.forward = lambda inputs: 2 * F.linear(inputs, layer.weight)
    return layer


def with_adapter():
    layer = nn.Linear(20, 10)
    layer.adapter = nn.Linear(20, 10)
    return layer


def compiled_alone():
    layer = nn.Linear(20, 10)
    layer.compile(backend="eager")
    return layer


def with_a_fact():
    layer = nn.Linear(20, 10)
    layer.scale = 3
    return layer


LEFT_ALONE = {
    "a subclass": lambda: Own(20, 10),
    "a forward of its own": own_forward,
    "an adapter": with_adapter,
    "torch.compile of the layer": compiled_alone,
    "parametrized": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(20, 10)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(20, 10)),
    "torch.nn.utils.prune": lambda: prune.l1_unstructured(nn.Linear(20, 10), "weight", 0.9),
    "bfloat16": lambda: nn.Linear(20, 10, dtype=torch.bfloat16),
    "not a number": lambda: nn.utils.skip_init(nn.Linear, 20, 10, device="cpu").apply(
        lambda layer: nn.init.constant_(layer.weight, torch.nan)
    ),
    "meta": lambda: nn.Linear(20, 10, device="meta"),
    "lazy": lambda: nn.LazyLinear(10),
    "nothing": lambda: nn.Linear(20, 0),
}


@pytest.mark.filterwarnings("ignore:.*zero-element tensors")
@pytest.mark.parametrize("make", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_layers_that_are_more_than_linear_stay(make, always):
    model = nn.ModuleList([make()])
    before = type(model[0])
    assert type(sparse_linear(model)[0]) is before


def test_facts_that_others_left_on_a_layer_stay(always):
    model = Reading(lambda layer, inputs: layer.scale * layer(inputs))
    model.f = pruned(with_a_fact(), 5)
    check_same(model.eval(), torch.randn(3, 20), names=["f"])
    model.f.value = 3.0  # this name a sparse layer needs for itself
    check_same(model, torch.randn(3, 20), names=[])


def test_layers_whose_weight_is_elsewhere_too_stay(always):
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 6), "d": nn.Linear(6, 6)})
    model["b"].weight = model["a"].weight
    model.register_buffer("view", model["c"].weight.detach()[:2])
    assert swapped(sparse_linear(model)) == ["d"]


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="batch must be at least 1, not 0"):
        sparse_linear(nn.Sequential(nn.Linear(2, 2)), batch=0)


def test_a_layer_that_sparse_sums_would_change_stays(always, monkeypatch):
    monkeypatch.setattr(CsrLinear, "forward", lambda self, inputs: F.linear(inputs, self.weight, self.bias) * 1.0001)
    assert swapped(sparse_linear(nn.Sequential(nn.Linear(20, 10)))) == []


class Tokens(nn.Module):
    """nn.Transformer and nn.MultiheadAttention, which read the weights of their layers on a path of their own."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, batch_first=True), 1)
        self.head = nn.Linear(16, 5)

    def forward(self, inputs):
        memory = self.encoder(self.attention(inputs, inputs, inputs)[0] + inputs)
        return self.head(self.decoder(inputs, memory))


@torch.no_grad()
def test_transformers_keep_their_outputs(always):
    check_same(pruned(Tokens(), 4), torch.randn(2, 5, 16), names=["head"])
    torch.manual_seed(0)
    swin = torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=5)
    sparse = check_same(pruned(swin, 20), torch.randn(1, 3, 16, 16))
    assert "features.1.0.attn.qkv" in swapped(sparse)
    vit = torchvision.models.VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=5)
    nn.init.normal_(vit.heads.head.weight)
    assert "heads.head" in swapped(check_same(pruned(vit, 4), torch.randn(1, 3, 16, 16)))


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
    with pytest.raises(RuntimeError, match=r"the logits of torch, .* in CSR differ from dense ones by 0\.001"):
        inference._by_turns(engines, torch.rand(2, 3), 1)


def test_bad_usage(capsys, tmp_path):
    assert fails(capsys, "bench", "inference") == (
        "name the folders of the runs to measure: gsm bench inference RUN..."
    )
    assert "choose one of step, inference" in fails(capsys, "bench", "nothing")
    assert "is not a run's folder" in fails(capsys, "bench", "inference", tmp_path)
