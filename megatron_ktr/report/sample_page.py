"""The page of ``prepare_dataset.py preview``: samples of a question file as the model will see them.

Each sample has its frames, upright and in their final size, with their times; the text of its prompt with every special
token; its lengths, grid and answer. Above them stands what the options in use would drop or shrink in a larger sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from megatron_ktr.data.conversation import text_of
from megatron_ktr.data.loader import PromptLoader
from megatron_ktr.data.media.files import files_of
from megatron_ktr.data.media.preprocess import LoadedMedia, load_media
from megatron_ktr.data.media.request import MediaSource, media_sources
from megatron_ktr.data.prepare.record_reader import CheckedRecord
from megatron_ktr.data.template import control_tokens
from megatron_ktr.data.unusable import UnusableMedia, UnusableSample
from megatron_ktr.errors import UserError
from megatron_ktr.report.frames import Picture, picture_of
from megatron_ktr.report.histogram import histogram
from megatron_ktr.report.markup import Html, element, format_number
from megatron_ktr.report.page import whole_page
from megatron_ktr.types import Prompt

MOST_PICTURES = 32
"""The most frames of one video on the page."""


@dataclass(frozen=True)
class Lengths:
    """What the larger sample says."""

    tokens: Sequence[int]
    """Lengths of its prompts."""
    limit: int
    """--max-prompt-length."""
    effects: Sequence[str]
    """Sentences of ``prompt_lengths.effects_in_words``."""


def sample_page(
    title: str,
    *,
    facts: Sequence[tuple[str, str]],
    lengths: Lengths,
    samples: Sequence[CheckedRecord],
    loader: PromptLoader,
) -> str:
    """The page as text. ``facts`` are (name, value) about the file."""
    sections = [_sample(checked, loader=loader, limit=lengths.limit) for checked in samples]
    links = [("#lengths", "Lengths and limits"), ("#samples", f"{len(sections)} samples")]
    navigation = element("nav", element("ul", [element("li", element("a", text, href=href)) for href, text in links]))
    header = element("header", element("h1", title), _facts(facts), navigation)
    body = [
        header,
        element("main", _lengths(lengths), element("section", element("h2", "Samples"), sections, id="samples")),
        element("footer", "Made by tools/prepare_dataset.py of Megatron-KTR. The page is complete in itself."),
    ]
    return whole_page(title, body)


def _lengths(lengths: Lengths) -> Html:
    effects = element("ul", [element("li", sentence) for sentence in lengths.effects])
    note = f"the line is --max-prompt-length {lengths.limit:,}"
    # A limit far beyond all prompts would leave the bars no room.
    is_near = bool(lengths.tokens) and lengths.limit <= 2 * max(lengths.tokens)
    chart = histogram(
        "Tokens of a prompt",
        lengths.tokens,
        limit=lengths.limit if is_near else None,
        what="tokens",
        note=note if is_near else "",
    )
    return element(
        "section",
        element("h2", "Lengths and limits"),
        element("p", f"From a sample of {len(lengths.tokens):,} prompts of the file.", class_="note"),
        element("div", chart if lengths.tokens else None, element("div", effects), class_="charts"),
        id="lengths",
    )


def _sample(checked: CheckedRecord, *, loader: PromptLoader, limit: int) -> Html:
    record = checked.record or {}
    parts: list[Html | None] = [element("h4", _heading(checked))]
    name = ""
    try:
        if checked.problem is not None:
            raise UnusableSample(f"record {checked.number}", checked.problem.reason)
        sources = media_sources(record)
        media = []
        for source in sources:
            name = source.name
            media.append(_load(source, loader))
        prompt = loader.builder.build(record, [medium.visual for medium in media])
    except (UnusableSample, UserError) as error:
        reason = error.reason if isinstance(error, UnusableSample) else str(error)
        medium = f"{name}: " if isinstance(error, UnusableMedia) else ""
        parts.append(element("p", f"Training cannot use it: {medium}{reason}", class_="missing"))
        return element("article", parts, class_="group")
    if len(prompt.token_ids) > limit:
        parts.append(
            element("p", f"Training skips it: longer than --max-prompt-length {limit:,} tokens.", class_="missing")
        )
    parts += [_facts(_numbers(prompt, media, loader)), *map(_strip, sources, media)]
    parts += [element("h5", "Prompt"), _prompt_text(prompt, loader), _answer(record)]
    return element("article", parts, class_="group")


def _heading(checked: CheckedRecord) -> str:
    record = checked.record
    if record is None:
        return f"Record {checked.number}"
    kinds = ", ".join(filter(None, (record["problem_type"], record["data_type"])))
    return f"Record {checked.number}, problem_id {record['problem_id']} ({kinds})"


def _load(source: MediaSource, loader: PromptLoader) -> LoadedMedia:
    return load_media(
        files_of(source, loader.media_root),
        kind=source.kind,
        settings=loader.settings,
        sampling=loader.sampling,
        request=source.request,
    )


def _numbers(prompt: Prompt, media: Sequence[LoadedMedia], loader: PromptLoader) -> list[tuple[str, str]]:
    visual = sum(loader.settings.num_visual_tokens(medium.visual.grid_thw) for medium in media)
    return [
        ("tokens", f"{len(prompt.token_ids):,}"),
        ("of them visual", f"{visual:,}"),
        ("text", f"{len(prompt.token_ids) - visual:,}"),
    ]


def _strip(source: MediaSource, loaded: LoadedMedia) -> Html:
    visual = loaded.visual
    frames, (time, rows, columns) = visual.frames_FCHW, visual.grid_thw
    num_frames, _, height, width = frames.shape
    shown = sorted(
        {round(place) for place in torch.linspace(0, num_frames - 1, min(num_frames, MOST_PICTURES)).tolist()}
    )
    facts = [(visual.kind, source.name)]
    if visual.kind == "video":
        facts.append(("frames", f"{num_frames}" + (f" ({len(shown)} shown)" if len(shown) < num_frames else "")))
        facts.append(("seconds a grid", format_number(visual.seconds_per_grid)))
    facts += [("size", f"{width} x {height}"), ("grid", f"{time} x {rows} x {columns}"), ("decoder", loaded.backend)]
    if loaded.num_repeated_frames:
        facts.append(("repeated frames", f"{loaded.num_repeated_frames}"))
    pictures = [picture_of(frames[place], caption=_caption(loaded, place)) for place in shown]
    return element(
        "div", _facts(facts), element("div", map(_figure, pictures), class_="pictures large"), class_="strip"
    )


def _caption(loaded: LoadedMedia, place: int) -> str:
    return f"{loaded.frame_seconds[place]:.2f} s" if loaded.frame_seconds else loaded.visual.kind


def _figure(picture: Picture) -> Html:
    image = element("img", src=picture.uri, width=picture.width, height=picture.height, alt=picture.caption)
    return element("figure", image, element("figcaption", picture.caption))


def _facts(facts: Sequence[tuple[str, str]]) -> Html:
    return element("p", [element("span", f"{name} ", element("b", value)) for name, value in facts], class_="facts")


def _prompt_text(prompt: Prompt, loader: PromptLoader) -> Html:
    """The text of the token ids. A run of visual tokens is written once, with its number."""
    builder = loader.builder
    visual = {builder.visual_tokens.image_id: builder.visual_tokens.image}
    visual[builder.visual_tokens.video_id] = builder.visual_tokens.video
    special = control_tokens(builder.tokenizer, builder.visual_tokens)
    parts: list[Html | str] = []
    for token, run in groupby(prompt.token_ids, key=lambda token: token if token in visual else None):
        ids = list(run)
        if token is not None:
            parts.append(element("span", f"{visual[token]} x {len(ids):,}", class_="special"))
            continue
        text, last = builder.tokenizer.decode(ids, skip_special_tokens=False), 0
        for found in special.finditer(text):
            parts += [text[last : found.start()], element("span", found.group(), class_="special")]
            last = found.end()
        parts.append(text[last:])
    return element("pre", parts, class_="prompt", dir="auto")


def _answer(record: Mapping[str, Any]) -> Html:
    if "reply_turns" in record:
        turns = [element("pre", f"{turn['role']}: {text_of(turn)}", class_="prompt") for turn in record["reply_turns"]]
        return element("div", element("h5", "To imitate"), turns)
    solution = record.get("solution")
    answer = "none" if solution is None else str(solution)
    return element("p", element("strong", "Answer: "), element("span", answer, dir="auto"), class_="right")
