"""Encodes a set of images into one statistic per channel: what the masks of STAMP are conditioned on.

That one permutation-invariant encoder looks at the whole set, and that masks depend on it through the activations of
the pretrained network, is the paper's (arXiv 2006.12139, abstract). Its equations were not available to us; the three
kinds below are our reading of it, built from the blocks of the Set Transformer (Lee et al. 2019, arXiv 1810.00825).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..errors import ArgumentError
from ..graph import ChannelGraph
from .statistics import image_means

KINDS = ("activation", "mean", "input")
_HEADS = 4


class MAB(nn.Module):
    """Multihead attention block: H = LN(X + Attention(X, Y, Y)), LN(H + rFF(H))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, _HEADS, batch_first=True)
        self.after_attention = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.after_feed_forward = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, y: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        attended, _ = self.attention(x, y, y, key_padding_mask=padding, need_weights=False)
        h = self.after_attention(x + attended)
        return self.after_feed_forward(h + self.feed_forward(h))


class SAB(nn.Module):
    """Set attention block, MAB(X, X): every element looks at all. Permutation equivariant."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = MAB(width)

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        return self.block(x, x, padding)


class PMA(nn.Module):
    """Pooling by attention from `seeds` learned queries, MAB(S, rFF(X)). Permutation invariant."""

    def __init__(self, width: int, seeds: int = 1) -> None:
        super().__init__()
        self.seeds = nn.Parameter(torch.randn(1, seeds, width) / math.sqrt(width))
        self.feed_forward = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.block = MAB(width)

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        return self.block(self.seeds.expand(len(x), -1, -1), self.feed_forward(x), padding)


class SetEncoder(nn.Module):
    """A set of images -> o, one statistic per channel class, and e, one code per channel group.

    Args:
        sizes: number of classes of every group, in order.
        kind: "activation": the images' mean activations, of each group by a projection of its own, go through
            a shared encoder, first within the images of a class and then over the classes (the two-level pooling of
            MetaD2A, Lee et al. 2021); its code corrects the plain mean. "mean": the mean activations alone. "input":
            the encoder makes a few pseudo-images of the set, which go through the network in the images' place.
        width: of the codes.
        image_shape: of one image, for "input".
        pseudo_images: how many of them, for "input".

    Raises:
        ArgumentError: unknown kind, or "input" without `image_shape`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        kind: str = "activation",
        width: int = 64,
        image_shape: Sequence[int] | None = None,
        pseudo_images: int = 4,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ArgumentError(f"encoder: must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind, self.sizes, self.width = kind, list(sizes), width
        self.image_shape = None if image_shape is None else tuple(image_shape)
        if kind == "activation":
            self.project = nn.ModuleList([nn.Linear(size, width) for size in sizes])
            self.within = nn.ModuleList([SAB(width), PMA(width)])
            self.across = PMA(width)
            self.correct = nn.ModuleList([nn.Linear(width, size) for size in sizes])
            for layer in self.correct:  # starts as the plain mean
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        elif kind == "input":
            if self.image_shape is None:
                raise ArgumentError("encoder: kind 'input' needs the shape of an image")
            pixels = math.prod(self.image_shape)
            self.embed = nn.Linear(pixels, width)
            self.look = SAB(width)
            self.pool = PMA(width, pseudo_images)
            self.draw = nn.Linear(width, pixels)

    def forward(
        self, graph: ChannelGraph, inputs: Any, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Looks at a set with the network of `graph`, whose weights get no gradient.

        Args:
            inputs: what a forward takes, or a list of that: all images of the set, in any order.
            labels: int, [images]: their classes; without them the set is taken for one class.

        Returns:
            o, float32 [sum(sizes)], NaN where nothing reads a channel; e, float32 [groups, width].
        """
        codes = torch.zeros(len(self.sizes), self.width, dtype=torch.float32)
        if self.kind == "input":
            return image_means(graph, self.pseudo_images(inputs), grad=True).mean(0), codes
        means = image_means(graph, inputs)
        if self.kind == "mean":
            return means.mean(0), codes
        codes = self._codes(means.nan_to_num(), labels)
        # Over the width: else one step of an optimizer with a rate per parameter moves it by all of its terms.
        corrections = [layer(code / self.width) for layer, code in zip(self.correct, codes, strict=True)]
        return means.mean(0) + torch.cat(corrections), codes

    def _codes(self, means: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        tokens = torch.stack([f(v) for f, v in zip(self.project, means.split(self.sizes, 1), strict=True)], 1)
        labels = torch.zeros(len(means), dtype=torch.long) if labels is None else labels.cpu()
        if labels.shape != (len(means),):
            raise ArgumentError(f"labels: expected one for each of the {len(means)} images, got {tuple(labels.shape)}")
        by_class = [tokens[labels == label] for label in labels.unique()]  # [images, groups, width] each
        counts = torch.tensor([len(images) for images in by_class])
        padded = pad_sequence(by_class, batch_first=True)  # [classes, most images, groups, width]
        classes, most, groups, width = padded.shape
        padding = torch.arange(most).expand(classes, groups, -1) >= counts.view(-1, 1, 1)
        sets = padded.transpose(1, 2).reshape(classes * groups, most, width)
        padding = padding.reshape(classes * groups, most)
        look, pool = self.within
        prototypes = pool(look(sets, padding), padding).view(classes, groups, width)
        return self.across(prototypes.transpose(0, 1)).squeeze(1)

    def pseudo_images(self, inputs: Any) -> torch.Tensor:
        """What stands for the set at the network's input, for kind "input": [pseudo_images, *image_shape]."""
        if isinstance(inputs, list) and all(isinstance(one, torch.Tensor) for one in inputs):
            inputs = torch.cat(inputs)
        if not isinstance(inputs, torch.Tensor) or tuple(inputs.shape[1:]) != self.image_shape:
            raise ArgumentError(f"encoder: kind 'input' takes one tensor of images of shape {self.image_shape}")
        images = inputs.flatten(1).float()
        drawn = self.draw(self.pool(self.look(self.embed(images)[None]))).view(-1, *self.image_shape)
        return drawn.to(inputs.dtype) if inputs.is_floating_point() else drawn
