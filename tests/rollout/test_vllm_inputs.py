"""Prompts as vLLM's inputs; needs no vLLM."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megatron_ktr.rollout.colocated.inputs import engine_input, folded_token_ids
from tests.support.groups import END, IMAGE, MEDIA, START, VIDEO, group_of, image, video


def test_each_run_of_placeholders_becomes_one_token_in_order():
    prompt = group_of(1, video(num_frames=4), 2, image(), 3, responses=[[5]]).prompt
    assert folded_token_ids(prompt, media=MEDIA) == [1, START, VIDEO, END, 2, START, IMAGE, END, 3]


def test_media_back_to_back_are_told_apart_by_their_lengths():
    prompt = group_of(video(num_frames=4), video(num_frames=2), responses=[[5]]).prompt
    tokens = tuple(token for token in prompt.token_ids if token not in (START, END))
    assert folded_token_ids(dataclasses.replace(prompt, token_ids=tokens), media=MEDIA) == [VIDEO, VIDEO]


@pytest.mark.parametrize("change", [lambda ids: ids[:-2] + ids[-1:], lambda ids: (*ids, VIDEO), lambda ids: (1,)])
def test_placeholders_that_fit_no_medium_are_refused(change):
    prompt = group_of(1, video(num_frames=4), responses=[[5]]).prompt
    with pytest.raises(ValueError, match="'p'"):
        folded_token_ids(dataclasses.replace(prompt, token_ids=change(prompt.token_ids)), media=MEDIA)


def test_frames_and_response_go_over_unchanged():
    prompt = group_of(1, image(), 2, video(num_frames=4), responses=[[5]]).prompt
    request = engine_input(prompt, media=MEDIA, response=[7, VIDEO])
    assert request["prompt_token_ids"][-2:] == [7, VIDEO]
    (frames_FHWC, metadata), (picture,) = request["multi_modal_data"]["video"][0], request["multi_modal_data"]["image"]
    sent = prompt.media[1].frames_FCHW.permute(0, 2, 3, 1).numpy()
    assert frames_FHWC.dtype == np.uint8 and np.array_equal(frames_FHWC, sent)
    assert np.array_equal(np.asarray(picture), prompt.media[0].frames_FCHW[0].permute(1, 2, 0).numpy())
    assert metadata["do_sample_frames"] is False and metadata["frames_indices"] == [0, 1, 2, 3]


def test_text_has_no_media_fields():
    prompt = group_of(1, 2, responses=[[5]]).prompt
    assert engine_input(prompt, media=MEDIA) == {"prompt_token_ids": [1, 2]}


def test_metadata_gives_back_the_seconds_to_the_last_bit_of_fp32():
    rng = np.random.default_rng(0)
    # Where a division that ends one unit off would round to the other fp32: right beside the middle of two of them.
    singles = rng.uniform(0.01, 30, 500).astype(np.float32)
    middles = (singles.astype(np.float64) + np.nextafter(singles, np.float32(np.inf)).astype(np.float64)) / 2
    for seconds in [0.1, 1 / 3, *singles.tolist(), *middles.tolist(), *np.nextafter(middles, 0).tolist()]:
        prompt = group_of(video(num_frames=4, seconds=seconds), responses=[[5]]).prompt
        ((_, metadata),) = engine_input(prompt, media=MEDIA)["multi_modal_data"]["video"]
        # HF's formulas, in its order of operations.
        sampled = len(metadata["frames_indices"]) / metadata["total_num_frames"] * metadata["fps"]
        assert np.float32(2 / sampled) == np.float32(seconds)
