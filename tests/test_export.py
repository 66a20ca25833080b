"""The sparse file: what comes back, how large it is, and what becomes of files that lie."""

import json
import lzma
import math
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save, save_file
from torch.nn.utils import prune

import reference_sparse
from gsm_sgd import magnitude_masks, prunable_parameters
from gsm_sgd.experiments import UsageError, models
from gsm_sgd.experiments.recipes import find_recipe
from gsm_sgd.export import container, largest_size, load_sparse, save_sparse
from gsm_sgd.export.files import layers_in
from gsm_sgd.export.sparse import read_sparse
from gsm_sgd.export.target import _ratio, compression_for, parse_size

quick = settings(max_examples=60, deadline=None)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(ours[name]) == bits(tensor), name


def random_bits(shape, generator):
    """Finite numbers other than zero, their exponents as random as the rest."""
    numbers = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator) | 1
    return torch.where(numbers.view(torch.float32).isfinite(), numbers, 1).view(torch.float32)


def pruned(name, compression, spread="even"):
    """The state of a net with exactly Q random weights, anywhere, in a run in each layer, or in the last one."""
    model = models.build(name, 0)
    generator = torch.Generator().manual_seed(0)
    scores = {}
    for place, (key, weight) in enumerate(prunable_parameters(model).items()):
        scores[key] = torch.rand(weight.shape, generator=generator) + place * (spread == "last layer")
        if spread == "runs":
            scores[key] = torch.arange(weight.numel()).reshape(weight.shape) / weight.numel()
    masks = magnitude_masks(scores, compression=compression)
    state = {
        key: random_bits(value.shape, generator) if value.ndim else value for key, value in model.state_dict().items()
    }
    return state | {key: torch.where(mask, state[key], 0.0) for key, mask in masks.items()}


# --- what comes back ---


@quick
@given(st.integers(0, 5_000), st.sampled_from([0.0, 0.001, 0.02, 0.12, 0.14, 0.9, 1.0]), st.integers(0, 2**32))
def test_positions_come_back(size, density, seed):
    mask = np.random.default_rng(seed).random(size) < density
    code = container.encode_positions(mask)
    assert len(code) <= container.most_position_bytes(size, mask.sum())
    assert (container.decode_positions(code, size, mask.sum()) == mask).all()


@st.composite
def tensors(draw):
    """Named tensors of any type, of random bits, some of them zero, none -0."""
    named = {}
    for name in draw(st.lists(st.text(max_size=12).filter(lambda t: t.isprintable()), unique=True, max_size=4)):
        dtype = container.DTYPES[draw(st.sampled_from(sorted(container.DTYPES)))]
        shape = draw(st.lists(st.integers(0, 12), max_size=4))
        random = np.random.default_rng(draw(st.integers(0, 2**32)))
        raw = random.integers(0, 256, (math.prod(shape), dtype.itemsize), np.uint8)
        if dtype == torch.bool:
            raw &= 1
        raw[random.random(len(raw)) >= draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))] = 0
        tensor = torch.from_numpy(raw.reshape(-1)).view(dtype).reshape(shape)
        named[name] = torch.where(tensor == 0, torch.zeros_like(tensor), tensor)  # -0 would not come back
    return named


SIGNALING_NAN = torch.tensor([[0x7C01]], dtype=torch.int16).view(torch.float16)


@quick
@given(tensors(), st.booleans())
@example({"w": SIGNALING_NAN}, False)
def test_the_same_bits_come_back_and_a_reader_written_from_the_documentation_agrees(tmp_path_factory, named, all_of_it):
    path = tmp_path_factory.mktemp("f") / "x"
    prunable = list(named) if all_of_it else None
    size = save_sparse(path, named, prunable=prunable)
    assert size == path.stat().st_size
    assert_same(load_sparse(path), named)
    assert reference_sparse.read(path.read_bytes())[0] == {name: bits(tensor) for name, tensor in named.items()}
    assert size <= largest_size(named, read_sparse(path).certificate.nonzeros, prunable=prunable)


