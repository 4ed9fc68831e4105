"""Packing: the invariants of the module header, hand-worked layouts, refusals."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from megatron_ktr.batch.packing import pack_groups, plan_micro_batches, with_media
from megatron_ktr.errors import UserError
from megatron_ktr.types import Prompt, Rollout, RolloutGroup
from tests.support.groups import END, IMAGE, MEDIA, START, VIDEO, group_of, image, video
from tests.support.views import shown_by

VIEWS = ("intact", "hidden", "shuffled", "reversed")


def random_groups(seed):
    source = random.Random(seed)

    def text(length):
        return [source.randrange(90) for _ in range(length)]

    groups = []
    for index in range(source.randint(1, 3)):
        parts = text(source.randint(1, 3))
        for _ in range(source.randint(0, 3)):
            parts.append(source.choice([video(source.randint(1, 6), 4, 2), image(4, 4)]))
            parts += text(source.randint(0, 2))
        # A sampler may emit a placeholder id; in a response it is text.
        responses = [text(source.randint(0, 4)) + [source.choice([VIDEO, 7])] for _ in range(source.randint(1, 4))]
        groups.append(group_of(*parts, responses=responses, problem_id=str(index)))
    return groups


def test_layout_worked_by_hand():
    groups = [
        group_of(5, video(4, 2, 4, seconds=3.0), 6, responses=[[10, 11], [12, 13, 14]]),
        group_of(7, responses=[[15]]),
    ]
    batch = pack_groups(groups, view="intact", media=MEDIA, pad_to_multiple=4)
    visual = [VIDEO] * 4
    assert batch.token_ids_T.tolist() == [5, START, *visual, END, 6, 10, 11, 12, 13, 14, 7, 15, 0]
    assert [(span.start, span.prompt_length, span.response_lengths) for span in batch.layout.groups] == [
        (0, 8, (2, 3)),
        (13, 1, (1,)),
    ]
    assert batch.layout.num_padding == 1
    assert batch.predicting_rows_R.tolist() == [7, 8, 7, 10, 11, 13]
    assert batch.target_ids_R.tolist() == [10, 11, 12, 13, 14, 15]
    assert batch.response_R.tolist() == [0, 0, 1, 1, 1, 2]
    assert batch.group_R.tolist() == [0, 0, 0, 0, 0, 1]
    assert batch.visual_rows.tolist() == [2, 3, 4, 5]
    # The second temporal patch is 3 s later, further than the frame is wide: text continues after it.
    assert batch.position_ids_3T.tolist() == [
        [0, 1, 2, 2, 5, 5, 6, 7, 8, 9, 8, 9, 10, 0, 1, 0],
        [0, 1, 2, 2, 2, 2, 6, 7, 8, 9, 8, 9, 10, 0, 1, 0],
        [0, 1, 2, 3, 2, 3, 6, 7, 8, 9, 8, 9, 10, 0, 1, 0],
    ]
    assert batch.patches_SD.tolist() == [[1.0, 2.0]] * 8 + [[3.0, 4.0]] * 8
    assert batch.grid_thw_M3.tolist() == [[2, 2, 4]]


def test_hidden_view_is_the_text_with_visual_tokens_removed():
    groups = [group_of(5, video(4, 2, 4), 6, image(), responses=[[10, 11], [12]])]
    batch = pack_groups(groups, view="hidden", media=MEDIA)
    assert batch.token_ids_T.tolist() == [5, START, END, 6, START, END, 10, 11, 12]
    assert batch.position_ids_3T.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 6]] * 3
    assert batch.predicting_rows_R.tolist() == [5, 6, 5]
    assert batch.visual_rows.numel() == 0
    assert batch.patches_SD is None
    assert batch.grid_thw_M3.shape == (0, 3)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("pad_to_multiple", [1, 4])
def test_invariants_hold_in_every_view(seed, pad_to_multiple):
    groups = random_groups(seed)
    batches = {
        view: pack_groups(
            groups,
            view=view,
            media=MEDIA,
            pad_to_multiple=pad_to_multiple,
            shown=None if view in ("intact", "hidden") else shown_by(view, groups),
        )
        for view in VIEWS
    }
    for view, batch in batches.items():
        num_tokens = batch.layout.num_tokens
        assert batch.token_ids_T.shape == (num_tokens,) and batch.position_ids_3T.shape == (3, num_tokens)
        assert num_tokens % pad_to_multiple == 0 and batch.layout.num_padding < pad_to_multiple
        end = token = response = 0
        for index, (span, group) in enumerate(zip(batch.layout.groups, groups, strict=True)):
            assert span.start == end
            end = span.end
            row = span.start + span.prompt_length
            last_position = int(batch.position_ids_3T[:, span.start : row].max())
            for rollout in group.rollouts:
                for place, target in enumerate(rollout.token_ids):
                    expected_row = span.start + span.prompt_length - 1 if place == 0 else row - 1
                    assert int(batch.predicting_rows_R[token]) == expected_row
                    assert int(batch.target_ids_R[token]) == int(batch.token_ids_T[row]) == target
                    assert int(batch.response_R[token]) == response and int(batch.group_R[token]) == index
                    assert batch.position_ids_3T[:, row].tolist() == [last_position + 1 + place] * 3
                    row, token = row + 1, token + 1
                response += 1
            assert row == span.end
        assert end + batch.layout.num_padding == num_tokens
        assert token == len(batch.target_ids_R) and response == batch.num_responses
        media = [] if view == "hidden" else [medium for group in groups for medium in group.prompt.media]
        assert len(batch.visual_rows) == sum(MEDIA.num_visual_tokens(medium) for medium in media)
        assert batch.token_ids_T[batch.visual_rows].tolist() == [
            MEDIA.token_id(medium) for medium in media for _ in range(MEDIA.num_visual_tokens(medium))
        ]
        assert [tuple(grid) for grid in batch.grid_thw_M3.tolist()] == [medium.grid_thw for medium in media]
        assert (0 if batch.patches_SD is None else len(batch.patches_SD)) == int(batch.grid_thw_M3.prod(-1).sum())
    intact = batches["intact"]
    for field in dataclasses.fields(intact):
        if field.name not in ("view", "patches_SD", "media"):
            value = getattr(intact, field.name)
            for view in ("shuffled", "reversed"):
                other = getattr(batches[view], field.name)
                assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, field.name
    for view in VIEWS:
        assert torch.equal(batches[view].target_ids_R, intact.target_ids_R)


@pytest.mark.parametrize("unit", ["frame", "temporal_patch"])
def test_shuffled_view_moves_whole_units_of_videos_and_leaves_images(unit):
    groups = [group_of(1, video(8, 2, 2), image(), video(5, 2, 2), responses=[[9]])]
    shown = shown_by("shuffled", groups, shuffle_unit=unit)
    intact = pack_groups(groups, view="intact", media=MEDIA).patches_SD
    shuffled = pack_groups(groups, view="shuffled", media=MEDIA, shown=shown).patches_SD
    pairs = [tuple(pair) for pair in shuffled[::4].tolist()]
    assert pairs[4] == (1.0, 1.0) == tuple(intact[16].tolist())
    assert not torch.equal(shuffled[:16], intact[:16]) and not torch.equal(shuffled[20:], intact[20:])
    if unit == "frame":
        assert sorted(value for pair in pairs[:4] for value in pair) == list(range(1, 9))
        assert sorted({value for pair in pairs[5:] for value in pair}) == list(range(1, 6))
    else:
        # Five frames fill three temporal patches by repeating the last; the filled pair moves as it is.
        assert sorted(pairs[:4]) == [(1, 2), (3, 4), (5, 6), (7, 8)]
        assert sorted(pairs[5:]) == [(1, 2), (3, 4), (5, 5)]


@pytest.mark.parametrize("vision", ["media", "none"])
def test_the_shuffled_view_can_be_made_of_the_intact_one(vision):
    groups = random_groups(3)
    shown = shown_by("shuffled", groups)
    expected = pack_groups(groups, view="shuffled", media=MEDIA, shown=shown, vision=vision)
    intact = pack_groups(groups, view="intact", media=MEDIA, vision=vision)
    found = with_media(intact, "shuffled", shown)
    for field in dataclasses.fields(found):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "media":
            ours, theirs = ([medium.frames_FCHW.tolist() for medium in media] for media in (ours, theirs))
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs, field.name
    with pytest.raises(ValueError, match="and patches"):
        with_media(pack_groups(groups, view="intact", media=MEDIA), "shuffled", shown)


def test_seconds_override_moves_video_positions_only_and_keeps_images():
    groups = [group_of(1, video(4, 2, 2, seconds=5.0), image(), responses=[[9]])]
    kept = pack_groups(groups, view="intact", media=MEDIA).position_ids_3T
    compat = pack_groups(groups, view="intact", media=MEDIA, seconds_per_grid=1.0).position_ids_3T
    assert kept[0].tolist() == [0, 1, 2, 7, 8, 9, 10, 11, 12]
    assert compat[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_ranks_without_the_encoder_get_the_same_batch_without_patches():
    groups = [group_of(1, video(), responses=[[9]])]
    with_patches = pack_groups(groups, view="intact", media=MEDIA)
    without = pack_groups(groups, view="intact", media=MEDIA, vision="none")
    media = pack_groups(groups, view="intact", media=MEDIA, vision="media")
    assert without.patches_SD is None and with_patches.patches_SD is not None and media.patches_SD is None
    assert without.media == () and media.media == with_patches.media == groups[0].prompt.media
    assert torch.equal(without.grid_thw_M3, with_patches.grid_thw_M3)
    assert torch.equal(without.visual_rows, with_patches.visual_rows)


def test_bad_groups_are_refused():
    good = group_of(1, video(), responses=[[9]])
    with pytest.raises(ValueError, match=r"at least one token.*\[1, 0\]"):
        pack_groups([group_of(1, responses=[[9], []])], view="intact", media=MEDIA)
    with pytest.raises(ValueError, match="at least one token"):
        pack_groups([group_of(1, responses=[])], view="intact", media=MEDIA)
    with pytest.raises(ValueError, match="at least one group"):
        pack_groups([], view="intact", media=MEDIA)
    with pytest.raises(UserError, match="unknown view"):
        pack_groups([good], view="blank", media=MEDIA)
    with pytest.raises(ValueError, match="must show media of the prompts' grids"):
        pack_groups([good], view="shuffled", media=MEDIA)
    with pytest.raises(ValueError, match="must show media of the prompts' grids"):
        pack_groups([good], view="shuffled", media=MEDIA, shown=[good.prompt.media * 2])
    only_visual = RolloutGroup(
        prompt=Prompt(problem_id="q7", token_ids=(IMAGE,), media=(image(),)), rollouts=(Rollout(token_ids=(1,)),)
    )
    with pytest.raises(ValueError, match="'q7' has no text token left"):
        pack_groups([only_visual], view="hidden", media=MEDIA)


def test_media_that_do_not_match_their_placeholders_are_refused():
    group = group_of(1, video(4), image(), responses=[[9]])
    swapped = dataclasses.replace(group.prompt, media=group.prompt.media[::-1])
    missing = dataclasses.replace(group.prompt, media=group.prompt.media[:1])
    for prompt in (swapped, missing):
        with pytest.raises(ValueError, match="visual placeholders"):
            pack_groups([dataclasses.replace(group, prompt=prompt)], view="intact", media=MEDIA)


def test_micro_batches_hold_whole_groups_in_order():
    groups = [group_of(index, responses=[[9]]) for index in range(5)]
    parts = plan_micro_batches(groups, groups_per_micro_batch=2)
    assert [len(part) for part in parts] == [2, 2, 1]
    assert [group for part in parts for group in part] == groups
    with pytest.raises(ValueError, match="micro_batch_groups"):
        plan_micro_batches(groups, groups_per_micro_batch=0)
