"""What the engine is shown: frames by the benchmark's rule and a control, in the words that training would use."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_ktr.data.media.preprocess import LoadedMedia, PreprocessSettings
from megatron_ktr.data.media_reader import MediaReader
from megatron_ktr.data.synthetic import corpus
from megatron_ktr.data.template import PromptBuilder, VisualTokens, load_tokenizer
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.data.wording import WordingTemplate
from megatron_ktr.evaluation.asking.outcomes import Outcomes
from megatron_ktr.evaluation.asking.questions import Made, QuestionMaker, QuestionStream
from megatron_ktr.evaluation.item import Condition
from megatron_ktr.evaluation.reading.benchmark_files import named_benchmarks, read_benchmark
from tests.support.evaluations import FakeEngine, run_evaluation, settings_of

NUM_FRAMES = 8
QUESTION = {"problem_type": "multiple choice", "options": ["A. one", "B. two"], "solution": "<answer>A</answer>"}


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Eight frames, each of one brightness, and one more that is as the first."""
    for number in range(NUM_FRAMES):
        Image.fromarray(np.full((56, 56, 3), 20 * number + 10, np.uint8)).save(tmp_path / f"{number}.png")
    return tmp_path


def frames(*numbers: int) -> list[str]:
    return [f"{number}.png" for number in numbers]


def questions_about(folder: Path, *media: dict) -> Path:
    records = [{"problem_id": f"q{n}", "problem": "Which?", **QUESTION, **one} for n, one in enumerate(media)]
    path = folder / "own.json"
    path.write_text(json.dumps(records))
    return path


class CountingReader(MediaReader):
    def __init__(self) -> None:
        super().__init__()
        self.counts_by_name: Counter[str] = Counter()

    def read(self, job, decode=None) -> LoadedMedia:
        self.counts_by_name[job.name] += 1
        return super().read(job)


def made_of(file: Path, *conditions: Condition, reader: MediaReader | None = None, seed: int = 0) -> list[Made]:
    (named,) = named_benchmarks([str(file)], root=None)
    read = read_benchmark(named, media_root=None, wording=None, limit=None, seed=0)
    outcomes = Outcomes(settings_of(read, conditions=conditions, seed=seed), read.items)
    maker = QuestionMaker(
        outcomes.settings,
        key_of=outcomes.key,
        preprocess=PreprocessSettings(),
        media_roots={read.name: read.media_root},
        wordings={read.name: read.wording},
        reader=reader,
    )
    asks = outcomes.known_asks(outcomes.settings.asked, lambda key: None)
    return list(QuestionStream(maker, list(asks.values()), pool=None, num_ahead=1))


def brightness(made: Made) -> list[int]:
    assert made.question is not None
    return [int(frame.float().mean().round()) for frame in made.question.media[0].frames_FCHW]


def test_controls_and_votes_of_an_item_share_one_decoding(pictures):
    reader = CountingReader()
    file = questions_about(pictures, {"video": [frames(*range(8))]}, {"video": [frames(1, 2)]})
    controls = [Condition(8, control) for control in ("intact", "shuffled", "blank", "hidden")]
    made = made_of(file, *controls, Condition(8, scaling="votes:3"), reader=reader)
    assert len(made) == 2 * 7 and len({one.key for one in made}) == 14
    assert sorted(reader.counts_by_name.values()) == [1, 1]
    # An engine decodes questions with the same settings as one batch; what is asked seeds them, and not the model.
    asked = [one.question for one in made if one.question is not None]
    assert len({(question.seed, question.sampling) for question in asked}) == 2, "one answer, and votes"
    assert len({question.identity for question in asked}) == 12, "the first vote draws as the single answer does"
    assert asked[0].identity == f"{asked[0].record['problem_id']} 8 intact 0 0"


