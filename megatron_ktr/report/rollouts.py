"""Shows recorded rollouts as HTML: the question, its frames, and each response with its key tokens marked by signal.

A signal is shown by a letter behind the token and by a bar below it, with its own place, pattern and colour. So neither
colour nor a pointer is needed. Log-probabilities are in the tooltip and in a table below the response.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ktr.attribution.controls import MEANINGS as CONTROL_MEANINGS
from megatron_ktr.config.signal_registry import available_signals, signal_entry
from megatron_ktr.config.words import SIGNALS
from megatron_ktr.objectives.bonuses.temporal import TemporalBonus
from megatron_ktr.report.console import token_texts
from megatron_ktr.report.frames import Strip
from megatron_ktr.report.markup import Html, element, escape, format_number
from megatron_ktr.report.run_data import RecordedGroup, RecordedResponse
from megatron_ktr.rewards.choices import labelled_options, named_labels
from megatron_ktr.rewards.truth import Truth

OPEN_RESPONSES = 4
"""The number of responses of a group that are visible at first. Further ones are folded."""
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class SignalStyle:
    """The style of tokens that a signal has selected."""

    name: str
    letter: str
    style: int
    """The number of the class s0 .. s5 in the style sheet. It sets the colour, and the bar's place and pattern."""


def signal_styles(names: Sequence[str]) -> dict[str, SignalStyle]:
    """The style of each signal. Known signals come first and always have the same style. Letters are the shortest
    beginnings of the names that distinguish the signals.

    >>> [style.letter for style in signal_styles(["visual", "value", "entropy"]).values()]
    ['E', 'Vi', 'Va']
    """
    ordered = [name for name in SIGNALS if name in names]
    ordered += sorted(name for name in names if name not in SIGNALS)
    styles: dict[str, SignalStyle] = {}
    extra = len(SIGNALS)
    for name in ordered:
        others = [other for other in ordered if other != name]
        length = next((n for n in range(1, len(name)) if all(o[:n] != name[:n] for o in others)), len(name))
        style = SIGNALS.index(name) if name in SIGNALS else min(extra, 5)
        extra += name not in SIGNALS
        styles[name] = SignalStyle(name, name[:length].capitalize(), style)
    return styles


def meaning_of(name: str) -> str:
    """What a token is that a signal or a control has selected; "" if this version does not know the name."""
    if name in CONTROL_MEANINGS:
        return CONTROL_MEANINGS[name]
    return signal_entry(name).meaning if name in available_signals() else ""


def legend(styles: Mapping[str, SignalStyle]) -> Html | None:
    """The explanation of the marks; None if no signal was logged."""
    if not styles:
        return None
    items = [
        element(
            "li",
            _marked("token", [style], title=None),
            " ",
            element("strong", f"{style.letter}: {style.name}"),
            f" - {meaning}" if (meaning := meaning_of(style.name)) else None,
        )
        for style in styles.values()
    ]
    explanation = element(
        "p",
        "Marked tokens are the key tokens: only they carry the loss. A token may be chosen by several signals. "
        "Unmarked tokens are part of the response but do not change the model.",
    )
    return element("div", explanation, element("ul", items), class_="key")


def group_section(
    group: RecordedGroup,
    *,
    strips: Sequence[Strip],
    styles: Mapping[str, SignalStyle],
    decode: Decode | None,
    temporal: TemporalBonus | None = None,
) -> Html:
    """One question with its media and all its responses, those to shuffled frames among them. ``temporal`` is the bonus
    that compares with these."""
    record = group.record
    kinds = ", ".join(dict.fromkeys(str(record[key]) for key in ("task", "problem_type") if record.get(key)))
    heading = f"Step {group.step}, question {record['problem_id']}" + (f" ({kinds})" if kinds else "")
    responses = [
        _response(response, number=number, styles=styles, decode=decode)
        for number, response in enumerate(group.responses, start=1)
    ]
    shown, folded = responses[:OPEN_RESPONSES], responses[OPEN_RESPONSES:]
    if len(folded) == 1:
        shown, folded = responses, []
    return element(
        "article",
        element("h4", heading),
        _question(record),
        [_strip(strip) for strip in strips],
        element("p", _what_it_teaches(group), class_="note") if group.responses else None,
        shown,
        element("details", element("summary", f"{len(folded)} more responses"), folded) if folded else None,
        _shuffled(group, temporal=temporal, decode=decode) if group.shuffled else None,
        class_="group",
    )


