"""How many answers a question gets, with how many frames, and which of them counts.

single           one answer, as the benchmark samples it
votes:N          N answers at one temperature (``Voting``), then the majority: self-consistency, Wang et al. 2022
sparse_to_dense  Video-RTS (``src/video_rts_eval.py``): rounds of 5 answers with n = 32, 64, 128 frames, and the
                 majority of the last round. Answer k = 0..4 has temperature 0.8 + 0.15 k and top-p
                 min(0.95, 0.7 + 0.05 k). A round is the last if its answers agree or 2 n exceeds the most frames: 64
                 for mmvu and video_mmmu, else 128.

The majority is taken for each protocol by itself, over the answers that the protocol reads: so every column of verdicts
is what its protocol would have said. Of answers with equally many votes the one that was given first wins. A response
in which the protocol finds no answer does not vote; if none votes, the verdict is that on the first response. Whether
the answers of a round agree is decided by the protocol ``lenient``: all five must be readable and equal.

Deviations from Video-RTS, which
1. puts "Sample run k:" before the chat's first token, drops top-k and penalties by version, and ends responses at
   "</answer>": ours are asked the question as it is, with neutral settings;
2. lets "No answer found" and failed runs vote like answers;
3. leaves out items whose video has fewer frames than the round asks for or cannot be decoded, so that they are missing
   in the denominator: ours are shown the frames that there are, and what cannot be decoded counts as wrong.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_ktr.evaluation.benchmark import FrameRule
from megatron_ktr.evaluation.engines.base import AnswerSampling
from megatron_ktr.evaluation.item import Answer, Condition, Item, Outcome, Verdict

SPARSE_TO_DENSE = "sparse_to_dense"
FIRST_FRAMES = 32
MOST_FRAMES = 128
MOST_FRAMES_OF: Mapping[str, int] = {"mmvu": 64, "video_mmmu": 64}
NUM_RUNS = 5
DECIDING_PROTOCOL = "lenient"
MOST_VOTES = 1000


@dataclass(frozen=True)
class Voting:
    """How the answers of ``votes:N`` are sampled. The benchmark's own settings are often nearly greedy, and then all
    votes are one."""

    temperature: float = 0.7
    top_p: float = 1.0


@dataclass(frozen=True)
class Ask:
    """One question that is put to the model."""

    item: Item
    condition: Condition
    round: int = 0
    vote: int = 0

    @property
    def is_only_one(self) -> bool:
        return self.condition.scaling == "single"


Judge = Callable[[Item, str], Mapping[str, Verdict]]
"""The verdicts of every protocol on a response."""


def votes_of(condition: Condition) -> int:
    """The number of answers of one round."""
    if condition.scaling == SPARSE_TO_DENSE:
        return NUM_RUNS
    return 1 if condition.scaling == "single" else int(condition.scaling.removeprefix("votes:"))


def frames_of(ask: Ask) -> int:
    """The most frames that the question shows of a video.

    >>> item = Item("mmvu", "1", {})
    >>> [frames_of(Ask(item, Condition(128, scaling="sparse_to_dense"), round=r)) for r in (0, 1)]
    [32, 64]
    """
    if ask.condition.scaling != SPARSE_TO_DENSE:
        return ask.condition.frames
    return round_frames(ask.item.benchmark, ask.condition.frames)[ask.round]


def round_frames(benchmark: str, most: int) -> list[int]:
    """Frames of each round of sparse_to_dense; ``most`` lowers the benchmark's own limit.

    >>> round_frames("video_holmes", 128), round_frames("mmvu", 128), round_frames("mmvu", 8)
    ([32, 64, 128], [32, 64], [8])
    """
    most = min(most, MOST_FRAMES_OF.get(benchmark, MOST_FRAMES))
    frames = [min(FIRST_FRAMES, most)]
    while 2 * frames[-1] <= most:
        frames.append(2 * frames[-1])
    return frames


def rule_of(ask: Ask, rule: FrameRule) -> FrameRule:
    """Video-RTS asks for a number of frames, not for a rate."""
    return dataclasses.replace(rule, rule="fixed") if ask.condition.scaling == SPARSE_TO_DENSE else rule


def sampling_of(ask: Ask, sampling: AnswerSampling, voting: Voting) -> AnswerSampling:
    """The benchmark's ``sampling`` with what the scaling changes of it."""
    if ask.is_only_one:
        return sampling
    temperature, top_p = voting.temperature, voting.top_p
    if ask.condition.scaling == SPARSE_TO_DENSE:
        # Rounded, so that a setting and its digest do not hang on the last bit of a sum.
        temperature, top_p = round(0.8 + 0.15 * ask.vote, 4), round(min(0.95, 0.7 + 0.05 * ask.vote), 4)
    return dataclasses.replace(sampling, temperature=temperature, top_p=top_p)


def known_rounds(
    item: Item, condition: Condition, *, answer_to: Callable[[Ask], Answer | None], judge: Judge
) -> list[list[Ask]]:
    """The questions of each round of which it is known that it is needed: the first, and every other as soon as the
    one before it is answered and does not agree."""
    num_rounds = 1
    if condition.scaling == SPARSE_TO_DENSE:
        num_rounds = len(round_frames(item.benchmark, condition.frames))
    rounds: list[list[Ask]] = []
    for number in range(num_rounds):
        rounds.append([Ask(item, condition, round=number, vote=vote) for vote in range(votes_of(condition))])
        if number + 1 == num_rounds:
            break
        answers = [answer_to(ask) for ask in rounds[-1]]
        if any(answer is None or answer.problem for answer in answers):
            break
        readings = {judge(item, answer.text)[DECIDING_PROTOCOL].answer for answer in answers if answer is not None}
        if len(readings) == 1 and None not in readings:
            break
    return rounds


def outcome_of(
    item: Item,
    condition: Condition,
    *,
    answer_to: Callable[[Ask], Answer | None],
    judge: Judge,
    has_format: Callable[[str], bool],
) -> Outcome | None:
    """What came of an item; None while answers are missing. Answers of earlier rounds are kept for their cost."""
    rounds = known_rounds(item, condition, answer_to=answer_to, judge=judge)
    given = [[answer for ask in asks if (answer := answer_to(ask)) is not None] for asks in rounds]
    if any(len(answers) < len(asks) for asks, answers in zip(rounds, given, strict=True)):
        return None
    answers = tuple(answer for of_round in given for answer in of_round)
    if any(answer.problem for answer in answers):
        wrong = {name: Verdict(0.0, None) for name in judge(item, "")}
        return Outcome(item, condition, answers, text="", verdicts=wrong, has_format=False)
    judged = [(answer.text, judge(item, answer.text)) for answer in given[-1]]
    chosen = {name: _majority([verdicts[name] for _, verdicts in judged]) for name in judged[0][1]}
    text = judged[chosen.get(DECIDING_PROTOCOL, 0)][0]
    verdicts = {name: judged[place][1][name] for name, place in chosen.items()}
    return Outcome(item, condition, answers, text=text, verdicts=verdicts, has_format=has_format(text))


def _majority(verdicts: Sequence[Verdict]) -> int:
    """The place of the first verdict with the answer that has most votes."""
    readings = [verdict.answer for verdict in verdicts]
    votes = Counter(reading for reading in readings if reading is not None)
    if not votes:
        return 0
    # Counter keeps the order of the first occurrence, and most_common is stable.
    return readings.index(votes.most_common(1)[0][0])
