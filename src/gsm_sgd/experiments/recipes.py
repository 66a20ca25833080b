"""One function per published experiment, each returning a typed, frozen Recipe.

Presets: `paper` is the paper's text, `repo` the authors' PyTorch code, `fast` ours, the default.
Settings and figures: Ding et al., "Global Sparse Momentum SGD for Pruning Very Deep Neural Networks",
NeurIPS 2019, arXiv 1909.12778, and github.com/DingXiaoH/GSM-SGD.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from inspect import signature
from typing import Any, Literal, get_args

from ..budget import Budget
from ..methods import METHODS, Method
from ..scores import SCORES
from ..structured import METHODS as OF_CHANNELS
from ..structured.methods import ChannelMethod
from . import UsageError, suggestion

OURS, DENSE = "gsm", "dense"  # the names of two methods
RIVALS: dict[str, type[Method] | type[ChannelMethod]] = {**METHODS, **OF_CHANNELS}
"""All methods but GSM."""
Preset = Literal["fast", "paper", "repo"]
Precision = Literal["auto", "float32", "bfloat16"]
Normalization = Literal["dataset", "imagenet"]
_MOST_EPOCHS = 100_000  # of a stage; a recipe may be anybody's, and with more it never ends
_MOST_MILESTONES = 1_000
_LARGEST_BATCH = 2**24
_LARGEST = 1e38  # of float32's numbers
OF_GSM: dict[str, Any] = {
    **{"ramp": 0.0, "cut": 1.0, "fade": 0.0, "passive_decay": None, "shrink_to": 1e-6, "score": "taylor"},
    "recalibrate": False,
}
"""Settings of GSM alone, and what they are with other methods."""


@dataclass(frozen=True)
class Training:
    """How one stage is trained: momentum SGD, the learning rate cut tenfold at each milestone, or along a cosine.

    Args:
        epochs: passes over the training set.
        lr: initial learning rate.
        milestones: epochs after which the learning rate is multiplied by 0.1.
        momentum: momentum coefficient beta.
        weight_decay: L2 coefficient eta of the weights; biases and norms have none.
        nesterov: whether momentum is Nesterov's.
        warmup_epochs: epochs over which the learning rate rises linearly from 0, a step at a time.
        bias_lr_factor: the biases' learning rate is this times lr.
        cosine: share of the epochs after which the learning rate falls to zero along half a cosine; null means not.
        label_smoothing: share of each label that is spread over all classes.
    """

    epochs: int
    lr: float
    milestones: tuple[int, ...] = ()
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    warmup_epochs: float = 0.0
    bias_lr_factor: float = 1.0
    cosine: float | None = None
    label_smoothing: float = 0.0

    def check(self, stage: str) -> None:
        """Raise UsageError, naming the stage, if a setting makes no sense."""
        if not 1 <= self.epochs <= _MOST_EPOCHS:
            raise UsageError(f"{stage}.epochs must be at least 1 and at most {_MOST_EPOCHS:,}, not {self.epochs}")
        if len(self.milestones) > _MOST_MILESTONES:
            raise UsageError(f"{stage}.milestones must be at most {_MOST_MILESTONES}, not {len(self.milestones)}")
        numbers = {name: getattr(self, name) for name in ("lr", "weight_decay", "warmup_epochs", "bias_lr_factor")}
        for name, value in [*numbers.items(), *(("milestones", milestone) for milestone in self.milestones)]:
            if not 0 <= value < _LARGEST:
                raise UsageError(f"{stage}.{name} must be finite and at least 0, not {value}")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"{stage}.momentum must be at least 0 and below 1, not {self.momentum}")
        if self.nesterov and not self.momentum:
            raise UsageError(f"{stage}.nesterov needs {stage}.momentum above 0")
        if self.cosine is not None and not 0 <= self.cosine < 1:
            raise UsageError(f"{stage}.cosine must be at least 0 and below 1, not {self.cosine}")
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"{stage}.label_smoothing must be at least 0 and below 1, not {self.label_smoothing}")

    def scaled(self, factor: float) -> "Training":
        """Return the same schedule in `factor` times the epochs, at least one, milestones moved alike."""
        return replace(
            self,
            epochs=max(1, round(self.epochs * factor)),
            milestones=tuple(round(milestone * factor) for milestone in self.milestones),
            warmup_epochs=self.warmup_epochs * factor,
        )


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a run.

    Args:
        recipe: name of the published experiment.
        preset: whose settings these are.
        model: network to train: one of the recipes', "torchvision:NAME", "file.py:function" or "module:function".
        dataset: images to train it on: "mnist", "cifar10"; "imagenet", any folder of images by class; "synthetic",
            which is made up; or "file.py:function" or "module:function", which returns two of torch's data sets.
        base: training of the base net, and of a ticket.
        gsm: training with GSM, or by another method.
        compression: C; of N prunable weights floor(N / C) are kept. 1 keeps all and trains by plain SGD: the dense
            control of a pruned net, from the same base net, for the same epochs.
        weights: file of a base net that was trained elsewhere, safetensors or a state dict that torch has saved, where
            {seed} in its name is the run's seed; or "torchvision", "torchvision:NAME" for torchvision's of its
            networks. Then no base net is trained.
        start: what GSM training starts from: the base net, or its initialisation, without training a base net.
        ramp: share of GSM training in which the compression ratio rises from 1 to C, by the cubic rule.
        cut: share of GSM training after which passive weights are cut; the rest trains the kept weights alone.
        fade: share of GSM training, before the cut, in which it is fixed what is kept and all else only decays.
        passive_decay: weight decay of passive weights in GSM training; null means gsm.weight_decay, the paper's rule;
            "auto" chooses it so that they shrink to `shrink_to` between the ramp and the cut, or the fade, and in it.
        shrink_to: what "auto" aims at.
        pattern: what is kept or removed together: a weight, or a channel, which makes the net narrower, faster.
        macs: share of the dense net's multiply-accumulates that the net without channels may cost.
        latency: in place of that, share of the dense net's time for an image, as measured on this machine.
        score: by what GSM chooses the active weights: taylor |w g|, magnitude |w|, or random.
        batch_size: images per step.
        seed: of the initial weights and of the order of the images.
        recalibrate: whether to measure the batch norms' means and variances anew if the cut, when training is over, has
            changed the net.
        precision: of the arithmetic in training; weights, the choice of those that are active, and updates are always
            float32. "auto" is bfloat16 where the processor has instructions for it, else float32.
        holdout: if above 0, train without this many training images and measure accuracy on them instead of the
            test set, for choosing settings.
        normalization: mean and deviation that pixels are normalised with: those usual for the data set, which are .5
            for CIFAR-10, or ImageNet's.
        method: what prunes: gsm, or one of `gsm_sgd.METHODS`, or with pattern channel of `gsm_sgd.structured.METHODS`;
            these train with `gsm`'s settings.
        settings: of a method other than GSM; in a file they stand under the method's name.
    """

    recipe: str
    preset: Preset
    model: str
    dataset: str
    base: Training
    gsm: Training
    compression: float
    weights: str | None = None
    start: Literal["base", "init"] = "base"
    ramp: float = 0.0
    cut: float = 1.0
    fade: float = 0.0
    passive_decay: float | Literal["auto"] | None = None
    shrink_to: float = 1e-6
    pattern: Literal["weight", "channel"] = "weight"
    macs: float = 0.5
    latency: float | None = None
    score: str = "taylor"
    batch_size: int = 256
    seed: int = 0
    recalibrate: bool = False
    precision: Precision = "float32"
    holdout: int = 0
    normalization: Normalization = "dataset"
    method: str = OURS
    settings: Mapping[str, Any] = field(default_factory=dict)

    def scaled(self, factor: float) -> "Recipe":
        """Return the recipe with every stage and its milestones shortened, or stretched, by `factor`."""
        if not (math.isfinite(factor) and factor > 0):
            raise UsageError(f"epochs-scale must be a finite number above 0, not {factor}")
        return replace(self, base=self.base.scaled(factor), gsm=self.gsm.scaled(factor))

    @property
    def pretrained(self) -> str | None:
        """Where this seed's base net comes from, if it is not trained here."""
        return None if self.weights is None else self.weights.replace("{seed}", str(self.seed))

    @property
    def budget(self) -> dict[str, Any]:
        """What GSM or another method may keep, as their keyword argument."""
        if self.pattern == "weight":
            return {"compression": self.compression}
        return {"macs": self.macs} if self.latency is None else {"latency": self.latency}

    @property
    def cut_epoch(self) -> int:
        """The epoch of GSM training at whose end passive weights are cut."""
        return cut_epoch(self.cut, self.gsm.epochs)

    def paper(self) -> dict[str, float] | None:
        """Return the paper's top-1 figures, in percent, or None if it has none to compare this run with."""
        original = find_recipe(self.recipe)
        comparable = (
            not self.holdout
            and self.pattern == "weight"
            and self.method == OURS
            and (self.model, self.dataset) == (original.model, original.dataset)
        )
        return published(self.recipe).get(self.compression) if comparable else None

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe in YAML's own types."""
        values = asdict(self)
        for stage in ("base", "gsm"):
            values[stage]["milestones"] = list(values[stage]["milestones"])
        if settings := values.pop("settings"):
            values[self.method] = dict(settings)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Return the recipe of which `as_dict` made these values."""
        values = dict(values)
        if (method := values.get("method", OURS)) != OURS:
            values["settings"] = {**find_settings(method), **values.pop(method, {})}
        stages = {
            stage: Training(**{**values[stage], "milestones": tuple(values[stage]["milestones"])})
            for stage in ("base", "gsm")
        }
        return cls(**{**values, **stages})

    def check(self) -> None:
        """Raise UsageError if a field makes no sense; of compression and passive_decay the optimizer judges."""
        self.base.check("base")
        self.gsm.check("gsm")
        self._check_method()
        if not 1 <= self.batch_size <= _LARGEST_BATCH:
            raise UsageError(f"batch_size must be at least 1 and at most {_LARGEST_BATCH:,}, not {self.batch_size}")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"seed must be at least 0 and below 2**32, not {self.seed}")
        if self.score not in SCORES:
            raise UsageError(f"unknown score {self.score!r}: {suggestion(self.score, SCORES)}")
        if not 0 < self.macs <= 1:
            raise UsageError(f"macs must be above 0 and at most 1, not {self.macs}")
        if self.latency is not None and not 0 < self.latency <= 1:
            raise UsageError(f"latency must be above 0 and at most 1, not {self.latency}")
        if self.latency is not None and self.pattern != "channel":
            raise UsageError("latency is a budget of channels: add --pattern channel")
        if self.weights is not None and self.start != "base":
            raise UsageError("weights are a base net to start from: add --start base, or leave them out")
        if not 0 <= self.holdout < 2**32:
            raise UsageError(f"holdout must be at least 0 and below 2**32, not {self.holdout}")
        if self.normalization == "imagenet" and self.dataset not in ("cifar10", "imagenet"):
            raise UsageError(f"normalization imagenet is for colours, which {self.dataset} lacks: set it to dataset")
        if not (self.ramp >= 0 and self.fade >= 0 and self.ramp + self.fade < self.cut <= 1):
            raise UsageError(
                f"ramp and fade must be at least 0, and ramp + fade < cut <= 1 must hold, "
                f"not ramp {self.ramp}, fade {self.fade} and cut {self.cut}"
            )
        if self.fade and self.cut_epoch == self.gsm.epochs:
            raise UsageError(
                f"a fade needs a cut before the end of GSM training, which a cut at {self.cut} of {self.gsm.epochs} "
                "epochs is not: train for more epochs, or set fade to 0"
            )
        if (self.ramp + self.fade) * self.gsm.epochs >= self.cut_epoch:
            raise UsageError(
                f"a ramp of {self.ramp} and a fade of {self.fade} do not end before the cut, which comes after "
                f"{self.cut_epoch} of {self.gsm.epochs} epochs: shorten them, or train for more epochs"
            )

    def _check_method(self) -> None:
        """Raise UsageError if a setting does not go with the method."""
        if self.method == OURS:
            return
        if (self.method in OF_CHANNELS) != (self.pattern == "channel"):
            fitting = "channel" if self.method in OF_CHANNELS else "weight"
            raise UsageError(f"{self.method} is for --pattern {fitting}")
        if unknown := set(self.settings) - set(find_settings(self.method)):
            raise UsageError(f"{self.method} has no setting {min(unknown)!r}")
        if other := [key for key, value in OF_GSM.items() if getattr(self, key) != value]:
            raise UsageError(f"{other[0]} is a setting of GSM, not of {self.method}: leave it out")


def find_settings(method: str) -> dict[str, Any]:
    """Return the settings of a method and their defaults; GSM's are fields of a recipe, and so is the seed.

    Raises:
        UsageError: no method has that name; the nearest is suggested.
    """
    if method not in (OURS, *RIVALS):
        raise UsageError(f"unknown method {method!r}: {suggestion(method, (OURS, *RIVALS))}")
    settings = {} if method == OURS else RIVALS[method].settings()
    return {key: value for key, value in settings.items() if key != "seed"}


def add_settings(parser: Any, method: str) -> None:
    """Let a parser of jsonargparse's take the settings of a method as options: --rigl.every for RigL's `every`."""
    if settings := find_settings(method):
        # the parser looks into where a method passes its budget on to
        others = {*signature(RIVALS[method]).parameters, *signature(Budget.of).parameters} - set(settings)
        parser.add_class_arguments(RIVALS[method], method, skip=others)


def method_title(method: str) -> str:
    """Return what to call a method in words; the name of one that is not known."""
    known = RIVALS.get(method)
    return "GSM" if method == OURS else (known and known.title) or method


def by_method(recipe: Recipe, method: str) -> Recipe:
    """Return a recipe of GSM with another method in its place, the same net, data and epochs, by the same SGD."""
    settings = find_settings(method)
    if method == OURS:
        return recipe
    ratio = 1.0 if method == DENSE else recipe.compression
    return replace(recipe, method=method, settings=settings, compression=ratio, **OF_GSM)


def check_stages(settings: object) -> None:
    """Raise ValueError unless a file's settings of stages are fields of Training: parsers import what others name."""
    known = {field.name for field in fields(Training)}
    if not isinstance(settings, Mapping):
        raise ValueError("it holds no settings")
    method = settings.get("method", OURS)
    if method in RIVALS:
        theirs = settings.get(method, {})
        if not (isinstance(theirs, Mapping) and set(find_settings(method)).issuperset(theirs)):
            raise ValueError(f"{method} has a setting that it does not know, or is not a group of settings")
    if any(key == "config" or "." in key for key in settings):
        raise ValueError("it names another file, or a part of a setting")
    for stage in ("base", "gsm"):
        if not (isinstance(theirs := settings.get(stage, {}), Mapping) and known.issuperset(theirs)):
            raise ValueError(f"{stage} has a setting that no stage has, or is not a group of settings")


