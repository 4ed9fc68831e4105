"""Makes synthetic questions about videos of coloured shapes, in real mp4 files, for demos, tests and controls.

Each task needs another kind of information from the video:

    colour   one shape on dark ground: which colour is it?                       what is seen
    count    one to four shapes of one colour: how many?  (numerical answer)     what is seen
    order    a shape of one colour, later one of another: which colour came      when it is seen
             first (or last)? Two options were seen, two were not, so order
             alone decides between the two that were.
    motion   a shape moves: left, right, up or down?                             when it is seen
    shape    one shape: circle, square or triangle?                              what is seen

The tiny model of ``tiny_model.py`` learns colour, count and order in minutes on one core. It did not learn motion and
shape in that time, so these are off by default. Every record has a field ``reasoning``, a short text for supervised
fine-tuning. Training questions and held-out questions never share a scene.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ktr.errors import UserError

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 80, 240),
    "yellow": (240, 220, 40),
    "purple": (170, 50, 210),
    "white": (240, 240, 240),
}
NUMBERS = ("1", "2", "3", "4")
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
LETTERS = ("A", "B", "C", "D")
TASKS = ("colour", "count", "order", "motion", "shape")
DEFAULT_TASKS = ("colour", "count", "order")
GROUND = (24, 24, 28)


@dataclass(frozen=True)
class Blob:
    """One shape. Centre and radius are shares of the frame's side; the shape is shown from ``first_frame`` to
    ``last_frame`` and moves by ``drift`` per frame."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float
    first_frame: int
    last_frame: int
    drift: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """A question with everything needed to draw its video."""

    task: str
    problem: str
    answer: str
    """The word or number asked for."""
    options: tuple[str, ...]
    """The four offered words in order of their letters; empty for numerical answers."""
    reasoning: str
    blobs: tuple[Blob, ...]

    @property
    def solution(self) -> str:
        """What the answer block must contain: the letter, or the number."""
        return LETTERS[self.options.index(self.answer)] if self.options else self.answer

    def response(self, *, answer: str | None = None, reasoning: str | None = None) -> str:
        """A complete response that ends in ``answer`` (default: the right one) after ``reasoning``.

        The option's letter directly follows the answer word, so that the model can look it up in one step instead of
        two.
        """
        word = self.answer if answer is None else answer
        symbol = LETTERS[self.options.index(word)] if self.options else word
        thought = f"{self.reasoning if reasoning is None else reasoning} so {word}"
        return f"<think> {thought} {symbol} </think> <answer> {symbol} </answer>"


def draw_scene(task: str, rng: random.Random, *, num_frames: int = 8) -> Scene:
    """A random scene of ``task``."""
    makers = {"colour": _colour, "count": _count, "order": _order, "motion": _motion, "shape": _shape}
    if task not in makers:
        raise UserError(f"task {task!r} is unknown, expected some of {', '.join(TASKS)}")
    return makers[task](rng, num_frames)


def render(scene: Scene, *, num_frames: int = 8, size: int = 56) -> np.ndarray:
    """uint8 [F, size, size, 3]: the scene's frames."""
    frames = np.empty((num_frames, size, size, 3), dtype=np.uint8)
    frames[:] = GROUND
    ys, xs = np.mgrid[0:size, 0:size]
    for blob in scene.blobs:
        for index in range(blob.first_frame, min(blob.last_frame, num_frames - 1) + 1):
            age = index - blob.first_frame
            dx = (xs + 0.5) / size - (blob.x + blob.drift[0] * age)
            dy = (ys + 0.5) / size - (blob.y + blob.drift[1] * age)
            frames[index][_inside(blob.kind, dx, dy, blob.radius)] = COLOURS[blob.colour]
    return frames


