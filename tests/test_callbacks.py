"""The callbacks for the trainers of Transformers and Lightning: steps, cut, masks, the best model, resuming."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from gsm_sgd import GSM, GSMAdamW, Masks, Phase, Schedule, callbacks, one_phase, sparsity_table
from gsm_sgd.callbacks.loop import Loop
from gsm_sgd.export import load_sparse, save_sparse
from nets import assert_same_bits, dense_net

pytestmark = pytest.mark.slow
LIBRARIES = {"transformers": "TransformersCallback", "lightning": "LightningCallback"}


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}: pip install -e '.[examples]'")


class Points(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, number):
        generator = torch.Generator().manual_seed(number)
        return {"inputs": torch.randn(12, generator=generator), "labels": number % 4}


def kept_of(model):
    return sum(row.nonzeros for row in sparsity_table(model))


# --- what both share ---


def test_a_library_is_imported_when_its_callback_is_used():
    code = """
import sys
import gsm_sgd, gsm_sgd.callbacks, gsm_sgd.callbacks.loop
assert not {"transformers", "lightning"} & set(sys.modules)
sys.modules["transformers"] = None
try:
    gsm_sgd.callbacks.TransformersCallback
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "transformers" in done.stdout
    with pytest.raises(AttributeError, match="no attribute 'KerasCallback'"):
        _ = callbacks.KerasCallback


def test_shares_are_checked_at_once():
    with pytest.raises(ValueError, match="ramp is a share of total_steps, from 0 to 1, not 3"):
        Loop(None, {"ramp": 3})


@pytest.mark.parametrize(
    ("optimizers", "message"),
    [
        ([], "must train by one GSM or GSMAdamW, not by nothing"),
        ([torch.optim.SGD], "must train by one GSM or GSMAdamW, not by SGD"),
        ([GSM, GSMAdamW], "not by GSM, GSMAdamW"),
    ],
)
def test_other_optimizers_are_refused(optimizers, message):
    made = [
        kind(dense_net().parameters(), 0.1, **({} if kind is torch.optim.SGD else {"compression": 4}))
        for kind in optimizers
    ]
    with pytest.raises(ValueError, match=message):
        Loop(None, {}).begin(made, 100)


def test_a_schedule_of_other_steps_is_refused_and_one_of_as_many_stays():
    schedule = Schedule(100, cut=0.8)
    optimizer = GSM(dense_net().parameters(), 0.1, compression=4, schedule=schedule, passive_decay=0.5)
    with pytest.raises(ValueError, match="the optimizer's schedule has 100 steps, and the trainer takes 99: leave the"):
        Loop(None, {}).begin([optimizer], 99)
    Loop(None, {"ramp": 0.5}).begin([optimizer], 100)
    assert optimizer.schedule is schedule
    assert optimizer.param_groups[0]["passive_decay"] == 0.5


@pytest.mark.parametrize(("chosen", "decay"), [(None, "auto"), (0.5, 0.5)])
def test_an_optimizer_without_a_schedule_gets_what_the_constructor_would_give_it(chosen, decay):
    optimizer = GSM(dense_net().parameters(), 0.1, compression=4, passive_decay=chosen)
    Loop(None, {"ramp": 0.5, "cut": 0.8}).begin([optimizer], 1_000)
    assert optimizer.schedule == Schedule(1_000, ramp=0.5, cut=0.8)
    assert (optimizer.phase, optimizer.param_groups[0]["passive_decay"]) == (Phase.RAMP, decay)


# --- Transformers ---


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = dense_net()

    def forward(self, inputs, labels):
        logits = self.net(inputs)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def trainer_of(folder, callback, optimizer=None, steps=20, **arguments):
    from transformers import Trainer, TrainingArguments

    model = Classifier()
    if optimizer is None:
        optimizer = GSMAdamW(model.named_parameters(), 0.01, compression=8)
    elif callable(optimizer):
        optimizer = optimizer(model)
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1000}
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=8, **{"save_strategy": "no", **quiet, **arguments}
    )
    points = Points()
    return Trainer(
        model, arguments, train_dataset=points, eval_dataset=points, optimizers=(optimizer, None), callbacks=[callback]
    )


def optimizer_of(trainer):
    return trainer.optimizer.optimizer


@needs("transformers")
@pytest.mark.parametrize("cut", [0.7, 1])
def test_the_trainers_steps_are_planned_and_the_net_is_cut(tmp_path, cut):
    callback = callbacks.TransformersCallback(cut=cut, ramp=0.2)
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    optimizer = optimizer_of(trainer)
    assert optimizer.schedule == Schedule(20, cut=cut, ramp=0.2)
    assert optimizer.phase is Phase.DONE
    assert kept_of(trainer.model) == optimizer.num_kept == callback.masks.num_kept == 44
    saved = Masks.load(tmp_path / "masks.safetensors")
    assert all(torch.equal(saved[name], mask) for name, mask in callback.masks.items())
    trainer.train()  # the same optimizer once more: nothing is planned again, and the zeros stay
    assert optimizer_of(trainer) is optimizer
    assert kept_of(trainer.model) == 44
    assert optimizer.param_groups[0]["step"] == 40


@needs("transformers")
def test_other_optimizers_of_the_trainer_are_refused_before_the_first_step(tmp_path):
    callback = callbacks.TransformersCallback()
    trainer = trainer_of(tmp_path, callback, lambda model: torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="must train by one GSM or GSMAdamW, not by AdamW"):
        trainer.train()
    assert trainer.state.global_step == 0


