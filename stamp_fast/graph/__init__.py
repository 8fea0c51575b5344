"""Trace a model, find its channel groups, cost them, and take channels out."""

from .graph import ChannelGraph, Group, trace

__all__ = ["ChannelGraph", "Group", "trace"]
