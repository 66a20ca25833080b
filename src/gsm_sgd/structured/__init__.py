"""Whole channels: find them, train all but the chosen ones to nothing, and remove those from the model."""

from .channels import ChannelGroups
from .remove import load_narrow, narrow, remove_channels, save_narrow, widths

__all__ = ["ChannelGroups", "load_narrow", "narrow", "remove_channels", "save_narrow", "widths"]