def net_name(recipe: str, model: str) -> str:
    """Return what to call a recipe's net: as the recipe, or where it trains another, as that, fit for a file's name."""
    return recipe if model == recipe else re.sub(r"^torchvision:|.*/|\.py(?=:)", "", model).replace(":", "-")


def cut_epoch(cut: float, epochs: int) -> int:
    """Return the epoch at whose end a cut comes that is to come after a share of all epochs."""
    return max(1, round(cut * epochs))


# of preset `fast`: docs/theory.md has what each of them is worth
_BUDGET: dict[str, Any] = {"ramp": 0.3, "fade": 0.1, "cut": 0.7, "passive_decay": "auto"}


def _lenet(recipe: str, compression: float, preset: Preset) -> Recipe:
    """Return the settings that the two LeNets share."""
    base = Training(200, 3e-2, (40, 80, 120, 160), warmup_epochs=5)
    match preset:
        case "paper":
            base = replace(base, bias_lr_factor=2.0)
            gsm = Training(240, 3e-2, (160, 200), momentum=0.99)
        case "repo":
            gsm = Training(280, 1e-2, (160, 200, 240), momentum=0.99, nesterov=True)
        case "fast":
            base = Training(30, 3e-2, (15, 24), warmup_epochs=1)
            gsm = Training(48, 0.1, momentum=0.95, weight_decay=5e-4, cosine=0.5, label_smoothing=0.05)
            if recipe == "lenet5":  # else some seeds do not get off the ground
                gsm = replace(gsm, warmup_epochs=1.0)
            return Recipe(
                recipe, preset, recipe, "mnist", base, gsm, compression, start="init", batch_size=128, **_BUDGET
            )
    return Recipe(recipe, preset, recipe, "mnist", base, gsm, compression)