@pytest.mark.parametrize("values", ["float32", "float16", "bfloat16"])
def test_rounded_values(tmp_path, values):
    state = {
        "w": torch.where(torch.rand(300, 400) < 0.02, torch.randn(300, 400), 0.0),
        "b": torch.randn(9),
        "half": torch.ones(2, 2).half(),
    }
    size = save_sparse(tmp_path / "x", state, values=values)
    assert size <= largest_size(state, int(state["w"].count_nonzero()) + 4, values=values)
    assert size < save_sparse(tmp_path / "y", state) - 2_000 or values == "float32"
    found = load_sparse(tmp_path / "x")
    assert_same(found, state | {"w": state["w"].to(getattr(torch, values)).float()})
    theirs, about = reference_sparse.read((tmp_path / "x").read_bytes())
    assert theirs == {name: bits(tensor) for name, tensor in found.items()}
    assert about["certificate"]["nonzeros"] == int(state["w"].count_nonzero()) + 4


def test_odd_numbers_come_back(tmp_path):
    """NaNs keep their payload; a pruned weight that is -0, as multiplying by a mask leaves it, becomes 0."""
    odd = torch.zeros(40, 40)
    odd.view(torch.int32)[3, :5] = torch.tensor([-(2**31), 0x7FC00001, 0x7F800001, -1, 1], dtype=torch.int32)
    named = {
        "w": odd,
        "s": torch.tensor(3),
        "e": torch.empty(0, 4),
        "zero": torch.zeros(9, 9),
        "b": torch.tensor([-0.0]),
    }
    save_sparse(str(tmp_path / "x"), named)
    odd[3, 0] = 0.0
    assert_same(load_sparse(str(tmp_path / "x")), named)
    assert read_sparse(tmp_path / "x").certificate.kept == (4, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prunable": ["typo"]}, "there is no tensor 'typo' to be prunable: there are w"),
        ({"recipe": {"clip": math.inf}}, "would not be readable"),
        ({"recipe": {"clip": {1, 2}}}, "would not be readable"),
        ({"top1": math.nan}, "would not be readable"),
        ({"top1": 101}, "would not be readable: its certificate is damaged"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        save_sparse(tmp_path / "x", {"w": torch.ones(4, 4)}, **options)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_file_of_many_tensors_comes_back(tmp_path):
    named = {f"model.layers.{i}.mlp.experts.{j}.up.weight": torch.ones(1, 1) for i in range(48) for j in range(256)}
    save_sparse(tmp_path / "x", named, prunable=[*named, *named])
    assert load_sparse(tmp_path / "x").keys() == named.keys()
    assert read_sparse(tmp_path / "x").certificate.prunable == len(named)


def test_the_same_tensors_make_the_same_file(tmp_path):
    """In whatever order they lie in memory, and whichever process writes it."""
    weight = torch.arange(600.0).reshape(8, 3, 5, 5)
    save_sparse(tmp_path / "a", {"w": weight.to(memory_format=torch.channels_last), "b": torch.ones(3)}, top1=50.0)
    code = "import sys, torch; from gsm_sgd.export import save_sparse; weight = torch.arange(600.).reshape(8, 3, 5, 5);"
    code += "save_sparse(sys.argv[1], {'w': weight, 'b': torch.ones(3)}, top1=50.0)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("weight", [1e-9, 1e6])
def test_rounding_does_not_lose_weights(tmp_path, weight):
    with pytest.raises(UsageError, match="a weight of w is too small or too large for float16"):
        save_sparse(tmp_path / "x", {"w": torch.full((2, 2), weight)}, values="float16")
    assert not list(tmp_path.iterdir())


class Odd(torch.nn.Linear):
    def get_extra_state(self):
        return {"version": 3}


ENTRIES = {
    "a checkpoint": (lambda: {"model": {"w": torch.ones(2)}}, "'model' is a dict of its own: .* give it alone"),
    "a number": (lambda: {"w": torch.ones(2), "epoch": 3}, "'epoch' is of type int, not a tensor: leave it out"),
    "nothing": (lambda: {"w": None}, "'w' is of type NoneType, not a tensor"),
    "text": (lambda: {"arch": "resnet"}, "'arch' is of type str, not a tensor"),
    "an array": (lambda: {"w": np.ones(2)}, "'w' is of type ndarray, not a tensor: .* make it a tensor"),
    "extra state": (lambda: Odd(2, 2).state_dict(), "'_extra_state' is a dict of its own"),
    "a number as a name": (lambda: {0: torch.ones(2)}, "an entry 0, which is not a name"),
    "a model": (lambda: torch.nn.Linear(2, 2), r"a Linear is not a net's state: give model\.state_dict\(\)"),
    "rows": (lambda: {"w": torch.eye(2).to_sparse_csr()}, r"'w' is of layout torch\.sparse_csr, .* its to_dense\(\)"),
    "coordinates": (lambda: {"w": torch.eye(2).to_sparse()}, r"'w' is of layout torch\.sparse_coo"),
    "nested": (lambda: {"w": torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)}, "'w' is nested"),
    "meta": (lambda: {"w": torch.ones(2, device="meta")}, "'w' is on the device meta, without numbers"),
    "lazy": (lambda: torch.nn.LazyLinear(2).state_dict(), "'weight' is not initialized yet: call the net once"),
    "float8": (lambda: {"w": torch.eye(2).to(torch.float8_e4m3fn)}, r"w is torch\.float8_e4m3fn, .*: convert it"),
    "uint16": (lambda: {"w": torch.ones(2, 2, dtype=torch.uint16)}, r"w is torch\.uint16, .* or leave it out"),
    "complex": (lambda: {"w": torch.ones(2, dtype=torch.complex64)}, r"w is torch\.complex64"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*beta state", "ignore:.*prototype")
@pytest.mark.parametrize("kind", ENTRIES)
def test_a_state_of_more_than_tensors_is_refused_by_name(tmp_path, kind):
    state, message = ENTRIES[kind]
    with pytest.raises(UsageError, match=message) as caught:
        save_sparse(tmp_path / "new folder" / "x", state())
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_quantized_tensors_are_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match=r"'w' is quantized: give its dequantize\(\)"):
        save_sparse(tmp_path / "x", {"w": torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.qint8)})


def test_tensors_that_share_memory_come_back(tmp_path):
    base = torch.randn(6, 6)
    state = {"a": base, "b": base.t(), "c": base[::2, 1:], "d": base[:1].expand(6, 6), "e": base.view(-1)[3:9]}
    state["f"] = torch.randn(3, 3, dtype=torch.complex64).conj().imag  # a view that negates
    save_sparse(tmp_path / "x", state)
    assert_same(load_sparse(tmp_path / "x"), {name: tensor.resolve_neg() for name, tensor in state.items()})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: torch.compile(net, backend="eager"),
        torch.nn.DataParallel,
        lambda net: torch.nn.DataParallel(torch.compile(net, backend="eager")),
    ],
)
def test_a_file_of_a_wrapped_net_is_the_bare_net_s(tmp_path, wrap):
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    wrapped = wrap(net).state_dict()
    assert wrapped.keys().isdisjoint(net.state_dict())
    save_sparse(tmp_path / "bare", net.state_dict(), prunable=["1.weight"])
    for prunable in (["1.weight"], [name for name in wrapped if name.endswith("1.weight")]):
        save_sparse(tmp_path / "wrapped", wrapped, prunable=prunable)
        assert (tmp_path / "wrapped").read_bytes() == (tmp_path / "bare").read_bytes()
        assert largest_size(wrapped, 9, prunable=prunable) == largest_size(net.state_dict(), 9, prunable=["1.weight"])
    net.load_state_dict(load_sparse(tmp_path / "wrapped"))


