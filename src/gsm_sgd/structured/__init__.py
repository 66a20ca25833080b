"""Whole channels: find them, train all but the chosen ones to nothing, and remove those from the model."""

from .aofp import AOFP
from .centripetal import CSGD
from .channels import ChannelGroups
from .compactor import ResRep, fold, insert_compactors, resrep_parameters
from .methods import ChannelMethod, GroupL1, Slimming, Uniform
from .remove import load_narrow, narrow, remove_channels, save_narrow, widths

METHODS: dict[str, type[ChannelMethod]] = {
    method.name: method for method in (Slimming, GroupL1, Uniform, ResRep, CSGD, AOFP)
}
"""The methods by name; ResRep takes a model with compactors."""

__all__ = [
    "AOFP",
    "CSGD",
    "METHODS",
    "ChannelGroups",
    "ChannelMethod",
    "GroupL1",
    "ResRep",
    "Slimming",
    "Uniform",
    "fold",
    "insert_compactors",
    "load_narrow",
    "narrow",
    "remove_channels",
    "resrep_parameters",
    "save_narrow",
    "widths",
]
