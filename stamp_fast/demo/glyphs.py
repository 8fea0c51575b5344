"""Glyphs of the DejaVu fonts in matplotlib as 32x32 gray images: what the demo's network is pretrained on.

Digits are left out, and so is every character that looks like one, so that fine-tuning on digits is a
transfer to classes the network has not seen.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIZE = 32
INK = 26  # the longer side of a glyph's ink, in pixels
DIGITS = "0123456789"

FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSans-BoldOblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSansMono-Oblique.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "DejaVuSansMono-BoldOblique.ttf",
    "DejaVuSerif-BoldItalic.ttf",
)
HELD_OUT_FONTS = FONTS[-2:]
TRAIN_FONTS = FONTS[:-2]

# Blocks in the order in which classes are taken from them: scripts first, then signs.
BLOCKS = (
    (0x0021, 0x007E),  # Latin and ASCII signs
    (0x0391, 0x03FF),  # Greek
    (0x0400, 0x04FF),  # Cyrillic
    (0x2190, 0x21FF),  # arrows
    (0x2200, 0x22FF),  # mathematical operators
    (0x0531, 0x058F),  # Armenian
    (0x10D0, 0x10FF),  # Georgian
    (0x00A1, 0x024F),  # further Latin
    (0x0250, 0x02AF),  # phonetic
    (0x25A0, 0x26FF),  # shapes and symbols
)


def font_path(font: str) -> Path:
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / font


def render(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """One glyph, its ink scaled to fit and centred, as (32, 32) uint8; all zeros if the glyph has no ink."""
    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (max(right - left, 1) + 8, max(bottom - top, 1) + 8))
    ImageDraw.Draw(canvas).text((4 - left, 4 - top), character, fill=255, font=font)
    box = canvas.getbbox()
    image = np.zeros((SIZE, SIZE), np.uint8)
    if box is None:
        return image
    ink = canvas.crop(box)
    scale = INK / max(ink.size)
    width, height = (max(round(side * scale), 1) for side in ink.size)
    x, y = (SIZE - width) // 2, (SIZE - height) // 2
    image[y : y + height, x : x + width] = np.asarray(ink.resize((width, height), Image.Resampling.BOX))
    return image


def render_all(characters: Sequence[str], fonts: Sequence[str] = FONTS) -> Tensor:
    """Every character in every font, as (characters, fonts, 32, 32) uint8."""
    images = np.zeros((len(characters), len(fonts), SIZE, SIZE), np.uint8)
    for j, name in enumerate(fonts):
        font = ImageFont.truetype(font_path(name), 64, layout_engine=ImageFont.Layout.BASIC)
        for i, character in enumerate(characters):
            images[i, j] = render(character, font)
    return torch.from_numpy(images)


def candidates(fonts: Sequence[str] = FONTS) -> Iterator[str]:
    """Letters and signs that every font has, without accents, none that stands for a number."""
    covered = set.intersection(*(set(FT2Font(str(font_path(font))).get_charmap()) for font in fonts))
    for first, last in BLOCKS:
        for code in range(first, last + 1):
            character = chr(code)
            is_sign = unicodedata.category(character)[0] in "LSP"
            if code in covered and is_sign and not unicodedata.decomposition(character):
                yield character


def choose_classes(count: int, min_distance: float = 0.08, digit_distance: float = 0.1) -> str:
    """The first `count` candidates that look like no digit and like no earlier class.

    Two characters look alike if their images differ by less than a threshold, the mean absolute difference
    over all fonts and pixels on a scale of 0 to 1.

    Args:
        count: How many classes.
        min_distance: The threshold between classes.
        digit_distance: The threshold to any digit.
    """
    digits = render_all(DIGITS).flatten(1).float() / 255
    characters = list(candidates())
    images = render_all(characters).flatten(1).float() / 255
    chosen: list[int] = []
    for index, image in enumerate(images):
        if (digits - image).abs().mean(1).min() < digit_distance:
            continue
        if chosen and (images[chosen] - image).abs().mean(1).min() < min_distance:
            continue
        chosen.append(index)
        if len(chosen) == count:
            return "".join(characters[i] for i in chosen)
    raise ValueError(f"choose_classes: wanted {count} classes, the fonts have {len(chosen)} distinct ones")


def augment(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Random pose, stroke thickness, sharpness, contrast and noise, drawn per image.

    Args:
        images: (N, 1, 32, 32) float in [0, 1].
        generator: Source of all randomness.

    Returns:
        Images of the same shape and range.
    """
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    # Thickness: blend with the dilated or the eroded image.
    amount = uniform(-0.6, 0.9).view(n, 1, 1, 1)
    thick = F.max_pool2d(images, 3, 1, 1)
    thin = -F.max_pool2d(-images, 3, 1, 1)
    images = images.lerp(torch.where(amount > 0, thick, thin), amount.abs())

    # Pose: the matrix maps output to input coordinates, so a factor above 1 makes the glyph smaller.
    angle, shear = uniform(-0.2, 0.2), uniform(-0.25, 0.25)
    cos, sin = angle.cos(), angle.sin()
    width, height = uniform(0.85, 1.3), uniform(0.85, 1.3)
    rows = (
        torch.stack([cos * width, (shear - sin) * width, uniform(-0.15, 0.15)], 1),
        torch.stack([sin * height, cos * height, uniform(-0.15, 0.15)], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)

    # Sharpness: a third of the images go through a coarser raster, as scanned or small pictures do.
    level = uniform(0, 1).view(n, 1, 1, 1)
    for side, low, high in ((8, 0.0, 0.15), (12, 0.15, 0.35)):
        coarse = F.adaptive_avg_pool2d(images, side)
        coarse = F.interpolate(coarse, SIZE, mode="bilinear", align_corners=False)
        images = torch.where((level >= low) & (level < high), coarse, images)

    contrast = uniform(0.6, 1.2).view(n, 1, 1, 1)
    offset = uniform(0.0, 0.15).view(n, 1, 1, 1)
    strength = uniform(0.0, 0.1).view(n, 1, 1, 1)
    noise = torch.randn(images.shape, generator=generator) * strength
    return (images * contrast + offset + noise).clamp(0, 1)


def held_out(classes: str, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Every class in the held-out fonts, augmented once: images (N, 1, 32, 32) in [0, 1] and targets (N,)."""
    images = render_all(classes, HELD_OUT_FONTS).flatten(0, 1).unsqueeze(1).float() / 255
    targets = torch.arange(len(classes)).repeat_interleave(len(HELD_OUT_FONTS))
    return augment(images, torch.Generator().manual_seed(seed)), targets


def posed(characters: str, copies: int) -> tuple[Tensor, Tensor]:
    """Every character in every training font, `copies` random poses of each, always the same.

    Returns:
        Images (N, 1, 32, 32) in [0, 1], and labels, positions in `characters`.
    """
    rendered = render_all(characters, TRAIN_FONTS)
    labels = torch.arange(len(rendered)).repeat_interleave(rendered.shape[1]).repeat(copies)
    plain = rendered.flatten(0, 1).unsqueeze(1).float().div(255).repeat(copies, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    return torch.cat([augment(part, generator) for part in plain.split(1000)]), labels