def test_a_module_that_is_named_module_stays_in_a_file(tmp_path):
    average = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(4, 4))
    save_sparse(tmp_path / "x", average.state_dict())
    average.load_state_dict(load_sparse(tmp_path / "x"))


def test_what_torch_prunes_is_stored_as_its_mask_leaves_it(tmp_path):
    layer = torch.nn.Linear(20, 16)
    prune.l1_unstructured(layer, "weight", amount=0.9)
    prune.random_unstructured(layer, "bias", amount=4)
    masked, nonzeros = layer.state_dict(), int(layer.weight.count_nonzero())
    save_sparse(tmp_path / "x", masked)
    certificate = read_sparse(tmp_path / "x").certificate
    assert (certificate.prunable, certificate.nonzeros, nonzeros) == (320, 32, 32)
    assert [(row.name, row.nonzeros) for row in layers_in(tmp_path / "x")] == [("weight", 32)]
    save_file(masked, tmp_path / "dense.safetensors")
    assert [(row.name, row.nonzeros) for row in layers_in(tmp_path / "dense.safetensors")] == [("weight", 32)]
    prune.remove(layer, "weight")
    prune.remove(layer, "bias")
    found = load_sparse(tmp_path / "x")
    assert found.keys() == layer.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in layer.state_dict().items())