@needs("transformers")
@pytest.mark.parametrize("cut", [0.7, 1])
def test_the_best_model_is_one_that_was_cut(tmp_path, cut):
    """Dense nets are better here, and do not count."""
    callback = callbacks.TransformersCallback(masks=None, cut=cut)
    trainer = trainer_of(
        tmp_path,
        callback,
        **{"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_strategy": "steps", "save_steps": 2},
        **{"eval_strategy": "steps", "eval_steps": 2},
    )
    losses, evaluate = {}, trainer.evaluate

    def noted(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        metrics["eval_loss"] = 1.0 + (kept_of(trainer.model) == 44)  # all that were cut are worse
        losses[trainer.state.global_step] = metrics["eval_loss"]
        return metrics

    trainer.evaluate = noted
    trainer.train()
    first = next(step for step, loss in losses.items() if loss == 2)
    assert first == (16 if cut < 1 else 20)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{first}")
    assert kept_of(trainer.model) == 44
    assert not (tmp_path / "masks.safetensors").exists()


@needs("transformers")
@pytest.mark.parametrize("stop", [4, 16])
def test_a_checkpoint_is_resumed_to_the_same_bits(tmp_path, stop):
    straight = trainer_of(tmp_path / "one", callbacks.TransformersCallback())
    straight.train()
    settings = {"save_strategy": "steps", "save_steps": stop}
    trainer_of(tmp_path / "two", callbacks.TransformersCallback(), **settings).train()
    resumed = trainer_of(tmp_path / "two", callbacks.TransformersCallback(ramp=0.1))  # the state brings its own
    with pytest.warns(UserWarning, match="the loaded state brings schedule="):
        resumed.train(resume_from_checkpoint=str(tmp_path / "two" / f"checkpoint-{stop}"))
    assert_same_bits(resumed.model, straight.model)
    assert kept_of(resumed.model) == 44


# --- Lightning ---


def fit(folder, callback, checkpoint=None, resume=None):
    import lightning
    from torch.utils.data import DataLoader

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = dense_net()

        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch["inputs"]), batch["labels"])

        def validation_step(self, batch, _):
            self.log("loss", 1.0 + (kept_of(self) == 44))  # all that were cut are worse

        def configure_optimizers(self):
            return GSMAdamW(self.named_parameters(), 0.01, compression=8)

    module, loader = Module(), DataLoader(Points(), batch_size=8)
    quiet = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(
        max_epochs=4,
        default_root_dir=folder,
        devices=1,
        callbacks=[callback, *([checkpoint] if checkpoint else [])],
        enable_checkpointing=checkpoint is not None,
        **quiet,
    )
    trainer.fit(module, loader, loader, ckpt_path=resume)
    return module, trainer


quiet_lightning = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    *("ignore:.*does not have many workers", "ignore:.*Checkpoint directory", "ignore:.*`weights_only` was not set"),
)


@needs("lightning")
@quiet_lightning
@pytest.mark.parametrize("cut", [0.7, 1])
def test_lightnings_steps_are_planned_and_the_net_is_cut(tmp_path, cut):
    callback = callbacks.LightningCallback(cut=cut)
    module, trainer = fit(tmp_path, callback)
    (optimizer,) = trainer.optimizers
    assert optimizer.schedule == Schedule(32, cut=cut)
    assert optimizer.phase is Phase.DONE
    assert kept_of(module) == callback.masks.num_kept == 44
    assert Masks.load(tmp_path / "masks.safetensors").num_kept == 44


@needs("lightning")
@quiet_lightning
def test_the_best_checkpoint_of_lightning_is_one_that_was_cut(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    best = ModelCheckpoint(tmp_path, monitor="loss", filename="{epoch}")
    fit(tmp_path, callbacks.LightningCallback(masks=None), best)
    assert best.best_model_path.endswith("epoch=2.ckpt")  # the cut comes in the third epoch
    state = torch.load(best.best_model_path, weights_only=False)["state_dict"]
    assert sum(int(weight.count_nonzero()) for weight in state.values() if weight.ndim > 1) == 44


@needs("lightning")
@quiet_lightning
@pytest.mark.parametrize("epoch", [0, 2])
def test_a_checkpoint_of_lightning_is_resumed_to_the_same_bits(tmp_path, epoch):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def again(resume=None):
        return fit(tmp_path, callbacks.LightningCallback(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), resume)

    straight, _ = again()
    with pytest.warns(UserWarning, match="the loaded state brings schedule="):
        resumed, trainer = again(tmp_path / f"epoch={epoch}.ckpt")
    assert trainer.global_step == 32
    assert_same_bits(resumed, straight)
    assert kept_of(resumed) == 44


# --- files of Transformers ---


@needs("transformers")
@pytest.mark.filterwarnings("ignore::gsm_sgd.CutWarning")
def test_a_pruned_model_goes_out_as_others_expect_it_and_comes_back(tmp_path):
    """By save_pretrained and by a sparse file; embedding and head are one weight, before and after."""
    from transformers import GPT2Config, GPT2LMHeadModel

    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=64, n_positions=16, **special)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    optimizer, scheduler = one_phase(model, total_steps=8, lr=1e-3, sparsity=0.9, optimizer="adamw")
    for _ in range(8):
        tokens = torch.randint(64, (2, 8))
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        scheduler.step()
    masks = optimizer.finalize()
    model.save_pretrained(tmp_path / "saved")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    assert_same_bits(again, model)
    weights = dict(again.named_parameters())
    assert sum(int((weights[name] != 0).sum()) for name in masks) == masks.num_kept == optimizer.num_prunable // 10

    size = save_sparse(tmp_path / "sparse", again.state_dict())
    assert size < (tmp_path / "saved" / "model.safetensors").stat().st_size / 2
    fresh = GPT2LMHeadModel(config)
    fresh.load_state_dict(load_sparse(tmp_path / "sparse"))
    assert_same_bits(fresh, model)
    assert fresh.lm_head.weight is fresh.transformer.wte.weight
