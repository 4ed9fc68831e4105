"""The HTML report: complete in itself, everything escaped, every curve and response there, the same bytes each time."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from megatron_ktr.config import config_from_values, save_resolved
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.errors import UserError
from megatron_ktr.report.curves import MAX_POINTS, Scale, Series, downsample, line_chart, stacked_chart
from megatron_ktr.report.html import Most, write_report
from megatron_ktr.report.run_data import choose_groups, read_run
from megatron_ktr.report.summary import summary_section
from tests.support.commands import run_tool
from tests.support.paths import REPOSITORY
from tests.support.videos import numbered_frames, write_video

WORDS = ["<think>", "red", "blue", "so", "</think>", "<answer>", "A", "</answer>"]
EVIL = '</p><script>alert(1)</script><img src="http://x/y" onerror=z> & \x00\ud800 end'
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Parsed page: elements with attributes, texts by enclosing element; checks that elements are nested properly."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open and self._open.pop() == tag, f"wrongly nested </{tag}>"

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, tag: str, class_: str = "") -> list[dict[str, str | None]]:
        wanted = set(class_.split())
        return [a for name, a in self.elements if name == tag and wanted <= set((a.get("class") or "").split())]

    @property
    def text(self) -> str:
        return "".join(data for tag, data in self.texts if tag not in ("style", "sup"))


def write_run(folder: Path, *, num_steps: int = 3, rollouts: dict[int, list[dict]] | None = None, **options) -> Path:
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, num_steps + 1):
            values = {
                "step": step,
                "loss": 1 / step,
                "reward_mean": 1.0,
                "reward/accuracy": 0.5,
                "key_token_ratio": 0.5,
            }
            if step == 1:
                values |= {"noise_floor/visual": 0.02, "signal_to_noise/visual": 30.0}
            values |= {"key_token_ratio/entropy": 0.2, "seconds/rollout": 0.2, "seconds/update": 0.1}
            file.write(json.dumps(values) + "\n")
    save_resolved(
        config_from_values({"objective": "video_ktr", "run_dir": str(folder), **options}), folder / "config.yaml"
    )
    for step, lines in (rollouts or {}).items():
        path = folder / "rollouts" / f"step_{step:08d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_evaluations_are_curves_over_the_steps_that_were_evaluated(tmp_path):
    run = write_run(tmp_path / "run", num_steps=4)
    evaluated = {0: 0.25, 2: 0.5, 4: 0.75}
    lines = {0: {"step": 0}} | {
        record["step"]: record for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    }
    for step, value in evaluated.items():
        figures = {"accuracy": value, "strict": value / 2, "duration/short": 1.0, "duration/long": 0.0}
        lines[step] |= {f"eval/held_out/{name}": number for name, number in figures.items()}
        lines[step] |= {"eval/mvbench/accuracy": 0.1, "seconds/evaluate": 2.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines.values()))
    page = page_of(run, out=tmp_path / "r.html")
    titles = [text for tag, text in page.texts if tag == "strong"]
    assert titles[:3] == ["Evaluation", "Evaluation: held_out", "Evaluation: held_out by duration"]
    drawn = {svg["aria-label"].partition(".")[0]: svg["aria-label"] for svg in page.all("svg") if svg.get("aria-label")}
    assert "held_out: 0.25 at step 0, 0.75 at step 4" in drawn["Evaluation over steps"]
    assert "visual: 30 at step 1" in drawn["Signal to noise over steps"], "a chart of the steps that measured it"
    assert "no finite value" not in page.text, "neither charts of evaluation nor, because of step 0, the others"
    assert "steps 4" in page.text and "time in steps 5.2 s" in page.text, "step 0 trains nothing"


def response(token_ids: list[int], *, text: str = "", accuracy: float = 1.0, **signals: list[int]) -> dict:
    signals = signals or {"entropy": [0] * len(token_ids)}
    return {
        "text": text,
        "token_ids": token_ids,
        "is_finished": True,
        "rewards": {"accuracy": accuracy, "format": 1.0},
        "is_key_token": [int(any(marks)) for marks in zip(*signals.values(), strict=True)],
        "is_selected": signals,
        "policy_logprobs": [-0.5] * len(token_ids),
    }


def question(responses: list[dict], *, problem_id: str = "7", **fields) -> dict:
    record = {"problem_id": problem_id, "problem": "Which colour?", "problem_type": "multiple choice"}
    record |= {"options": ["A red", "B blue"], "solution": "<answer>A</answer>", "responses": responses}
    return record | fields


def test_responses_to_shuffled_frames_and_the_bonus_they_decided_are_shown(tmp_path):
    """By hand: .3875 against 0.8 x .45 = .36 pays the two accuracies above 0.1; against 0.8 x .5 = .40 nobody."""
    responses = [response([1], accuracy=value) for value in (0.9, 0.05, 0.6, 0.0)]
    lines = [
        question(responses, problem_id=name, shuffled_responses=[response([2], text=EVIL, accuracy=a) for a in of])
        for name, of in (("paid", (0.4, 0.5)), ("unpaid", (0.5, 0.5)))
    ]
    run = write_run(tmp_path / "run", rollouts={1: lines}, objective="t_grpo")
    paid, unpaid = read_run(run).groups_of(1)
    assert [found.rewards["temporal_bonus"] for found in paid.responses] == [0.3, 0.0, 0.3, 0.0]
    assert [found.reward for found in paid.responses] == pytest.approx([2.2, 1.05, 1.9, 1.0])
    assert not any(found.rewards["temporal_bonus"] for found in unpaid.responses)
    page = page_of(run, out=tmp_path / "r.html")
    assert "is at least 0.8 x 0.45, so that 2 correct responses earned 0.3." in page.text
    assert "is below 0.8 x 0.5, so that nobody earned." in page.text
    assert page.text.count("2 responses to shuffled frames, not trained on") == 2
    assert page.text.count("alert(1)") == 4 and not page.all("script")
    plain = page_of(write_run(tmp_path / "plain", rollouts={1: [question(responses)]}), out=tmp_path / "p.html")
    assert "shuffled frames" not in plain.text.replace("compared with shuffled frames", "")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "model"
    save_tiny_model(folder, corpus=[" ".join(WORDS)] * 4, seed=0, num_layers=1)
    return folder


def encode(model: Path, text: str) -> list[int]:
    from megatron_ktr.data.template import load_tokenizer

    return load_tokenizer(model)(text, add_special_tokens=False)["input_ids"]


def page_of(*runs: Path, out: Path, **options) -> Page:
    write_report([(None, run) for run in runs], out=out, **options)
    return Page(out.read_text(encoding="utf-8"))


def test_page_loads_nothing_from_outside_and_runs_no_script(tmp_path):
    run = write_run(tmp_path / "run", rollouts={1: [question([response([1], text=EVIL)], problem=EVIL)]})
    page = page_of(run, out=tmp_path / "r.html", title=EVIL, notes=[EVIL], summary={"steps": 3, EVIL: EVIL})
    assert not page.all("script") and not page.all("link") and not page.all("img")
    links = [a[key] for _, a in page.elements for key in ("src", "href") if key in a]
    assert links and all(link.startswith("#") for link in links)
    assert not [key for _, a in page.elements for key in a if key.startswith("on")]
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv"))
    assert "default-src 'none'" in policy
    style = next(data for tag, data in page.texts if tag == "style")
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style


def test_every_response_appears_in_full_with_markup_as_text(tmp_path, model):
    texts = ["<think> red so </think> <answer> A </answer>", "blue so A", "<think> blue"]
    lines = [response(encode(model, text), text=text, accuracy=i % 2) for i, text in enumerate(texts)]
    lines.append(response(encode(model, "red"), text="red", entropy=[1] * len(encode(model, "red"))))
    lines[2]["is_finished"] = False
    run = write_run(tmp_path / "run", rollouts={1: [question(lines)]})
    page = page_of(run, out=tmp_path / "r.html", model=model)
    shown = "".join(page.text.split())  # this tokenizer drops blanks beside tags
    for text in texts:
        assert "".join(text.split()) in shown
    assert len(page.all("section", "answer")) == 4 and len(page.all("mark")) >= 2  # a token, and the legend's
    assert "cut at the length limit" in page.text
    assert not page.all("think") and not page.all("answer")


def test_responses_appear_without_a_tokenizer_and_without_marks(tmp_path):
    run = write_run(tmp_path / "run", rollouts={1: [question([response([5], text=EVIL, entropy=[1])])]})
    page = page_of(run, out=tmp_path / "r.html")
    assert EVIL.replace("\x00", "\ufffd").replace("\ud800", "\ufffd") in page.text
    assert "No tokenizer was found" in page.text
    assert "id 5" in page.text  # its numbers are still listed


def test_key_tokens_tell_their_signals_by_letter_class_and_tooltip(tmp_path, model):
    token_ids = encode(model, "red so blue")
    marks = {"entropy": [1, 0, 0], "temporal": [1, 0, 1], "visual": [0, 0, 0]}
    assert len(token_ids) == 3
    run = write_run(tmp_path / "run", rollouts={1: [question([response(token_ids, **marks)])]})
    page = page_of(run, out=tmp_path / "r.html", model=model)
    marked = [a for a in page.all("mark") if a.get("title")]
    assert [a["class"] for a in marked] == ["k0 k2", "k2"]
    assert marked[0]["title"] == "entropy and temporal, log-prob -0.500 (probability 0.61)"
    letters = [data for tag, data in page.texts if tag == "sup"]
    assert letters == ["E", "V", "T", "ET", "T"]  # the legend, then the tokens
    assert "1 entropy, 0 visual, 2 temporal" in page.text


def test_frames_are_embedded_as_the_run_sampled_them(tmp_path):
    (tmp_path / "media").mkdir()
    write_video(tmp_path / "media" / "a.mp4", numbered_frames(20))
    lines = [question([response([1])], video="a.mp4"), question([response([1])], problem_id="8", video="gone.mp4")]
    lines.append(question([response([1])], problem_id="9", video="../run/config.yaml"))
    run = write_run(tmp_path / "run", rollouts={1: lines}, video_num_frames=6, media_root=str(tmp_path / "media"))
    page = page_of(run, out=tmp_path / "r.html", most=Most(groups=3))
    images = page.all("img")
    assert len(images) == 6 and all(a["src"].startswith("data:image/jpeg;base64,") for a in images)
    assert [a["alt"] for a in images][::5] == ["video a.mp4, 0.0 s", "video a.mp4, 1.9 s"]
    assert "2 of the media shown below cannot be read" in page.text
    assert "gone.mp4 not shown" in page.text and "without '..'" in page.text
    fewer = page_of(run, out=tmp_path / "r.html", most=Most(frames=2))
    assert len(fewer.all("img")) == 2 and "2 of the 6 sampled frames" in fewer.text


def test_curves_have_a_point_per_step_until_there_are_too_many(tmp_path):
    for num_steps in (2, 7, MAX_POINTS, 10_000):
        values = tuple(float(np.sin(step)) for step in range(num_steps))
        chart = Page(line_chart("Loss", range(1, num_steps + 1), [Series("loss", values)]))
        (line,) = chart.all("polyline")
        assert len(line["points"].split()) == min(num_steps, MAX_POINTS)
        assert bool(chart.all("polygon", "band")) == (num_steps > MAX_POINTS)
    points = downsample(range(1, 10_001), [1.0] * 10_000)
    assert points[0].first_step == 1 and points[-1].last_step == 10_000
    assert all(a.last_step + 1 == b.first_step for a, b in zip(points, points[1:], strict=False))
    spike = downsample(range(1000), [0.0] * 500 + [9.0] + [0.0] * 499, max_points=10)
    assert max(point.high for point in spike) == 9.0, "averaging must not hide a spike"


def test_steps_without_finite_values_are_gaps_that_are_told(tmp_path):
    values = (1.0, 2.0, math.nan, 3.0, math.inf, 4.0, 5.0)
    chart = Page(line_chart("Loss", range(1, 8), [Series("loss", values)]))
    assert [len(a["points"].split()) for a in chart.all("polyline")] == [2, 2]
    assert len(chart.all("circle")) == 1, "a lone value is a dot"
    assert "no finite value on 2 steps" in chart.text
    assert not re.search(r"nan|inf\b", " ".join(a["points"] for a in chart.all("polyline")))
    nothing = Page(line_chart("Loss", [1, 2], [Series("loss", (math.nan, math.nan))]))
    assert not nothing.all("polyline") and "no finite value" in nothing.all("svg")[0]["aria-label"]


def test_stacked_areas_reach_the_sum_of_the_phases():
    series = [Series("a", (1.0, 2.0), 0), Series("b", (3.0, math.nan), 1)]
    chart = Page(stacked_chart("Seconds", [1, 2], series, prefix="x"))
    areas = [[tuple(map(float, p.split(","))) for p in a["points"].split()] for a in chart.all("polygon", "area")]
    tops = [[y for _, y in area[:2]] for area in areas]
    y = Scale([0.0, 4.0], start=166, end=8)
    expected = [[y(1), y(2)], [y(4), y(2)]]
    assert np.allclose(tops, expected, atol=0.06)  # coordinates are written to a tenth of a pixel
    assert {a["id"] for a in chart.all("pattern")} == {"x-0", "x-1"}


def test_scale_is_logarithmic_only_for_positive_values_over_two_decades():
    assert Scale([1e-6, 1e-2], start=0, end=1, may_be_log=True).is_log
    assert not Scale([0.0, 1e-2], start=0, end=1, may_be_log=True).is_log
    assert not Scale([1.0, 50.0], start=0, end=1, may_be_log=True).is_log
    assert Scale([1e-6, 1e-2], start=0, end=1, may_be_log=True).ticks() == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
    assert Scale([2.0, 2.0], start=0, end=1)(2.0) == pytest.approx(0.5)  # a flat line is in the middle


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_short_runs_without_rollouts_make_a_page(tmp_path, num_steps):
    run = write_run(tmp_path / "run", num_steps=num_steps)
    page = page_of(run, out=tmp_path / "r.html")
    assert len(page.all("figure", "chart")) == (6 if num_steps else 0)
    assert "No rollouts were recorded" in page.text
    assert ("No step was logged yet" in page.text) == (num_steps == 0)
    names = [a.get("aria-label") for a in page.all("svg") if a.get("role") == "img"]
    assert all(names), "every drawing says in words what it shows"


def test_same_runs_give_the_same_bytes(tmp_path, model):
    run = write_run(tmp_path / "run", rollouts={1: [question([response([1, 2])])]}, model=str(model))
    for name in ("a.html", "b.html"):
        write_report([("One", run), (None, run)], out=tmp_path / name, summary={"accuracy_ktr": 0.9})
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    page = Page((tmp_path / "a.html").read_text())
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids)), "two sections with the same curves share no id"
    assert [data for tag, data in page.texts if tag == "h2"] == ["Results", "One", "Video-KTR", "Configuration"]


def test_groups_that_teach_come_first_and_first_and_last_step_are_compared(tmp_path):
    even, uneven = [response([1]), response([1])], [response([1]), response([1], accuracy=0.0)]
    lines = [question(even, problem_id="even"), question(uneven, problem_id="uneven")]
    run = read_run(write_run(tmp_path / "run", rollouts={1: lines, 2: lines, 30: lines}))
    found = [(group.step, group.record["problem_id"]) for group in choose_groups(run, max_groups=3)]
    assert found == [(1, "uneven"), (30, "uneven"), (30, "even")]
    assert choose_groups(run, max_groups=0) == []


def test_headline_says_only_what_the_numbers_show():
    errors = {"accuracy_sft": 0.03, "accuracy_ktr": 0.01, "accuracy_ktr_blank": 0.03}
    summary = {"accuracy_sft": 0.6, "accuracy_ktr": 0.97, "accuracy_ktr_blank": 0.25, "standard_error": errors}
    text = Page(summary_section({**summary, "num_eval": 200})).text
    assert "97.0% \u00b1 1.0" in text and "200 questions" in text
    assert "stop guessing" in text and "no comparison of Video-KTR with GRPO" in text
    unclear = Page(summary_section({**summary, "accuracy_ktr": 0.63, "accuracy_ktr_blank": 0.61})).text
    assert "no clear difference here" in unclear and "stop guessing" not in unclear
    assert "may not come from the video" in unclear
    assert "standard errors were not recorded" in Page(summary_section({"accuracy_sft": 0.5})).text


def test_options_stand_side_by_side_and_changed_ones_are_marked(tmp_path):
    runs = [write_run(tmp_path / name, lr=lr) for name, lr in (("a", 0.125), ("b", 0.25))]
    page = page_of(*runs, out=tmp_path / "r.html")
    cells = [data for _, data in page.texts]
    at = cells.index("lr")
    assert cells[at + 1 : at + 3] == ["0.125 *", "0.25 *"]


def test_the_wording_of_each_run_is_named(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    save_resolved(config_from_values({}), runs[1] / "config.yaml", notes=["wording: <b>tw_grpo</b>, digest 1"])
    assert "wording: <b>tw_grpo</b>, digest 1" in page_of(*runs, out=tmp_path / "r.html").text


def test_incidents_skipped_updates_alarms_and_restarts_are_told(tmp_path):
    run = write_run(tmp_path / "run")
    assert "Incidents" not in {text for _, text in page_of(run, out=tmp_path / "none.html").texts}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[1] |= {"skipped_updates": 1.0, "alarm/grad_norm": 1.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("config_from_step_00000002.yaml", "config_from_step_00000003.yaml"):
        (run / name).write_text("trainer: {}")
    told = [{"time": "2026-01-01T00:00:00+00:00", "step": 2, "kind": "alarm", "text": EVIL}, {"kind": "hang"}]
    (run / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in told) + '{"torn')
    page = page_of(run, out=tmp_path / "r.html")
    texts = " ".join(text for _, text in page.texts)
    for text in (
        "Taken up again 2 times, at step 2, 3.",
        f"Updates were skipped in 1 step ({lines[1]['step']}).",
        f"Alarm grad norm in 1 step ({lines[1]['step']}).",
        "Incidents: alarm 1, hang 1.",
        "onerror=z>",
    ):
        assert text in texts
    assert not page.all("script") and page_of(run, out=tmp_path / "again.html").texts == page.texts


def damaged(run: Path, name: str, content: str) -> None:
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 1}\n{"step"\n{"step": 3}\n', "metrics.jsonl, line 2 is not valid JSON"),
        ("metrics.jsonl", '{"step": "x"}\n', "line 1: expected a whole 'step'"),
        ("config.yaml", "a: [", "config.yaml cannot be read as YAML"),
        ("rollouts/step_00000001.jsonl", '{"problem": "q", "responses": 3}\n', "line 1: expected a list of objects"),
        (
            "rollouts/step_00000001.jsonl",
            json.dumps({"problem": "q", "responses": [{"token_ids": [1], "is_selected": {"entropy": [1, 0]}}]}) + "\n",
            "expected entropy to be a list of 1 numbers",
        ),
    ],
)
def test_damaged_files_are_named_with_their_line(tmp_path, name, content, message):
    run = write_run(tmp_path / "run")
    damaged(run, name, content)
    with pytest.raises(UserError, match=re.escape(message)):
        write_report([(None, run)], out=tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_half_a_line_at_the_end_of_a_running_run_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", num_steps=2)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_run(run).steps == (1, 2)


def test_command_line_writes_the_page_and_reports_bad_input_in_one_line(tmp_path):
    run = write_run(tmp_path / "run", num_steps=1)
    (run / "summary.json").write_text('{"accuracy_ktr": 0.9}')
    command = [sys.executable, str(REPOSITORY / "tools" / "report.py"), "--json", "--run-dir"]
    done = subprocess.run([*command, str(run)], capture_output=True, text=True, cwd=tmp_path, check=True)
    written = json.loads(done.stdout)
    assert Path(written["out"]) == run / "report.html"
    assert written["num_bytes"] == (run / "report.html").stat().st_size
    assert "90.0%" in (run / "report.html").read_text()
    failed = run_tool("report", "--json", "--run-dir", tmp_path / "none")
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.startswith("error: --run-dir") and failed.stderr.count("\n") == 1


def test_bad_options_are_user_errors(tmp_path):
    run = write_run(tmp_path / "run")
    for options in ({"most": Most(groups=-1)}, {"model": tmp_path / "no"}, {"media_root": tmp_path / "no"}):
        with pytest.raises(UserError, match="--m"):
            write_report([(None, run)], out=tmp_path / "r.html", **options)
    with pytest.raises(UserError, match="accuracy_ktr to be a number from 0 to 1"):
        write_report([(None, run)], out=tmp_path / "r.html", summary={"accuracy_ktr": 97})
    with pytest.raises(UserError, match="cannot be written"):
        write_report([(None, run)], out=run / "metrics.jsonl" / "r.html")