def test_numbers_may_be_numpy(tmp_path):
    state = {"w": torch.eye(4)}
    plain = {"clip": 0.5, "epochs": 3, "flag": True}
    boxed = {"clip": np.float32(0.5), "epochs": np.int64(3), "flag": np.bool_(True)}
    save_sparse(tmp_path / "a", state, recipe=plain, top1=98.5)
    save_sparse(tmp_path / "b", state, recipe=boxed, top1=np.float32(98.5))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_sparse(tmp_path / "b", np.int64(10**6)).recipe == plain
    for count in (np.int8(4), np.int64(4), torch.tensor(4)):
        size = largest_size(state, count, recipe=boxed)
        assert type(size) is int
        assert size == largest_size(state, 4, recipe=plain)
    many = {"w": torch.empty(2**16, 2**10, device="meta")}
    assert largest_size(many, np.int32(2**26)) == largest_size(many, 2**26)


def test_what_is_not_prunable_is_whole_for_other_tools_too(tmp_path):
    state = {"weight": torch.eye(64), "table": torch.eye(64)}
    save_sparse(tmp_path / "x", state, prunable=["weight"], top1=91.5, recipe={"recipe": "resnet20"})
    file = read_sparse(tmp_path / "x")
    assert (file.prunable, file.certificate.prunable, file.certificate.nonzeros) == (("weight",), 4096, 64)
    assert_same(file.tensors, state)
    (tmp_path / "y").write_bytes(lzma.decompress((tmp_path / "x").read_bytes()))
    with safe_open(tmp_path / "y", "pt") as other:
        assert torch.equal(other.get_tensor("table"), state["table"])
        assert torch.equal(other.get_tensor("weight"), torch.ones(64))
        about = json.loads(other.metadata()["gsm-sgd"])
    assert (about["format"], about["certificate"]["top1"], about["recipe"]) == (container.FORMAT, 91.5, file.recipe)
    assert_same(load_sparse(tmp_path / "y"), state)  # which need not be compressed


# --- how large it is ---


@pytest.mark.parametrize(
    ("name", "compression", "kept", "times"),
    [("lenet300", 60, 4_436, 40), ("lenet5", 300, 1_435, 140), ("resnet56", 10, 85_150, 7)],
)
def test_size_targets(tmp_path, name, compression, kept, times):
    state = pruned(name, compression)
    recipe = find_recipe(name).as_dict() | {"compression": float(compression)}
    size = save_sparse(tmp_path / "x", state, recipe=recipe, top1=98.41000000000001)
    assert read_sparse(tmp_path / "x").certificate.nonzeros == kept
    assert size * times <= len(save(state))
    assert size <= largest_size(state, kept, recipe=recipe) <= 1.2 * size + 2_000


