"""What size a picture gets: whole visual tokens, about its own shape, an area between two limits; qwen-vl-utils' rule.

Nothing here knows files, options or tensors.
"""

from __future__ import annotations

import math

MAX_ASPECT_RATIO = 200


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: float) -> tuple[int, int]:
    """(height, width) in multiples of ``factor`` with an area near [min_pixels, max_pixels]; qwen-vl-utils' rule.

    Round each side, to ``factor`` at least; if the area is then too large (small), scale both true sides by the square
    root of the excess and round down (up). Rounding may leave the area below the minimum (640 x 360 at 100,352 to
    105,369 pixels: 420 x 224) or above the maximum (100 x 100: 336 x 336).

    A picture so long that its short side would round down to 0 gets one token there and at most max_pixels / factor on
    the other side; qwen-vl-utils gives it no pixels, HF more than max_pixels. HF does not round short sides up first:
    10 x 1000 pixels become 28 x 560 there, 28 x 1008 here.

    Raises:
        ValueError: one side more than 200 times the other, or empty.
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
    """No result of ``smart_resize`` with these limits has more tokens (squares of ``factor``) than this.

    max_pixels in tokens, or what small and long pictures are enlarged to where that is more: sides a <= b with
    a b = min_pixels become i and j tokens, and b is at most min_pixels / ((i - 1) factor) and sqrt(200 min_pixels).
    Example: at 100,352 to 105,369 pixels (134 tokens) 10 x 1271 pixels become 56 x 3584, 256 tokens.
    """
    most = int(max_pixels // factor**2)
    if min_pixels <= factor**2:  # what every picture has
        return most
    longest = math.sqrt(MAX_ASPECT_RATIO * min_pixels)
    for short in range(1, math.ceil(math.sqrt(min_pixels) / factor) + 1):
        side = min(longest, min_pixels / ((short - 1) * factor)) if short > 1 else longest
        most = max(most, short * math.ceil(side / factor))
    return most
