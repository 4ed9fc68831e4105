"""Rules between the options of counterfactual views, and of scores that rounding explains.

They hold for every objective that selects tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_ktr.config.given import flag, is_given
from megatron_ktr.config.view_registry import load_view, temporal_views, visual_views

if TYPE_CHECKING:
    from megatron_ktr.config.objective_section import ObjectiveSection


def view_problems(section: ObjectiveSection) -> Iterator[str]:
    """One sentence for each rule that the options break."""
    chosen = [load_view(section.visual_view), load_view(section.temporal_view)]
    read = {name for view in chosen for name in view.own_options}
    others = {name: view for view in (*visual_views(), *temporal_views()) for name in load_view(view).own_options}
    for name in sorted(others.keys() - read):
        if is_given(section, name, objective=section.objective):
            yield (
                f"{flag(name)} is not read with --visual-view {section.visual_view} and --temporal-view "
                f"{section.temporal_view}: add --{_kind(others[name])}-view {others[name]}"
            )
    if section.num_shuffles > 1 and not any(view.is_random for view in chosen):
        yield (
            f"--num-shuffles {section.num_shuffles} has nothing to average: neither --visual-view "
            f"{section.visual_view} nor --temporal-view {section.temporal_view} is random"
        )
    if not section.min_shift:
        return
    if section.min_shift == "auto" and not section.noise_every:
        yield "--min-shift auto needs --noise-every, the steps between two measurements of the noise (20, for instance)"
    if section.combine == "weighted" or section.token_weights != "hard":
        yield (
            f"--min-shift {section.min_shift} needs signals that each select tokens of their own: it is not read with "
            "--combine weighted, nor with other --token-weights than hard"
        )


def _kind(view: str) -> str:
    return "temporal" if view in temporal_views() else "visual"