def _shuffled(group: RecordedGroup, *, temporal: TemporalBonus | None, decode: Decode | None) -> Html:
    """The responses to shuffled frames, folded, below what the bonus made of them."""
    responses = [
        _response(response, number=number, styles={}, decode=decode)
        for number, response in enumerate(group.shuffled, start=1)
    ]
    summary = element("summary", f"{_count(len(responses), 'response')} to shuffled frames, not trained on")
    return element(
        "div",
        element("p", _comparison(group, temporal), class_="note") if temporal is not None else None,
        element("details", summary, responses),
    )


def _comparison(group: RecordedGroup, temporal: TemporalBonus) -> str:
    """The rule of the bonus in numbers."""
    means = [
        sum(response.rewards.get("accuracy", math.nan) for response in found) / len(found)
        for found in (group.responses, group.shuffled)
    ]
    if not all(map(math.isfinite, means)):
        return "No accuracy was recorded, with which ordered and shuffled frames are compared."
    ordered, shuffled = map(format_number, means)
    paid = sum(response.rewards.get(temporal.name, 0.0) > 0 for response in group.responses)
    holds = temporal.is_satisfied(*means)
    return (
        f"Mean accuracy {ordered} on ordered frames, {shuffled} on shuffled ones: "
        f"{ordered} is {'at least' if holds else 'below'} {format_number(temporal.margin)} x {shuffled}, so that "
        + (f"{_count(paid, 'correct response')} earned {format_number(temporal.bonus)}." if holds else "nobody earned.")
    )


def _question(record: Mapping[str, Any]) -> Html:
    answer = Truth.of(record["solution"]).text if record.get("solution") is not None else ""
    labelled = labelled_options(record["options"])
    right = named_labels(answer, labelled)
    options = []
    for label, option in zip(labelled, record["options"], strict=True):
        is_right = label in right
        mark = element("span", " \u2713 right answer", class_="right") if is_right else None
        options.append(
            element("li", element("span", option, dir="auto"), mark, class_="right-option" if is_right else None)
        )
    return element(
        "div",
        element("p", _problem_text(record), class_="problem", dir="auto"),
        element("ul", options, class_="options") if options else None,
        element("p", element("strong", "Right answer: "), element("span", answer, dir="auto")) if answer else None,
        class_="question",
    )


def _problem_text(record: Mapping[str, Any]) -> str:
    if isinstance(record.get("problem"), str):
        return record["problem"]
    lines = []
    for message in record.get("messages") or ():
        content = message["content"]
        parts = [content] if isinstance(content, str) else [part.get("text") or f"[{part['type']}]" for part in content]
        lines.append(f"{message['role']}: {' '.join(parts)}")
    return "\n".join(lines)


def _strip(strip: Strip) -> Html:
    if strip.problem:
        return element("p", f"{strip.kind} {strip.source} ", strip.problem, class_="missing")
    pictures = [
        element(
            "figure",
            element(
                "img",
                src=picture.uri,
                alt=f"{strip.kind} {strip.source}, {picture.caption}",
                width=picture.width,
                height=picture.height,
            ),
            element("figcaption", picture.caption),
        )
        for picture in strip.pictures
    ]
    count = len(strip.pictures)
    what = "image" if strip.kind == "image" else f"{count} frames"
    if count < strip.num_sampled:
        what = f"{count} of the {strip.num_sampled} sampled frames"
    caption = element("p", f"{strip.source}: {what}", class_="note")
    return element("div", element("div", pictures, class_="pictures"), caption, class_="strip")


def _what_it_teaches(group: RecordedGroup) -> str:
    rewards = [response.reward for response in group.responses]
    if not any(response.rewards for response in group.responses):
        return "Given responses without rewards: every token is learnt."
    if not group.has_unequal_rewards:
        return f"All responses have reward {format_number(rewards[0])}: this group pushes the model nowhere."
    mean = sum(rewards) / len(rewards)
    return f"Mean reward {format_number(mean)}: responses above it become more likely, those below it less likely."