@pytest.mark.parametrize("spread", ["even", "runs", "last layer"])
@pytest.mark.parametrize(
    ("name", "target"), [("lenet300", 20_000), ("lenet300", 8_000), ("lenet300", 400_000), ("lenet5", 12_288)]
)
def test_a_target_size_is_met_wherever_the_weights_are(tmp_path, name, target, spread):
    recipe = find_recipe(name)
    compression = compression_for(target, models.build(name, 0), [recipe])
    fields = {**recipe.as_dict(), "compression": compression}
    size = save_sparse(tmp_path / "x", pruned(name, compression, spread), recipe=fields, top1=98.41000000000001)
    assert size <= target
    if spread == "even":
        assert size >= 0.9 * target - 1_000  # and not by keeping less than there is room for


@pytest.mark.parametrize(
    ("text", "size"),
    [("20KB", 20_000), ("20KiB", 20_480), ("1.5MB", 1_500_000), ("1 MiB", 2**20), ("300b", 300), (".5kb", 500)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "20", "KB", "-1KB", "1e3KB", "1GB", "nan KB", "1..5KB", "20KBx"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="a size is a number with B, KB, KiB, MB or MiB"):
        parse_size(text)


def test_sizes_that_are_too_small_say_the_smallest():
    model, recipe = models.build("lenet300", 0), find_recipe("lenet300")
    with pytest.raises(UsageError, match="one weight left") as caught:
        compression_for(1_000, model, [recipe])
    smallest = int(str(caught.value).split("up to ")[1].split(", which")[0].replace(",", ""))
    assert compression_for(smallest, model, [recipe]) > 266_200 / 2 - 1
    with pytest.raises(UsageError, match="one weight left"):
        compression_for(smallest - 1, model, [recipe])
    assert compression_for(10**7, model, [recipe]) == 1


@quick
@given(st.integers(1, 10**9), st.data())
def test_ratios_have_six_digits_and_never_keep_more(total, data):
    kept = data.draw(st.integers(1, total))
    ratio = _ratio(total, kept)
    assert float(f"{ratio:g}") == ratio  # as in the run's folder, so that it is found again
    assert 1 <= math.floor(total / ratio) <= max(kept, 1) or kept == 1
    assert ratio <= total


# --- files that lie ---


def edited(content, change):
    """The file, without compression, after `change(about, stored)` has changed its JSON or its tensors."""
    raw = lzma.decompress(content)
    about = json.loads(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["gsm-sgd"])
    stored = load(raw)
    text = change(about, stored)
    return save(stored, {"gsm-sgd": text if isinstance(text, str) else json.dumps(about)})


def with_header(text):
    text = text.encode()
    return len(text).to_bytes(8, "little") + text


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    state = {"a.weight": torch.zeros(40, 50), "b.weight": torch.zeros(20, 20), "c.weight": torch.ones(2, 2)}
    state |= {"a.bias": torch.ones(3), "flag": torch.tensor([True, False]), "n": torch.tensor(5)}
    state["a.weight"][::7, ::9] = 1.5
    state["b.weight"][1::2] = 2.5
    path = tmp_path_factory.mktemp("honest") / "x"
    save_sparse(path, state, recipe={"recipe": "lenet300"}, top1=98.0)
    return path


def bomb():
    """An xz file of 512 MiB of zeros."""
    xz = lzma.LZMACompressor(preset=0)
    return b"".join([*(xz.compress(bytes(2**24)) for _ in range(32)), xz.flush()])


def stored(**tensors):
    tensors = {"gsm-sgd.positions" if name == "positions" else name: tensor for name, tensor in tensors.items()}
    return lambda content: edited(content, lambda _, stored: stored.update(tensors))


def says(**fields):
    return lambda content: edited(content, lambda about, _: about.update(fields))


def certified(**fields):
    return lambda content: edited(content, lambda about, _: about["certificate"].update(fields))


def row(*fields):
    """The first row of the table is another."""
    return lambda content: edited(content, lambda about, _: about["pruned"].__setitem__(0, fields))


def shape(*sides):
    return row("a.weight", sides, "float32")


HUGE = json.dumps({"__metadata__": {"gsm-sgd": json.dumps({"format": container.FORMAT})},
                   "x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})  # fmt: skip
TWO = torch.tensor([2, 0], dtype=torch.uint8)
HOSTILE = {
    "empty": (lambda c: b"", "damaged"),
    "cut": (lambda c: c[:-1], "cut short"),
    "something after the end": (lambda c: c + c, "after its end"),
    "a zip bomb": (lambda c: bomb(), "decompresses to too much"),
    "a large dictionary": (lambda c: lzma.compress(b"?", preset=9), "xz says: Memory usage limit"),
    "header of 2**63 bytes": (lambda c: struct.pack("<Q", 2**63) + lzma.decompress(c)[8:], "damaged"),
    "header of brackets": (lambda c: with_header("[" * 100_000), "damaged"),
    "a header alone": (lambda c: with_header(HUGE), "damaged"),
    "JSON of brackets": (lambda c: edited(c, lambda *_: "[" * 100_000), "damaged"),
    "another safetensors file": (lambda c: save({"x": TWO}), "its format is not 'gsm-sgd sparse 2'"),
    "version 1": (lambda c: save({"x": TWO}, {"format": "gsm-sgd sparse 1"}), "its format is not 'gsm-sgd sparse 2'"),
    "version 3": (says(format="gsm-sgd sparse 3"), "its format is not 'gsm-sgd sparse 2'"),
    "few positions": (stored(positions=TWO), "not as many numbers as positions"),
    "many positions": (stored(positions=torch.zeros(999, dtype=torch.uint8)), "its positions are damaged"),
    "positions of another type": (stored(positions=torch.ones(3)), "its positions are damaged"),
    "a position beyond the end": (stored(positions=torch.tensor([254] * 40, dtype=torch.uint8)), "beyond the end"),
    "a number alone": (stored(**{"b.weight": torch.tensor(2.5)}), "positions are damaged"),
    "numbers in rows": (stored(**{"b.weight": torch.ones(200, 1)}), "not as many numbers as positions"),
    "numbers too many": (stored(**{"a.weight": torch.ones(37)}), "not as many numbers as positions"),
    "another tensor": (stored(extra=torch.ones(1)), "it states sha256"),
    "a truth value of 2": (stored(flag=TWO.view(torch.bool)), "neither 0 nor 1"),
    "no table": (says(pruned=3), "damaged"),
    "a row that is none": (row("a.weight"), "damaged"),
    "a row of nothing": (row("nothing", [40, 50], "float32"), "damaged"),
    "a name that is no text": (row("\ud800", [40, 50], "float32"), "damaged"),
    "an unknown type": (row("a.weight", [40, 50], "float8"), "damaged"),
    "another type": (row("a.weight", [40, 50], "int64"), "it states sha256"),
    "a huge shape": (shape(2**40, 2**40), "damaged"),
    "a huge empty shape": (shape(0, 2**70), "damaged"),
    "a shape of 2 GiB": (shape(2**29), "claim to hold tensors of 2,147,48"),
    "a shape of 64 MiB": (shape(2**24 - 500), "not as many numbers as positions"),
    "a negative shape": (shape(-40, -50), "damaged"),
    "a fractional shape": (shape(40.0, 50), "damaged"),
    "a smaller shape": (shape(35, 50), "a position is beyond the end"),
    "no certificate": (says(certificate=[]), "its certificate is damaged"),
    "an accuracy that is none": (certified(top1=math.nan), "damaged"),
    "an accuracy of 101 %": (certified(top1=101), "its certificate is damaged"),
    "another N": (certified(prunable=2417), "it states prunable 2417, but has 2404"),
    "another Q": (certified(nonzeros=251), "it states nonzeros 251, but has 240"),
    "other counts": (certified(kept=[37, 199, 4]), "it states kept [37, 199, 4], but has [36, 200, 4]"),
    "another hash": (certified(sha256="\x1b[31m"), r"it states sha256 '\x1b[31m', but has '"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_get_one_line(honest, tmp_path, name):
    damage, message = HOSTILE[name]
    path = tmp_path / "hostile"
    path.write_bytes(damage(honest.read_bytes()))
    with pytest.raises(UsageError) as caught:
        load_sparse(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


LIMITED = """
import resource, sys, time
from pathlib import Path
from gsm_sgd.experiments import UsageError
from gsm_sgd.export import load_sparse
load_sparse(Path(sys.argv[1]))
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 256 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sorted(Path(sys.argv[2]).iterdir()):
    began = time.monotonic()
    try:
        load_sparse(path)
    except UsageError as error:
        assert not isinstance(error.__cause__, MemoryError), path
    assert time.monotonic() - began < 10, path
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
def test_hostile_files_get_little_memory(honest, tmp_path):
    for name, (damage, _) in HOSTILE.items():
        (tmp_path / name).write_bytes(damage(honest.read_bytes()))
    words = [sys.executable, "-c", LIMITED, str(honest), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def check_damaged(content, path, honest):
    """A damaged file is refused, or what is read is as before."""
    path.write_bytes(content)
    try:
        found = load_sparse(path)
    except UsageError:
        return
    assert_same(found, load_sparse(honest))


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [True, False])
def test_files_that_are_cut_anywhere_are_refused(honest, tmp_path, compressed):
    content = honest.read_bytes() if compressed else lzma.decompress(honest.read_bytes())
    for length in range(len(content)):
        (tmp_path / "x").write_bytes(content[:length])
        with pytest.raises(UsageError):
            load_sparse(tmp_path / "x")


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damage_is_noticed_or_changes_nothing(honest, tmp_path_factory, data):
    content = bytearray(honest.read_bytes())
    if data.draw(st.booleans()):
        content = bytearray(lzma.decompress(content))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        removed = data.draw(st.integers(0, 9))
        content[at : at + removed] = data.draw(st.binary(min_size=removed == 0, max_size=9))
    check_damaged(content, tmp_path_factory.mktemp("f") / "x", honest)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_json_is_an_error_or_sound(honest, tmp_path_factory, data):
    """Any part of the JSON is replaced; what is then read is what was saved, but for recipe and accuracy."""

    def change(value, _=None):
        places = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
        if not places or data.draw(st.integers(0, 3)) == 0:
            return data.draw(json_values | st.integers(0, 60) | st.sampled_from(["float32", "a.weight", [], {}]))
        place = data.draw(st.sampled_from(list(places)))
        value[place] = change(value[place])
        return value

    content = edited(honest.read_bytes(), lambda about, _: json.dumps(change(about)))
    check_damaged(content, tmp_path_factory.mktemp("f") / "x", honest)


def test_growth_is_limited_but_can_be_allowed(tmp_path):
    zeros = {"w": torch.zeros(2**12, 2**13)}
    size = save_sparse(tmp_path / "x", zeros)
    assert size < 600
    with pytest.raises(UsageError, match=r"bytes claim to hold tensors of 134,217,728, over 67,108,864"):
        load_sparse(tmp_path / "x")
    assert_same(load_sparse(tmp_path / "x", max_bytes=2**27), zeros)


def test_a_missing_file():
    with pytest.raises(UsageError, match="cannot read nowhere: No such file"):
        load_sparse("nowhere")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_export_leaves_what_was_there(tmp_path, monkeypatch, error):
    path = tmp_path / "x.safetensors"
    save_sparse(path, {"w": torch.eye(3)})
    before = path.read_bytes()

    def fail(_):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((UsageError, KeyboardInterrupt)) as caught:
        save_sparse(path, {"w": torch.eye(4)})
    if isinstance(error, OSError):
        assert "cannot write" in str(caught.value)
        assert "No space left on device" in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
