"""The real command on all seven benchmarks in the layouts in which their authors publish them: with Hugging Face, with
vLLM in processes of its own, and with ``vllm serve`` as a chat server; killed, compared, and scored again."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_ktr.evaluation.item import CONTROLS
from megatron_ktr.evaluation.protocols import PROTOCOL_NAMES
from megatron_ktr.evaluation.registry import BENCHMARKS
from megatron_ktr.evaluation.results.aggregate import results_text
from tests.evaluation.test_benchmark_files import EXPECTED
from tests.support.benchmark_files import write_benchmark, write_videos
from tests.support.paths import REPOSITORY
from tests.support.patience import PATIENCE_SECONDS, wait_until
from tools.evaluate import main

NUM_FRAMES = 4
NUM_QUESTIONS = sum(map(len, EXPECTED.values()))
NUM_KILLS = 3
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}
TOKENS_PER_PICTURE = 6
"""Of a frame of 56 pixels that travels as a picture: four for what is seen, one before them and one after."""
OTHER_JUDGES = {
    "video_holmes": {"video_r1"},
    "mmvu": set(),
    "videomme": {"own", "lmms_eval"},
    "mvbench": {"own", "lmms_eval"},
}
"""Columns beside the three protocols; of all others ``own``."""


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("downloads")
    for name in BENCHMARKS:
        write_videos(write_benchmark(root, name), name)
    return root


def command(downloads: Path, model: Path, out: Path, *flags: str) -> list[str]:
    """The one command, greedy, with words that this model knows."""
    return [
        *(sys.executable, str(REPOSITORY / "tools" / "evaluate.py"), "--benchmark", ",".join(BENCHMARKS)),
        *("--benchmark-root", str(downloads), "--frames", str(NUM_FRAMES), "--control", ",".join(CONTROLS)),
        *("--prompt-template", str(model / "prompt_template.txt"), "--temperature", "0", "--max-tokens", "12"),
        *("--out", str(out), "--json", *flags),
    ]


def run(command: list[str]) -> dict[str, Any]:
    """The JSON that a command prints, which must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, env=ENVIRONMENT)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hf(downloads: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of Hugging Face's answers."""
    out = tmp_path_factory.mktemp("hf") / "out"
    found = run(command(downloads, model_dir, out, "--model", str(model_dir), "--engine", "hf"))
    assert found["complete"] and list(found["accuracy"]) == list(BENCHMARKS)
    return out


def results_in(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def answers_in(out: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The stored answers by (benchmark, item, condition). None is there twice."""
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    found = {(line["benchmark"], line["item_id"], line["condition"]): line["answer"] for line in lines}
    assert len(found) == len(lines)
    return found


def check_complete(out: Path) -> None:
    """Every question of every benchmark is answered under every control, and counted in its categories."""
    results = results_in(out)
    assert results["complete"] and results["num_answered"] == results["num_wanted"] == 4 * NUM_QUESTIONS
    answers = answers_in(out)
    assert len(answers) == 4 * NUM_QUESTIONS and not any(answer["problem"] for answer in answers.values())
    names = [str(NUM_FRAMES), *(f"{NUM_FRAMES} {control}" for control in CONTROLS[1:])]
    for benchmark, found in results["benchmarks"].items():
        assert set(found["protocols"]) == {*PROTOCOL_NAMES, *OTHER_JUDGES.get(benchmark, {"own"})}
        assert [condition["name"] for condition in found["conditions"]] == names
        assert [control["num_pairs"] for control in found["controls"]] == [len(EXPECTED[benchmark])] * 3
        for condition in found["conditions"]:
            assert condition["complete"] and not condition["problems"]
            assert condition["num_answered"] == condition["num_asked"] == len(EXPECTED[benchmark])
            for protocol in condition["protocols"].values():
                counts = {
                    (axis, value): figures["num_items"]
                    for axis, values in protocol["by_category"].items()
                    for value, figures in values.items()
                }
                assert counts == Counter(pair for question in EXPECTED[benchmark] for pair in question[2].items())
        for item in EXPECTED[benchmark]:
            for name in names:
                assert answers[benchmark, item[0], name]["num_frames"] == NUM_FRAMES * ("hidden" not in name)


def test_one_command_gives_all_figures_of_seven_benchmarks(hf: Path) -> None:
    check_complete(hf)
    answers, results = answers_in(hf), results_in(hf)
    num_right = 0
    for benchmark, questions in EXPECTED.items():
        for condition in results["benchmarks"][benchmark]["conditions"]:
            right = Counter[str]()
            for item_id, solution, categories, *_ in questions:
                text = answers[benchmark, item_id, condition["name"]]["text"]
                block = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
                # Video-R1's rule for letters, which are all that this model answers. It never says two of them, so
                # the one of Video-Holmes gives the same.
                right[next(iter(categories.values()))] += (block[1] if block else text).strip() == solution
            assert {
                value: round(figures["accuracy"] * figures["num_items"])
                for value, figures in first_axis(benchmark, condition["protocols"]["official"]).items()
            } == right, (benchmark, condition["name"])
            num_right += right.total()
    assert num_right > 3 and len({answer["text"] for answer in answers.values()}) > 20, "the model answers what it sees"
    assert {answer["is_finished"] for answer in answers.values()} == {True, False}


def first_axis(benchmark: str, protocol: dict[str, Any]) -> dict[str, Any]:
    """The figures by the first axis of ``EXPECTED``."""
    return protocol["by_category"][next(iter(EXPECTED[benchmark][0][2]))]


def test_scoring_the_stored_responses_gives_the_figures_of_the_results(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, results = answers_in(hf), results_in(hf)
    records = [json.loads(line) for line in (hf / "items.jsonl").read_text().splitlines()]
    for benchmark, found in results["benchmarks"].items():
        path = tmp_path / f"{benchmark}.jsonl"
        path.write_text(
            "".join(
                json.dumps({"question": item["record"], "model_output": answers[name, item["item_id"], "4"]["text"]})
                + "\n"
                for item in records
                if (name := item["benchmark"]) == benchmark
            )
        )
        (condition,) = (condition for condition in found["conditions"] if condition["name"] == "4")
        # The authors of Video-Holmes judge by another rule, which stands beside Video-R1's.
        official = "video_r1" if benchmark == "video_holmes" else "official"
        for protocol, column in zip(PROTOCOL_NAMES, (official, "strict", "lenient"), strict=True):
            assert main(["--score-responses", str(path), "--protocol", protocol, "--json"]) == 0
            scored = json.loads(capsys.readouterr().out.splitlines()[-1])
            figures = condition["protocols"][column]
            right = sum(one["accuracy"] * one["num_items"] for one in first_axis(benchmark, figures).values())
            assert scored["num"] == len(EXPECTED[benchmark])
            assert scored["accuracy"] * scored["num"] == pytest.approx(right, abs=1e-4), (benchmark, protocol)
            assert scored["format"] == pytest.approx(condition["format_rate"], abs=1e-6)


def without_seconds(value: Any) -> Any:
    """Results without the times that answers took, which no two runs have in common."""
    if isinstance(value, dict):
        return {name: without_seconds(one) for name, one in value.items() if name != "seconds"}
    return [without_seconds(one) for one in value] if isinstance(value, list) else value


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_kills_of_the_command_change_nothing_and_leave_no_process(
    hf: Path, downloads: Path, model_dir: Path, tmp_path: Path
) -> None:
    out, draw = tmp_path / "out", random.Random(0)
    whole = command(downloads, model_dir, out, "--model", str(model_dir), "--engine", "hf")
    log = tmp_path / "log"
    ended_with: list[int | None] = []

    def num_stored() -> int:
        return (out / "answers.jsonl").read_bytes().count(b"\n") if (out / "answers.jsonl").exists() else 0

    for moment in sorted(draw.sample(range(2 * NUM_QUESTIONS), NUM_KILLS)):
        with log.open("w") as file:
            process = psutil.Popen(whole, stdout=file, stderr=file, env=ENVIRONMENT)
        wait_until(partial(lambda one, wanted: num_stored() > wanted or one.poll() is not None, process, moment))
        # On a busy machine it may have ended meanwhile. The next one is then killed while it starts.
        children: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            children = process.children(recursive=True)
            process.send_signal(signal.SIGKILL)
        ended_with.append(process.wait())
        assert ended_with[-1] in (0, -signal.SIGKILL), log.read_text()[-3000:]
        for child in children:
            wait_until(partial(has_ended, child))
    assert -signal.SIGKILL in ended_with
    run(whole)
    check_complete(out)
    assert results_text(without_seconds(results_in(out))) == results_text(without_seconds(results_in(hf)))


def texts(out: Path) -> dict[tuple[str, str, str], tuple[Any, ...]]:
    """What was said, with its number of tokens and whether it was finished."""
    names = ("text", "num_tokens", "num_prompt_tokens", "num_frames", "is_finished", "is_control_felt")
    return {place: tuple(answer[name] for name in names) for place, answer in answers_in(out).items()}


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_says_what_hugging_face_says_and_both_compare_as_equal(
    hf: Path, downloads: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vllm", reason="the vLLM environment only")
    out = tmp_path / "out"
    flags = ("--engine", "vllm", "--max-model-len", "1024", "--kv-cache-gb", "0.1")
    run(command(downloads, model_dir, out, "--model", str(model_dir), *flags))
    check_complete(out)
    assert texts(out) == texts(hf)
    assert main(["compare", str(hf), str(out), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)["benchmarks"]
    assert list(compared) == list(BENCHMARKS)
    for benchmark, found in compared.items():
        assert [one["num_items"] for one in found["comparisons"]] == [len(EXPECTED[benchmark])] * len(CONTROLS)
        for one in found["comparisons"]:
            assert {figures["difference"] for figures in one["protocols"].values()} == {0.0}
    page = tmp_path / "both.html"
    assert main(["report", str(hf), str(out), "--page", str(page)]) == 0
    assert str(hf) in page.read_text() and str(out) in page.read_text()


@pytest.mark.vllm
@pytest.mark.slow
def test_a_chat_server_is_shown_every_frame(
    hf: Path, downloads: Path, model_dir: Path, served: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ("--server-url", f"{served}/v1", "--served-model", str(model_dir), "--frame-format", "png")
    run(command(downloads, model_dir, out, *flags))
    check_complete(out)
    answers, of_hf = answers_in(out), answers_in(hf)
    for (benchmark, item_id, condition), answer in answers.items():
        hidden = answers[benchmark, item_id, f"{NUM_FRAMES} hidden"]
        num_pictures = 0 if "hidden" in condition else NUM_FRAMES
        assert answer["num_prompt_tokens"] == hidden["num_prompt_tokens"] + TOKENS_PER_PICTURE * num_pictures
        if not num_pictures:  # the same text without media is the same prompt
            assert answer["text"] == of_hf[benchmark, item_id, condition]["text"]
