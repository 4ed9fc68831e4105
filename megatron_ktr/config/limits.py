"""Upper limits of numbers that several options share. An option names its own where it is declared.

Each lies far above what a run on thousands of GPUs uses. A value beyond is a slip of the keyboard: it would be refused
much later, by a library that says less, or wait for ever.
"""

from __future__ import annotations

MOST_STEPS = 100_000_000
"""Also of intervals between steps. A run of one step a second takes three years for them."""
MOST_PROMPTS = 1_000_000
"""Of a step."""
MOST_RESPONSES = 100_000
"""Of a prompt."""
MOST_TOKENS = 100_000_000
"""Of one sequence, and whatever counts tokens of one."""
MOST_SAMPLES = MOST_PIXELS = LARGEST_INTEGER = 2**31 - 1
"""The largest number of 32 bits."""
MOST_FRAMES = 100_000
MOST_LAYERS = 10_000
MOST_GPUS = 1_000_000
MOST_GB = 1e9
"""10^18 bytes."""
MOST_SECONDS = 31 * 24 * 3600
MOST_MINUTES = MOST_SECONDS // 60
"""A month: nobody waits longer."""
MOST_TRIES = 10_000
MOST_WEIGHT = 1e6
"""Of factors and weights, of temperatures, and of rewards and what they are compared with."""
MOST_THRESHOLD = 1e12
"""Of thresholds: one that is never reached is a way to switch something off."""