def _response(
    response: RecordedResponse, *, number: int, styles: Mapping[str, SignalStyle], decode: Decode | None
) -> Html:
    parts = [
        element(
            "span",
            f"{name} ",
            element("b", format_number(value)),
            f" x {format_number(response.reward_weights[name])}" if name in response.reward_weights else None,
        )
        for name, value in response.rewards.items()
    ]
    facts = []
    if len(response.rewards) > 1:
        facts.append(element("span", "reward ", element("b", format_number(response.reward)), class_="total"))
    length = _count(len(response.token_ids), "token") if response.token_ids else None
    facts += [*parts, element("span", length) if length else None]
    if not response.is_finished:
        facts.append(element("span", "cut at the length limit", class_="cut"))
    if response.is_selected:
        counts = ", ".join(
            f"{sum(response.is_selected[name])} {name}" for name in styles if name in response.is_selected
        )
        facts.append(element("span", f"{_count(sum(response.is_key_token), 'key token')} ({counts})"))
    texts = _texts(response, decode)
    body = response.text if texts is None else _tokens(response, texts, styles)
    return element(
        "section",
        element("h5", f"Response {number}"),
        element("p", facts, class_="facts"),
        element("p", body, class_="response", dir="auto"),
        _token_table(response, texts, styles),
        class_="answer",
    )


def _texts(response: RecordedResponse, decode: Decode | None) -> list[str] | None:
    """The text that each token adds; None without a tokenizer. If these do not add up to the response's text, tokens
    are decoded one by one."""
    if decode is None or not response.token_ids:
        return None
    texts = token_texts(response.token_ids, decode=decode)
    if "".join(texts) != decode(response.token_ids):
        texts = [decode([token]) for token in response.token_ids]
    return texts


def _tokens(response: RecordedResponse, texts: Sequence[str], styles: Mapping[str, SignalStyle]) -> list[Html]:
    written = []
    for index, text in enumerate(texts):
        chosen = [styles[name] for name in styles if name in response.signals_of(index)]
        title = _token_facts(response, index, chosen)
        if not chosen:
            written.append(element("span", text, title=title or None))
            continue
        core = text.strip()
        lead, trail = text.split(core, 1) if core else ("", text)  # blanks outside of the mark
        written += [escape(lead), _marked(core or "\u2423", chosen, title=title or None), escape(trail)]
    return written


def _marked(text: str, chosen: Sequence[SignalStyle], *, title: str | None) -> Html:
    letters = element("sup", "".join(style.letter for style in chosen))
    classes = " ".join(f"k{style.style}" for style in chosen)
    return element("mark", text, letters, class_=classes, title=title)


def _token_facts(response: RecordedResponse, index: int, chosen: Sequence[SignalStyle]) -> str:
    facts = [" and ".join(style.name for style in chosen)] if chosen else []
    if response.policy_logprobs:
        value = response.policy_logprobs[index]
        facts.append(f"log-prob {value:.3f} (probability {_probability(value)})")
    if response.sampler_logprobs:
        facts.append(f"sampler's log-prob {response.sampler_logprobs[index]:.3f}")
    return ", ".join(facts)


def _token_table(
    response: RecordedResponse, texts: Sequence[str] | None, styles: Mapping[str, SignalStyle]
) -> Html | None:
    """A table with the numbers of the key tokens, for touch screens and screen readers."""
    rows = []
    for index, token in enumerate(response.token_ids):
        chosen = [style.name for name, style in styles.items() if name in response.signals_of(index)]
        if not chosen:
            continue
        logprob = response.policy_logprobs[index] if response.policy_logprobs else None
        cells = [
            index + 1,
            f"id {token}" if texts is None else texts[index].strip() or repr(texts[index]),
            ", ".join(chosen),
            "-" if logprob is None else f"{logprob:.3f}",
            "-" if logprob is None else _probability(logprob),
        ]
        rows.append(element("tr", [element("td", cell) for cell in cells]))
    if not rows:
        return None
    heads = [element("th", head, scope="col") for head in ("place", "token", "signals", "log-prob", "probability")]
    table = element("table", element("thead", element("tr", heads)), element("tbody", rows))
    return element(
        "details", element("summary", f"{_count(len(rows), 'key token')} in numbers"), table, class_="numbers"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _probability(logprob: float) -> str:
    return format_number(math.exp(min(logprob, 0.0)), digits=2) if math.isfinite(logprob) else "-"