def lenet300(preset: Preset = "fast") -> Recipe:
    """LeNet-300-100 on MNIST, 60x (tables 1 and 4)."""
    return _lenet("lenet300", 60.0, preset)


def lenet5(preset: Preset = "fast") -> Recipe:
    """LeNet-5 on MNIST, 125x; 300x is the paper's other figure (tables 1 and 4)."""
    return _lenet("lenet5", 125.0, preset)


def _cifar(recipe: str, preset: Preset) -> Recipe:
    """Return the settings that the deep nets for CIFAR-10 share: 10x, from a base net."""
    base = Training(500, 0.1, (100, 200, 300, 400), weight_decay=1e-4, warmup_epochs=5)
    gsm = Training(600, 5e-3, (400, 500), momentum=0.98, weight_decay=1e-4)
    match preset:
        case "paper":
            return Recipe(recipe, preset, recipe, "cifar10", base, gsm, 10.0, batch_size=64, precision="auto")
        case "repo":
            gsm = replace(gsm, warmup_epochs=5)
            return Recipe(recipe, preset, recipe, "cifar10", base, gsm, 10.0, batch_size=64, precision="auto")
        case "fast":
            base = Training(20, 0.1, warmup_epochs=1, cosine=0.0)
            gsm = Training(20, 0.05, warmup_epochs=0.5, cosine=0.5)
            return Recipe(
                recipe, preset, recipe, "cifar10", base, gsm, 10.0, batch_size=128, precision="auto", **_BUDGET
            )


