"""The options that rewards read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron_ktr.config.reward_section import RewardSection


@dataclass(frozen=True)
class RewardOptions:
    """The section of the rewards, and what follows from other options."""

    section: RewardSection = field(default_factory=RewardSection)
    max_response_length: int = 768
    """The longest response that is sampled, in tokens."""

    @classmethod
    def of_protocol(cls, name: str) -> RewardOptions:
        """The defaults with this ``answer_protocol``."""
        options = cls()
        return replace(options, section=replace(options.section, answer_protocol=name))

    @property
    def overlong(self) -> tuple[int, int]:
        """(L, C): ``overlong_length`` and ``overlong_buffer``, or their defaults."""
        length = self.section.overlong_length or self.max_response_length
        return length, self.section.overlong_buffer or max(1, length // 5)
