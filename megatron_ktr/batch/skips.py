"""Why an update with a gradient may take no optimizer step, and how many in a row have taken none.

=============  ==================================================================================  ==================
reason         what was found                                                                      counts in a row
=============  ==================================================================================  ==================
log_prob       the trainer's log-prob of a response token is NaN or infinite                       yes
loss           the loss is NaN or infinite, and the objective does not explain it                  yes
gradient       the norm of the gradient is NaN or infinite; with the loss scale of fp16: at the    yes
               smallest scale
loss_scale     the gradient overflowed under the loss scale of fp16, which becomes smaller         no, it is how the
                                                                                                   scale is found
objective      the loss is not finite for a reason that the objective knows                        no
               (``Objective.reason_to_skip``)
threshold      the norm is above ``grad_norm_skip_threshold``                                      no, it was asked for
=============  ==================================================================================  ==================

Every rank finds the same reason, so that all of them skip together. Weights, optimizer and schedule then keep every
bit; the loss scale alone may change. Metrics: ``skipped_updates`` and ``skipped_updates/<reason>`` of a step, and
``skipped_in_a_row``, the updates in a row that the last column counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from megatron_ktr.batch.micro_batch import UpdateResult

SkipReason = Literal["log_prob", "loss", "gradient", "loss_scale", "objective", "threshold"]
NOT_FINITE: frozenset[SkipReason] = frozenset({"log_prob", "loss", "gradient"})
"""The reasons that count in a row. No option and no algorithm asks for these skips."""
IN_A_ROW = "skipped_in_a_row"


class SkipStreak:
    """Counts the updates in a row that were skipped for one of ``NOT_FINITE``. An update that steps ends the row;
    one that has nothing to learn, or is skipped for another reason, leaves it as it is."""

    def __init__(self) -> None:
        self.length = 0

    def add(self, results: Sequence[UpdateResult]) -> dict[str, float]:
        """Takes the updates of a step, in order; returns the step's metrics about skips.

        ``skipped_in_a_row`` is there only if an update was skipped for one of ``NOT_FINITE``. It is the longest row
        that reaches into the step, since a later update of the same step may end the row.
        """
        counts = {"skipped_updates": float(sum(result.is_skipped for result in results))}
        longest = 0
        for result in results:
            if result.has_stepped:
                self.length = 0
            elif result.skip_reason in NOT_FINITE:
                self.length += 1
                longest = max(longest, self.length)
            if result.is_skipped and result.skip_reason is not None:
                name = f"skipped_updates/{result.skip_reason}"
                counts[name] = counts.get(name, 0.0) + 1
        return counts | ({IN_A_ROW: float(longest)} if longest else {})