def resnet20(preset: Preset = "fast") -> Recipe:
    """ResNet-20 on CIFAR-10, 10x, which the paper does not have: with the settings of ResNet-56."""
    return _cifar("resnet20", preset)


def resnet56(preset: Preset = "fast") -> Recipe:
    """ResNet-56 on CIFAR-10, 10x; 6.6x is the paper's other figure (table 2)."""
    return _cifar("resnet56", preset)


def _cifar_public(recipe: str, preset: Preset, epochs: int) -> Recipe:
    """Return the settings for the nets of github.com/akamaster/pytorch_resnet_cifar10, which `--weights` takes."""
    settings = replace(_cifar(recipe, preset), normalization="imagenet")
    if preset == "fast":
        settings = replace(settings, gsm=replace(settings.gsm, epochs=epochs), ramp=0.5, fade=0.1, cut=0.8)
    return settings


def resnet20a(preset: Preset = "fast") -> Recipe:
    """ResNet-20 without weights in its shortcuts on CIFAR-10, 10x."""
    return _cifar_public("resnet20a", preset, epochs=20)


def resnet56a(preset: Preset = "fast") -> Recipe:
    """ResNet-56 without weights in its shortcuts on CIFAR-10, 10x."""
    return _cifar_public("resnet56a", preset, epochs=40)


