"""Whole channels: find them, train all but the chosen ones to nothing, and remove those from the model."""

from .channels import ChannelGroups
from .methods import METHODS, ChannelMethod, GroupL1, Slimming, Uniform
from .remove import load_narrow, narrow, remove_channels, save_narrow, widths

__all__ = [
    "METHODS",
    "ChannelGroups",
    "ChannelMethod",
    "GroupL1",
    "Slimming",
    "Uniform",
    "load_narrow",
    "narrow",
    "remove_channels",
    "save_narrow",
    "widths",
]