def write_video(path: Path, frames: np.ndarray, *, fps: int = 2) -> None:
    """Encodes frames as H.264 mp4, nearly lossless."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "8", "preset": "veryfast"})
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


GUESS_SHARE = 0.6
"""The share of responses in ``sft_guess.json`` that name an option without looking at the video."""


def make_dataset(
    out_dir: Path,
    *,
    num_train: int,
    num_eval: int,
    seed: int = 0,
    tasks: Sequence[str] = DEFAULT_TASKS,
    order_share: float = 0.5,
    num_frames: int = 8,
    size: int = 56,
) -> dict[str, list[dict[str, Any]]]:
    """Writes ``videos/`` and the files below; returns the records by file stem.

        train.json        questions with right answers, for reinforcement learning
        eval.json         held-out questions; no scene of them is in any other file
        sft_lookup.json   text only: which letter stands before a word (the skill the others build on)
        sft.json          the training questions with right reasoning, and some look-ups
        sft_guess.json    the same, but ``GUESS_SHARE`` of the responses guess; reinforcement learning unlearns this

    If the task order is enabled, ``order_share`` of the questions are order questions; the other tasks share the rest.
    Raises UserError if ``out_dir`` already holds a data set, or if the tasks have too few different scenes.
    """
    if any((out_dir / name).exists() for name in ("train.json", "eval.json", "videos")):
        raise UserError(f"{out_dir} already holds a data set; choose another directory")
    rng = random.Random(seed)
    scenes = _distinct_scenes(num_train + num_eval, tasks, rng, order_share, num_frames)
    files: dict[str, list[dict[str, Any]]] = {"train": [], "eval": [], "sft_guess": []}
    for index, scene in enumerate(scenes):
        split = "train" if index < num_train else "eval"
        number = len(files[split])
        name = f"videos/{split}_{number:05d}.mp4"
        write_video(out_dir / name, render(scene, num_frames=num_frames, size=size))
        record = record_of(scene, problem_id=f"{split}-{number}", path=name)
        files[split].append(record)
        if split == "train":
            is_guess = rng.random() < GUESS_SHARE
            files["sft_guess"].append({**record, "response": guess(scene, rng)} if is_guess else record)
    files["sft_lookup"] = [lookup_record(rng, number=number) for number in range(num_train)]
    some_lookups = files["sft_lookup"][: num_train // 10]
    files["sft"] = files["train"] + some_lookups
    files["sft_guess"] = files["sft_guess"] + some_lookups
    for stem, records in files.items():
        (out_dir / f"{stem}.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return files


def guess(scene: Scene, rng: random.Random) -> str:
    """A response that names a random option without looking."""
    return scene.response(answer=rng.choice(scene.options or NUMBERS), reasoning="i guess")


def lookup_record(rng: random.Random, *, number: int) -> dict[str, Any]:
    """A question without video, which asks for the letter of a word among the options."""
    words = rng.choice((list(COLOURS), list(SHAPES), list(DIRECTIONS)))
    word = rng.choice(words)
    scene = Scene("lookup", f"which letter is {word}", word, _options(rng, [word], words), f"i see {word}", ())
    record = record_of(scene, problem_id=f"lookup-{number}", path="")
    del record["path"]
    return {**record, "data_type": "text"}


def record_of(scene: Scene, *, problem_id: str, path: str) -> dict[str, Any]:
    """The scene as a Video-R1 record, with ``task``, ``reasoning`` and ``response`` beside the usual keys."""
    return {
        "problem_id": problem_id,
        "problem": scene.problem,
        "data_type": "video",
        "problem_type": "multiple choice" if scene.options else "numerical",
        "options": [f"{letter} {word}" for letter, word in zip(LETTERS, scene.options, strict=False)],
        "solution": f"<answer>{scene.solution}</answer>",
        "path": path,
        "task": scene.task,
        "reasoning": scene.reasoning,
        "response": scene.response(),
        "choices": list(scene.options or NUMBERS),
    }


def corpus() -> list[str]:
    """Every sentence the tasks can produce, for training the tokenizer."""
    rng = random.Random(0)
    scenes = [draw_scene(task, rng) for task in TASKS for _ in range(200)]
    scenes += [Scene("lookup", "which letter is red", "red", ("red",), "i see red", ())]
    lines = [f"user {scene.problem} {' '.join(_option_texts(scene))} assistant" for scene in scenes]
    lines += [scene.response() for scene in scenes]
    lines += [scene.response(reasoning="i guess") for scene in scenes]
    return lines


def _option_texts(scene: Scene) -> Iterator[str]:
    return (f"{letter} {word}" for letter, word in zip(LETTERS, scene.options, strict=False))


def _distinct_scenes(
    number: int, tasks: Sequence[str], rng: random.Random, order_share: float, num_frames: int
) -> list[Scene]:
    others = [task for task in tasks if task != "order"]
    seen: set[Scene] = set()
    scenes: list[Scene] = []
    for _ in range(number * 20):
        if len(scenes) == number:
            return scenes
        is_order = "order" in tasks and (not others or rng.random() < order_share)
        scene = draw_scene("order" if is_order else rng.choice(others), rng, num_frames=num_frames)
        # Scenes that differ only in their options have the same picture and count as the same scene, because a held-out
        # question must not show a picture that was trained on.
        picture = dataclasses.replace(scene, options=(), problem="", answer="", reasoning="")
        if picture not in seen:
            seen.add(picture)
            scenes.append(scene)
    raise UserError(f"only {len(scenes)} different scenes found for {number} questions of {', '.join(tasks)}")


def _options(rng: random.Random, must_have: Sequence[str], pool: Sequence[str]) -> tuple[str, ...]:
    rest = [word for word in pool if word not in must_have]
    options = [*must_have, *rng.sample(rest, min(len(LETTERS), len(pool)) - len(must_have))]
    rng.shuffle(options)
    return tuple(options)


def _place(rng: random.Random, radius: float) -> tuple[float, float]:
    first, second = (round(rng.uniform(radius + 0.03, 0.97 - radius), 3) for _ in range(2))
    return first, second


def _blob(rng: random.Random, colour: str, first: int, last: int) -> Blob:
    radius = round(rng.uniform(0.2, 0.32), 3)
    x, y = _place(rng, radius)
    return Blob(rng.choice(SHAPES), colour, x, y, radius, first, last)


def _colour(rng: random.Random, num_frames: int) -> Scene:
    colour = rng.choice(list(COLOURS))
    blob = _blob(rng, colour, 0, num_frames - 1)
    options = _options(rng, [colour], list(COLOURS))
    return Scene("colour", "which colour is it", colour, options, f"i see {colour}", (blob,))


def _count(rng: random.Random, num_frames: int) -> Scene:
    number, colour = rng.randint(1, 4), rng.choice(list(COLOURS))
    # One shape per quadrant, so that none hides another.
    corners = rng.sample([(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)], number)
    blobs = tuple(
        Blob(
            rng.choice(SHAPES),
            colour,
            round(x + rng.uniform(-0.04, 0.04), 3),
            round(y + rng.uniform(-0.04, 0.04), 3),
            round(rng.uniform(0.14, 0.19), 3),
            0,
            num_frames - 1,
        )
        for x, y in corners
    )
    return Scene("count", "how many are there", str(number), (), f"i see {number}", blobs)


def _order(rng: random.Random, num_frames: int) -> Scene:
    first, second = rng.sample(list(COLOURS), 2)
    half = num_frames // 2
    blobs = (_blob(rng, first, 0, half - 1), _blob(rng, second, half, num_frames - 1))
    asked = rng.choice(("first", "last"))
    answer = first if asked == "first" else second
    options = _options(rng, [first, second], list(COLOURS))
    return Scene("order", f"which colour came {asked}", answer, options, f"first {first} then {second}", blobs)


def _motion(rng: random.Random, num_frames: int) -> Scene:
    direction = rng.choice(list(DIRECTIONS))
    step_x, step_y = DIRECTIONS[direction]
    blob = Blob(
        rng.choice(SHAPES),
        rng.choice(list(COLOURS)),
        x=0.5 - 0.3 * step_x if step_x else round(rng.uniform(0.3, 0.7), 3),
        y=0.5 - 0.3 * step_y if step_y else round(rng.uniform(0.3, 0.7), 3),
        radius=round(rng.uniform(0.12, 0.18), 3),
        first_frame=0,
        last_frame=num_frames - 1,
        drift=(0.6 * step_x / (num_frames - 1), 0.6 * step_y / (num_frames - 1)),
    )
    options = _options(rng, [direction], list(DIRECTIONS))
    return Scene("motion", "which way does it move", direction, options, f"it moves {direction}", (blob,))


def _shape(rng: random.Random, num_frames: int) -> Scene:
    blob = _blob(rng, rng.choice(list(COLOURS)), 0, num_frames - 1)
    options = _options(rng, [blob.kind], SHAPES)
    return Scene("shape", "which shape is it", blob.kind, options, f"i see a {blob.kind}", (blob,))


def _inside(kind: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    if kind == "circle":
        return dx**2 + dy**2 <= radius**2
    if kind == "square":
        return np.maximum(abs(dx), abs(dy)) <= radius * math.sqrt(math.pi) / 2  # the circle's area
    return (dy <= radius * 0.7) & (dy >= -radius + 2 * abs(dx) * 0.85)
