"""Makes everything `examples/replay.yaml` needs, offline: a tiny random model, videos and recorded rollouts.

    python tools/make_replay_example.py --out runs/replay_example [--videos FILE ...]

Videos are drawn (coloured shapes, real mp4 files), or your own files given by --videos. Each gets a question and
--num-generations recorded responses, right, guessed and malformed ones, with their rewards.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

from megatron_ktr.config.limits import LARGEST_INTEGER
from megatron_ktr.data.synthetic import DEFAULT_TASKS, corpus, draw_scene, guess, record_of, render, write_video
from megatron_ktr.data.tiny_model import save_tiny_model
from megatron_ktr.errors import Parser, UserError, run_cli, whole
from megatron_ktr.rewards import load_rewards


def recorded_responses(scene, *, number: int, rng: random.Random) -> list[str]:
    """Draws ``number`` responses: right answers, guesses, and a few without the answer block."""
    texts = []
    for _ in range(number):
        kind = rng.random()
        if kind < 0.4:
            texts.append(scene.response())
        elif kind < 0.9:
            texts.append(guess(scene, rng))
        else:
            texts.append("i guess so")
    return texts


def make_example(out_dir: Path, *, videos: list[Path], num_prompts: int, num_generations: int, seed: int) -> None:
    """Writes ``model/``, ``videos/`` and ``rollouts.jsonl`` below ``out_dir``."""
    if out_dir.exists() and any(out_dir.iterdir()):
        raise UserError(f"--out {out_dir} is not empty; choose another directory")
    missing = [str(path) for path in videos if not path.is_file()]
    if missing:
        raise UserError(f"--videos: no such file: {', '.join(missing)}")
    rng, rewards = random.Random(seed), load_rewards(("accuracy", "format", "soft_choice"))
    (out_dir / "videos").mkdir(parents=True)
    save_tiny_model(out_dir / "model", corpus=corpus(), seed=seed, num_layers=4)
    lines = []
    for index in range(num_prompts):
        scene = draw_scene(DEFAULT_TASKS[index % len(DEFAULT_TASKS)], rng)
        if videos:
            source = videos[index % len(videos)]
            name = f"videos/{index:03d}_{source.name}"
            shutil.copyfile(source, out_dir / name)
        else:
            name = f"videos/{index:03d}.mp4"
            write_video(out_dir / name, render(scene))
        record = record_of(scene, problem_id=str(index + 1), path=name)
        del record["response"]
        record["responses"] = [
            {"text": text, "rewards": {name: reward(text, record) for name, reward in rewards.items()}}
            for text in recorded_responses(scene, number=num_generations, rng=rng)
        ]
        lines.append(json.dumps(record))
    (out_dir / "rollouts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    parser.add_argument("--videos", type=Path, nargs="*", default=[], help="your own video files; none = drawn ones")
    parser.add_argument("--num-prompts", type=whole(), default=12, help="recorded questions (default 12)")
    parser.add_argument("--num-generations", type=whole(), default=8, help="responses per question (default 8)")
    parser.add_argument("--seed", type=whole(low=0, high=LARGEST_INTEGER), default=0)
    arguments = parser.parse_args()
    make_example(
        arguments.out,
        videos=arguments.videos,
        num_prompts=arguments.num_prompts,
        num_generations=arguments.num_generations,
        seed=arguments.seed,
    )
    print(f"wrote {arguments.out}: model, {arguments.num_prompts} questions with recorded responses")


if __name__ == "__main__":
    run_cli(main)
