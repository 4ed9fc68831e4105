"""M-RoPE positions against a hand-worked example, vLLM's own function, and Hugging Face where the two rules agree."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_ktr.errors import UserError
from models.qwen2_5_vl.config import Qwen2_5_VLConfig
from models.qwen2_5_vl.mrope import mrope_positions
from tests.support.tiny import IMAGE_TOKEN_ID, VIDEO_TOKEN_ID, VISION_END_ID, VISION_START_ID, tiny_hf_config

CONFIG = Qwen2_5_VLConfig.from_hf(tiny_hf_config(tokens_per_second=2).to_dict())

Medium = tuple[str, tuple[int, int, int], float]


def build_prompt(media: list[Medium], *, text_lengths: list[int], markers: bool = True) -> list[int]:
    """Text, medium, text, medium, ..., text with ``len(text_lengths) == len(media) + 1``."""
    tokens = list(range(text_lengths[0]))
    for (kind, (t, h, w), _), length in zip(media, text_lengths[1:], strict=True):
        placeholder = IMAGE_TOKEN_ID if kind == "image" else VIDEO_TOKEN_ID
        run = [placeholder] * (t * h * w // 4)
        tokens += [VISION_START_ID, *run, VISION_END_ID] if markers else run
        tokens += range(length)
    return tokens


def positions_of(tokens: list[int], media: list[Medium], config: Qwen2_5_VLConfig = CONFIG):
    kinds, grids, seconds = zip(*media, strict=True) if media else ((), (), ())
    return mrope_positions(tokens, kinds=kinds, grid_thw=grids, seconds_per_grid=seconds, config=config)


def random_media(rng: random.Random) -> list[Medium]:
    media: list[Medium] = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(["image", "video"])
        frames = 1 if kind == "image" else rng.randint(1, 9)
        grid = (frames, 2 * rng.randint(1, 5), 2 * rng.randint(1, 5))
        # Seconds such as 0.1 and 1/3 put products next to integers, where a wrong rounding shows.
        media.append((kind, grid, 0.0 if kind == "image" else rng.choice([0.1, 1 / 3, 0.5, 0.7, 1.0, 1.15, 4.0])))
    return media


def test_hand_worked_video_longer_than_it_is_wide() -> None:
    """Two text tokens, a video of 3 x 1 x 2 tokens one second apart at 2 positions a second, one text token.

    The video's time positions are 2 + (0, 2, 4), its largest position is 6, so that the text continues at 7.
    The other rule (start + max(h, w)) would continue at 4, inside the video's span.
    """
    tokens = [1, 2, *[VIDEO_TOKEN_ID] * 6, 3]
    positions, next_position = positions_of(tokens, [("video", (3, 2, 4), 1.0)])
    assert positions.tolist() == [
        [0, 1, 2, 2, 4, 4, 6, 6, 7],
        [0, 1, 2, 2, 2, 2, 2, 2, 7],
        [0, 1, 2, 3, 2, 3, 2, 3, 7],
    ]
    assert positions.dtype == torch.int64
    assert next_position == 8


def test_hand_worked_image_wider_than_high() -> None:
    tokens = [1, *[IMAGE_TOKEN_ID] * 6, 2, 3]
    positions, next_position = positions_of(tokens, [("image", (1, 4, 6), 0.0)])
    assert positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5],
        [0, 1, 1, 1, 2, 2, 2, 4, 5],
        [0, 1, 2, 3, 1, 2, 3, 4, 5],
    ]
    assert next_position == 6


def test_text_only_counts_up_on_all_axes() -> None:
    positions, next_position = positions_of([5, 6, 7], [])
    assert positions.tolist() == [[0, 1, 2]] * 3
    assert next_position == 3
    assert positions_of([], [])[1] == 0


def test_two_media_back_to_back_and_at_the_ends() -> None:
    media = [("image", (1, 2, 2), 0.0), ("image", (1, 2, 4), 0.0), ("video", (2, 2, 2), 0.5)]
    tokens = build_prompt(media, text_lengths=[0, 0, 0, 0], markers=False)
    positions, next_position = positions_of(tokens, media)
    assert positions.tolist() == [[0, 1, 1, 3, 4], [0, 1, 1, 3, 3], [0, 1, 2, 3, 3]]
    assert next_position == 5


def test_time_index_is_the_floor_of_fp32_seconds_in_fp64() -> None:
    """0.35 s in fp32 is 0.3499999940; 10 * 0.35 * 2 is thus just under 7 and floors to 6 (fp64 seconds: 7)."""
    media = [("video", (11, 2, 2), 0.35)]
    positions, _ = positions_of([VIDEO_TOKEN_ID] * 11, media)
    assert positions[0].tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert int(10 * 0.35 * 2) == 7


def test_equals_hugging_face_where_a_medium_is_not_longer_than_wide() -> None:
    """transformers 5.19 continues after max(h, w); the same as long as the temporal extent is smaller."""
    from transformers import Qwen2_5_VLForConditionalGeneration as HFModel

    hf = HFModel(tiny_hf_config(num_layers=1, vision_depth=1, fullatt_block_indexes=()))
    media: list[Medium] = [("video", (3, 8, 10), 0.5), ("image", (1, 6, 4), 0.0)]
    tokens = build_prompt(media, text_lengths=[3, 2, 4])
    ids = torch.tensor([tokens])
    expected, delta = hf.model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == IMAGE_TOKEN_ID).long() + 2 * (ids == VIDEO_TOKEN_ID).long(),
        image_grid_thw=torch.tensor([media[1][1]]),
        video_grid_thw=torch.tensor([media[0][1]]),
        second_per_grid_ts=torch.tensor([media[0][2]]),
        attention_mask=torch.ones_like(ids),
    )
    positions, next_position = positions_of(tokens, media)
    assert torch.equal(positions, expected[:, 0])
    assert next_position == len(tokens) + delta.item()


def test_naive_restatement_agrees_on_random_prompts() -> None:
    """Token by token, straight from the rule; guards the batched arithmetic."""
    rng = random.Random(0)
    for _ in range(50):
        media = random_media(rng)
        tokens = build_prompt(media, text_lengths=[rng.randint(0, 4) for _ in range(len(media) + 1)])
        expected: list[tuple[int, int, int]] = []
        queue = iter(media)
        row = 0
        while row < len(tokens):
            start = max(map(max, expected)) + 1 if expected else 0
            if tokens[row] in (IMAGE_TOKEN_ID, VIDEO_TOKEN_ID):
                kind, (t, h, w), seconds = next(queue)
                interval = float(np.float32(seconds)) * 2 if kind == "video" else 0
                for i, j, k in itertools.product(range(t), range(h // 2), range(w // 2)):
                    expected.append((start + int(i * interval), start + j, start + k))
                row += t * h * w // 4
            else:
                expected.append((start, start, start))
                row += 1
        positions, next_position = positions_of(tokens, media)
        assert positions.T.tolist() == [list(triple) for triple in expected]
        assert next_position == max(map(max, expected)) + 1


@pytest.mark.parametrize(
    ("tokens", "media", "message"),
    [
        ([VIDEO_TOKEN_ID] * 3, [("video", (2, 2, 4), 1.0)], "needs 4 consecutive tokens"),
        ([VIDEO_TOKEN_ID] * 2 + [1] + [VIDEO_TOKEN_ID] * 2, [("video", (2, 2, 4), 1.0)], "found 3"),
        ([IMAGE_TOKEN_ID] * 4, [("video", (2, 2, 4), 1.0)], "found 0"),
        ([VIDEO_TOKEN_ID] * 5, [("video", (2, 2, 4), 1.0)], "1 visual tokens more"),
        ([1, 2], [("image", (1, 2, 2), 0.0)], "needs 1 consecutive"),
        ([IMAGE_TOKEN_ID], [("image", (1, 3, 2), 0.0)], "multiples of 2"),
        ([IMAGE_TOKEN_ID] * 2, [("image", (2, 2, 2), 0.0)], "one temporal patch"),
        ([VIDEO_TOKEN_ID] * 2, [("video", (2, 2, 2), 0.0)], "seconds_per_grid > 0"),
        ([VIDEO_TOKEN_ID], [("audio", (1, 2, 2), 1.0)], "'audio'"),
    ],
)
def test_prompt_and_media_that_disagree_are_user_errors(tokens, media, message) -> None:
    with pytest.raises(UserError, match=message):
        positions_of(tokens, media)


def test_lists_of_different_length_are_user_errors() -> None:
    with pytest.raises(UserError, match="1 grids, 0 kinds"):
        mrope_positions([1], grid_thw=[(1, 2, 2)], kinds=[], seconds_per_grid=[], config=CONFIG)


@pytest.mark.vllm
def test_equals_vllms_own_function() -> None:
    """The sampler's positions, bit for bit, without starting an engine: its method needs only the configuration."""
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as VLLMModel

    def feature(medium: Medium, offset: int) -> SimpleNamespace:
        kind, grid, seconds = medium
        data = {f"{kind}_grid_thw": SimpleNamespace(data=torch.tensor(grid))}
        if kind == "video":
            data["second_per_grid_ts"] = SimpleNamespace(data=torch.tensor(seconds))
        return SimpleNamespace(modality=kind, data=data, mm_position=SimpleNamespace(offset=offset))

    rng = random.Random(1)
    for tokens_per_second in (1, 2, 4, 25):
        hf_config = tiny_hf_config(tokens_per_second=tokens_per_second)
        model = SimpleNamespace(config=hf_config)
        model.iter_mm_grid_thw = lambda features, model=model: VLLMModel.iter_mm_grid_thw(model, features)
        config = Qwen2_5_VLConfig.from_hf(hf_config.to_dict())
        for _ in range(50):
            media = random_media(rng)
            tokens = build_prompt(media, text_lengths=[rng.randint(1, 4) for _ in range(len(media) + 1)])
            starts = [row + 1 for row, token in enumerate(tokens) if token == VISION_START_ID]
            features = [feature(medium, start) for medium, start in zip(media, starts, strict=True)]
            expected, delta = VLLMModel.get_mrope_input_positions(model, tokens, features)
            positions, next_position = positions_of(tokens, media, config)
            assert torch.equal(positions, expected)
            assert next_position == len(tokens) + delta
