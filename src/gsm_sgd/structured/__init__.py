"""Whole channels: find them, train all but the chosen ones to nothing, and remove those from the model."""

from .channels import ChannelGroups
from .compactor import ResRep, fold, insert_compactors, resrep_parameters
from .methods import METHODS, ChannelMethod, GroupL1, Slimming, Uniform
from .remove import load_narrow, narrow, remove_channels, save_narrow, widths

__all__ = [
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