def densenet40(preset: Preset = "fast") -> Recipe:
    """DenseNet-40 on CIFAR-10, 10x; 6.6x and 8x are the paper's other figures (table 2)."""
    return _cifar("densenet40", preset)


def resnet50(preset: Preset = "fast") -> Recipe:
    """ResNet-50 on ImageNet from torchvision's trained net, 4x; 5x is the paper's other figure (table 3).

    The paper leaves momentum and weight decay of this experiment open; with these passive weights shrink to 3e-4.
    """
    base = Training(90, 0.1, (30, 60), weight_decay=1e-4)
    gsm = Training(60, 1e-3, (40, 50), momentum=0.99, weight_decay=1e-4)
    source = {"model": "resnet50", "dataset": "imagenet", "weights": "torchvision:IMAGENET1K_V1"}
    published: dict[str, Any] = {"batch_size": 64, "precision": "auto", **source}
    if preset == "fast":
        gsm = Training(20, 1e-2, weight_decay=1e-4, cosine=0.5)
        return Recipe("resnet50", preset, base=base, gsm=gsm, compression=4.0, **published, **_BUDGET)
    return Recipe("resnet50", preset, base=base, gsm=gsm, compression=4.0, **published)


RECIPES: dict[str, Callable[[Preset], Recipe]] = {
    "lenet300": lenet300,
    "lenet5": lenet5,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "resnet20a": resnet20a,
    "resnet56a": resnet56a,
    "densenet40": densenet40,
    "resnet50": resnet50,
}

