"""The passes of a step: which groups each pass shows, how often it runs, and which media the encoder processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ktr.accounting.work import GroupWork, StepSettings


@dataclass(frozen=True)
class StepPass:
    """One pass of one micro-batch through the pipeline."""

    flops: tuple[str, ...]
    """The names of its passes in ``Flops``: forward's name first, then the names that run in backward."""
    times: float
    """How often a step runs this pass; a fraction for one that not every step runs."""
    groups: tuple[GroupWork, ...]
    """The groups, with the media that this view shows."""
    encoded: tuple[GroupWork, ...] = ()
    """The groups whose media the encoder processes."""
    encodings: float = 0.0
    """Runs of the encoder per run of the pass; below 1 if the features are reused in later updates."""
    num_views: int = 0
    """The number of views whose rows the head processes in this pass; 0: the pass ends with the hidden rows."""
    has_backward: bool = False


def step_passes(groups: Sequence[GroupWork], settings: StepSettings) -> list[StepPass]:
    """The passes of a micro-batch of ``groups``, in which prompts are stored once.

    Runs of the encoder are counted as in ``flops.py``.
    """
    intact = tuple(groups)
    is_once, is_frozen = settings.has_vision_once, settings.is_vision_frozen
    # Distributions are compared in the first pass that computes those of the intact view. Log-probabilities are
    # computed in each view's own pass.
    compared = sum(view.passes for view in settings.views) if settings.compares_distributions else 0
    of_view = 0 if settings.compares_distributions else 1
    # The KL to the reference model is that of the current policy, so every intact pass computes it.
    with_reference = int(settings.compares_reference)
    passes = [
        StepPass(
            ("policy_forward", "policy_recompute", "policy_backward"),
            times=settings.num_updates,
            groups=intact,
            encoded=intact,
            encodings=1 / settings.num_updates if is_once and is_frozen else 1.0,
            num_views=1 + (0 if settings.has_selection else compared) + with_reference,
            has_backward=settings.is_policy_trained,
        ),
        StepPass(
            ("reference",),
            int(settings.has_reference),
            intact,
            intact,
            float(not (is_once and is_frozen)),
            num_views=1 - with_reference,
        ),
        StepPass(
            ("selection",),
            int(settings.has_selection),
            intact,
            intact,
            float(not is_once),
            num_views=1 + compared + with_reference,
        ),
        StepPass(("noise",), settings.noise_passes, intact, intact, _noise_encodings(settings), num_views=1),
    ]
    for view in settings.views:
        encoded = tuple(group.encoded_in(view, has_vision_once=is_once) for group in groups)
        seen = tuple(group.seen_in(view) for group in groups)
        is_encoded = any(group.grids for group in encoded)
        passes.append(StepPass((view.name,), view.passes, seen, encoded, float(is_encoded), of_view))
    return [one for one in passes if one.times]


def _noise_encodings(settings: StepSettings) -> float:
    """Two passes share one run of the encoder; frozen weights share that of the update, too."""
    if not settings.has_vision_once:
        return 1.0
    return 0.0 if settings.is_vision_frozen else 0.5
