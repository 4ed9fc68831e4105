"""Computes the size to which a picture is resized, by the rule of qwen-vl-utils.

The size consists of whole visual tokens, about keeps the picture's aspect ratio, and has an area between two limits.
These are pure functions of numbers, without files, options or tensors.
"""

from __future__ import annotations

import math

MAX_ASPECT_RATIO = 200


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: float) -> tuple[int, int]:
    """(height, width) in multiples of ``factor`` with an area near [min_pixels, max_pixels]; qwen-vl-utils' rule.

    First each side is rounded to a multiple of ``factor``, at least one. If the area is then too large (small), both
    original sides are divided (multiplied) by the square root of the excess and rounded down (up). By rounding the area
    may still be below the minimum (640 x 360 with limits 100,352 and 105,369 becomes 420 x 224) or above the maximum
    (100 x 100 becomes 336 x 336).

    If a picture is so long that its short side would be rounded down to 0, this side gets one token and the other at
    most max_pixels / factor pixels. qwen-vl-utils would give it no pixels, Hugging Face more than max_pixels. Hugging
    Face does not round short sides up first: 10 x 1000 pixels become 28 x 560 there, 28 x 1008 here.

    Raises:
        ValueError: one side is more than 200 times as long as the other, or the picture is empty.
    """
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"{width} x {height} pixels: sides may differ at most {MAX_ASPECT_RATIO}-fold")
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = math.floor(height / shrink / factor) * factor
        new_width = math.floor(width / shrink / factor) * factor
        if not new_height or not new_width:
            longest = max(1, int(max_pixels // factor**2)) * factor
            new_height = min(max(new_height, factor), longest)
            new_width = min(max(new_width, factor), longest)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def most_tokens(*, factor: int, min_pixels: int, max_pixels: float) -> int:
    """An upper bound of the number of tokens (squares of ``factor``) that ``smart_resize`` gives with these limits.

    It is max_pixels in tokens, or the size to which small long pictures are enlarged, if that is more. These have sides
    a <= b with a b = min_pixels, which become i and j tokens; then b is at most min_pixels / ((i - 1) factor) and at
    most sqrt(200 min_pixels). Example: with limits 100,352 and 105,369 pixels (134 tokens), 10 x 1271 pixels become
    56 x 3584, which is 256 tokens.
    """
    most = int(max_pixels // factor**2)
    if min_pixels <= factor**2:  # every picture has one token, so none is enlarged
        return most
    longest = math.sqrt(MAX_ASPECT_RATIO * min_pixels)
    for short in range(1, math.ceil(math.sqrt(min_pixels) / factor) + 1):
        side = min(longest, min_pixels / ((short - 1) * factor)) if short > 1 else longest
        most = max(most, short * math.ceil(side / factor))
    return most