# Top-1 in percent, keyed as in result.json: tables 1 to 4.
_PUBLISHED: dict[tuple[str, float], dict[str, float]] = {
    ("lenet300", 60): {"base": 98.19, "pruned": 98.18, "ticket_gsm": 98.22, "ticket_magnitude": 97.39},
    ("lenet5", 125): {"base": 99.21, "pruned": 99.22, "ticket_gsm": 99.04, "ticket_magnitude": 97.60},
    ("lenet5", 300): {"base": 99.21, "pruned": 99.06, "ticket_gsm": 98.88, "ticket_magnitude": 11.35},
    ("resnet56", 6.6): {"base": 94.05, "pruned": 94.10},
    ("resnet56", 10): {"base": 94.05, "pruned": 93.80},
    ("densenet40", 6.6): {"base": 93.86, "pruned": 94.07},
    ("densenet40", 8): {"base": 93.86, "pruned": 94.02},
    ("densenet40", 10): {"base": 93.86, "pruned": 93.90},
    ("resnet50", 4): {"base": 75.72, "pruned": 75.33},
    ("resnet50", 5): {"base": 75.72, "pruned": 74.30},
}


def published(recipe: str) -> dict[float, dict[str, float]]:
    """Return the paper's top-1 figures of a recipe, in percent, by compression ratio."""
    return {ratio: figures for (name, ratio), figures in _PUBLISHED.items() if name == recipe}


def find_recipe(name: str, preset: str = "fast") -> Recipe:
    """Return a recipe by name.

    Raises:
        UsageError: no recipe or preset has that name; the nearest is suggested.
    """
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}: {suggestion(name, RECIPES)}")
    presets = get_args(Preset)
    if preset not in presets:
        raise UsageError(f"unknown preset {preset!r}: {suggestion(preset, presets)}")
    return RECIPES[name](preset)  # type: ignore[arg-type]  # narrowed by the check above