def test_each_control_shows_what_it_says(pictures):
    file = questions_about(pictures, {"video": [frames(*range(8))]})
    intact, shuffled, blank, hidden = made_of(
        file, *(Condition(8, control) for control in ("intact", "shuffled", "blank", "hidden"))
    )
    seen = brightness(intact)
    assert seen == [20 * number + 10 for number in range(8)]
    assert brightness(shuffled) != seen and sorted(brightness(shuffled)) == seen
    assert set(brightness(blank)) == {0} and len(brightness(blank)) == 8
    assert hidden.question is not None and hidden.question.media == ()
    parts = [[part["type"] for part in one.question.record["messages"][0]["content"]] for one in (intact, hidden)]
    assert parts == [["video", "text"], ["text"]]
    assert intact.question.record["messages"][0]["content"][1:] == hidden.question.record["messages"][0]["content"]
    assert all(one.is_control_felt for one in (intact, shuffled, blank, hidden))
    again, other = (made_of(file, Condition(8, "shuffled"), seed=seed)[0] for seed in (0, 1))
    assert brightness(again) == brightness(shuffled) != brightness(other)


def test_a_control_that_changes_nothing_is_not_felt(pictures):
    cases = [{"image": "3.png"}, {"video": [frames(1, 2)]}, {"video": [frames(4, 4, 4, 4)]}, {}]
    file = questions_about(pictures, *cases)
    felt = {}
    for made in made_of(file, *(Condition(8, control) for control in ("shuffled", "blank", "hidden"))):
        felt.setdefault(made.ask.condition.control, []).append(made.is_control_felt)
    assert felt == {"shuffled": [False] * 4, "blank": [True] * 3 + [False], "hidden": [True] * 3 + [False]}


def test_what_cannot_be_shown_counts_as_wrong_and_is_listed(pictures):
    (pictures / "broken.png").write_bytes(b"no picture")
    file = questions_about(
        pictures,
        {"video": [frames(*range(8))]},
        {"video": [[*frames(1), "broken.png"]]},
        {"problem": "Which of <image>?", "video": [frames(1, 2)]},
    )
    engine = FakeEngine()
    assert run_evaluation(file, pictures / "out", engine, conditions=[Condition(8)]) == {}
    assert [one.record["problem_id"] for one in engine.asked] == ["own/q0"]
    results = json.loads((pictures / "out" / "results.json").read_text())
    (condition,) = results["benchmarks"]["own"]["conditions"]
    assert [one["item_id"] for one in condition["problems"]] == ["q1", "q2"]
    assert results["complete"] and condition["protocols"]["official"]["num_items"] == 3


def test_frames_are_at_most_those_of_the_condition(pictures):
    file = questions_about(pictures, {"video": [frames(*range(8))], "fps": 2})
    assert [len(brightness(one)) for one in made_of(file, Condition(2), Condition(4), Condition(64))] == [2, 4, 8]


@pytest.fixture(scope="module")
def builder(tmp_path_factory) -> PromptBuilder:
    directory = tmp_path_factory.mktemp("model")
    save_tiny_model(directory, corpus=corpus(), seed=0)
    tokenizer = load_tokenizer(directory)
    return PromptBuilder(
        tokenizer, visual_tokens=VisualTokens.from_model(directory, tokenizer), wording=WordingTemplate("video_r1")
    )


def test_the_prompt_is_the_one_that_training_makes_of_the_record(pictures, builder):
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "First <video> then"}, {"type": "image"}]},
    ]
    file = questions_about(
        pictures,
        {"video": [frames(*range(8))]},
        {"problem": "Is <image> in <video>?", "video": [frames(1, 2)], "image": "3.png"},
        {"video": [frames(1, 2)], "image": "3.png", "system": "Be kind."},
        {"messages": conversation, "video": [frames(1, 2)], "image": "3.png"},
    )
    for made in made_of(file, Condition(8)):
        assert made.question is not None
        media = {medium.kind: medium for medium in made.question.media}
        wanted = builder.build(made.ask.item.record, [media[kind] for kind, _ in made.ask.item.record["media"]])
        found = builder.build(made.question.record, made.question.media)
        assert found.token_ids == wanted.token_ids
        pairs = zip(found.media, wanted.media, strict=True)
        assert all(torch.equal(one.frames_FCHW, other.frames_FCHW) for one, other in pairs)
