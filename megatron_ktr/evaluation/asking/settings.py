"""What was asked of whom: the settings of an evaluation, their file ``settings.json``, and the keys of its answers.

The key of an answer is a digest of everything that decides it, and of nothing else: not of the protocol, by which it is
only judged, nor of places of files. So an output directory can grow (more benchmarks, frames, controls, votes, a higher
limit), and nothing is asked twice; and an answer to a question that has changed since is not used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_ktr.data.media.request import media_sources
from megatron_ktr.data.records import NORMALISED, record_digest
from megatron_ktr.errors import UserError, printable
from megatron_ktr.evaluation.asking.scaling import Ask, Voting, frames_of, rule_of, sampling_of, votes_of
from megatron_ktr.evaluation.asking.stored import made_of
from megatron_ktr.evaluation.benchmark import FrameRule
from megatron_ktr.evaluation.engines.base import AnswerSampling
from megatron_ktr.evaluation.item import Condition, Item
from megatron_ktr.evaluation.reading.media_places import SUFFIXES
from megatron_ktr.files.atomic import write_atomically
from megatron_ktr.files.json_files import read_json_object, to_json

FILE = "settings.json"
FORMAT = 1
_MEDIA_FIELDS = ("path", "image", "images", "video", "videos")
_OPTIONS = {
    "model.identity": "--model",
    "seed": "--seed",
    "preprocess": "--image-max-pixels, or the preprocessing of --model",
    "voting": "--vote-temperature and --vote-top-p",
    "wording_digest": "--prompt-template",
    "sampling": "--temperature, --top-p and --max-tokens",
    "frames": "--frame-sampling, --fps and --max-pixels",
}
"""For each setting that may not change, the options that decide it."""


@dataclass(frozen=True)
class BenchmarkSettings:
    """How one benchmark is asked."""

    path: str
    """As it was given. The questions themselves are in ``items.jsonl``."""
    media_root: str
    wording: str
    """One line about whose words they are."""
    wording_digest: str
    sampling: AnswerSampling
    frames: FrameRule
    num_items: int
    """Questions of the benchmark, also those that a limit leaves out."""
    limit: int | None = None
    """The number of questions that were chosen; None: all of them."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What was asked of whom."""

    model: str
    """The model as the user named it."""
    identity: Mapping[str, str]
    """``AnswerEngine.identity``."""
    seed: int
    preprocess: Mapping[str, Any]
    """Sizes of frames and patches (``data/media/preprocess.py``). The most pixels of a frame are the benchmarks'."""
    voting: Voting
    benchmarks: Mapping[str, BenchmarkSettings]
    asked: tuple[tuple[str, Condition], ...]

    @property
    def conditions(self) -> tuple[Condition, ...]:
        return tuple(dict.fromkeys(condition for _, condition in self.asked))

    def sampling(self, ask: Ask) -> AnswerSampling:
        return sampling_of(ask, self.benchmarks[ask.item.benchmark].sampling, self.voting)

    def frame_rule(self, ask: Ask) -> FrameRule:
        return rule_of(ask, self.benchmarks[ask.item.benchmark].frames)

    def key(self, ask: Ask) -> str:
        """The digest by which the answer is stored."""
        # The majority of 9 votes can use the 5 that were asked for before.
        scaling = ask.condition.scaling.partition(":")[0]
        return _digest(
            {
                "item": [ask.item.benchmark, ask.item.item_id],
                "record": digest_of(ask.item),
                "control": ask.condition.control,
                "frames": frames_of(ask),
                "frame_rule": dataclasses.asdict(self.frame_rule(ask)),
                "preprocess": self.preprocess,
                "wording": self.benchmarks[ask.item.benchmark].wording_digest,
                "sampling": dataclasses.asdict(self.sampling(ask)),
                "seed": self.seed,
                "scaling": [scaling, ask.round, ask.vote],
                "model": dict(self.identity),
            }
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": {"name": self.model, "identity": dict(self.identity)},
            "seed": self.seed,
            "preprocess": dict(self.preprocess),
            "voting": dataclasses.asdict(self.voting),
            "benchmarks": {name: dataclasses.asdict(found) for name, found in self.benchmarks.items()},
            "asked": [[name, dataclasses.asdict(condition)] for name, condition in self.asked],
        }

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> EvaluationSettings:
        """Raises KeyError, TypeError or ValueError for anything that ``as_json`` does not give."""
        if value["format"] != FORMAT:
            raise ValueError(f"format {value['format']}, expected {FORMAT}")
        model = made_of(_Model, value["model"])
        settings = cls(
            model=model.name,
            identity=model.identity,
            **{name: value[name] for name in ("seed", "preprocess")},
            voting=made_of(Voting, value["voting"]),
            benchmarks={name: made_of(BenchmarkSettings, found) for name, found in value["benchmarks"].items()},
            asked=tuple((name, made_of(Condition, condition)) for name, condition in value["asked"]),
        )
        if not isinstance(settings.seed, int) or not isinstance(settings.preprocess, dict):
            raise ValueError("expected a whole number in seed, and an object in preprocess")
        if {name for name, _ in settings.asked} != settings.benchmarks.keys():
            raise ValueError("expected every benchmark in asked, and no other")
        for _, condition in settings.asked:
            if votes_of(condition) < 1 or condition.frames < 1:
                raise ValueError(f"{condition} asks for nothing")
        return settings

    def after(self, earlier: EvaluationSettings, *, directory: Path) -> EvaluationSettings:
        """These settings with all that ``earlier`` has asked for in the same directory.

        Raises:
            UserError: a setting differs that decides what an answer is; it names the option and both values.
        """
        for name, ours, theirs in _differences(self, earlier):
            raise UserError(
                f"{_OPTIONS[name.rpartition(': ')[2]]}: --out {directory} holds an evaluation with {name} {theirs}, "
                f"and this one has {ours}; use the same as before, or another --out"
            )
        for name, new in self.benchmarks.items():
            old = earlier.benchmarks.get(name)
            if old is not None and (old.limit or old.num_items) > (new.limit or new.num_items):
                raise UserError(
                    f"--limit: --out {directory} holds {old.limit or old.num_items} questions of {name}, and this "
                    f"command wants {new.limit or new.num_items}; a directory can only grow, so use another --out"
                )
        return dataclasses.replace(
            self,
            benchmarks={**earlier.benchmarks, **self.benchmarks},
            asked=tuple(dict.fromkeys((*earlier.asked, *self.asked))),
        )

    def as_bytes(self) -> bytes:
        """The content of the file.

        Raises:
            UserError: the name of a file or of the model has bytes that are no text.
        """
        try:
            return (to_json(self.as_json(), indent=2, ensure_ascii=False) + "\n").encode()
        except UnicodeEncodeError as error:
            raise UserError(
                "--benchmark, --media-root or --model: a name has bytes that are no UTF-8, so that it cannot be "
                f"written down: {printable(str(error.object)[max(0, error.start - 30) : error.end + 10])}; rename it"
            ) from None

    def write(self, directory: Path) -> None:
        write_atomically(directory / FILE, self.as_bytes())


@dataclass(frozen=True)
class _Model:
    """The field ``model`` of the file."""

    name: str
    identity: Mapping[str, str]


def read_settings(directory: Path) -> EvaluationSettings | None:
    """The settings of an output directory; None if it has none.

    Raises:
        UserError: the file is none of ours.
    """
    path = directory / FILE
    if not path.exists():
        return None
    try:
        return EvaluationSettings.of_json(read_json_object(path))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not the settings file of an evaluation of this version: {error!r}") from error


def digest_of(item: Item) -> str:
    """A digest of the question: its text, options, solution and all else that its file says.

    Of its media the paths count as the benchmark's file says them (``Item.video_id``), without the container: neither
    the folder in which this download has them, nor whether that has 7.mp4 or 7.mkv.
    """
    record = {name: value for name, value in item.record.items() if name not in (*NORMALISED, *_MEDIA_FIELDS)}
    names = [PurePosixPath(path).name for source in media_sources(item.record) for path in source.paths]
    paths = [_without_container(path) for path in (item.video_id, *names)]
    return record_digest({**record, "paths of media": paths})


def _without_container(path: str) -> str:
    stem, _, suffix = path.rpartition(".")
    return stem if f".{suffix}" in SUFFIXES else path


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _differences(ours: EvaluationSettings, theirs: EvaluationSettings) -> Iterator[tuple[str, str, str]]:
    """(name, our value, their value) of every setting that may not change and has."""
    pairs: list[tuple[str, Any, Any]] = [
        ("model.identity", dict(ours.identity), dict(theirs.identity)),
        ("seed", ours.seed, theirs.seed),
        ("preprocess", dict(ours.preprocess), dict(theirs.preprocess)),
        ("voting", dataclasses.asdict(ours.voting), dataclasses.asdict(theirs.voting)),
    ]
    for benchmark in ours.benchmarks.keys() & theirs.benchmarks.keys():
        new, old = ours.benchmarks[benchmark], theirs.benchmarks[benchmark]
        pairs += [
            (f"{benchmark}: wording_digest", new.wording_digest, old.wording_digest),
            (f"{benchmark}: sampling", dataclasses.asdict(new.sampling), dataclasses.asdict(old.sampling)),
            (f"{benchmark}: frames", dataclasses.asdict(new.frames), dataclasses.asdict(old.frames)),
        ]
    for name, new, old in pairs:
        if _digest(new) != _digest(old):
            yield name, *_only_changes(new, old)


def _only_changes(new: Any, old: Any) -> tuple[str, str]:
    """The two values as text; of objects only the fields that differ."""
    if not isinstance(new, dict):
        return str(new), str(old)
    names = [name for name in {**old, **new} if new.get(name) != old.get(name)]
    texts = [", ".join(f"{name} {value.get(name, 'absent')}" for name in names) for value in (new, old)]
    return texts[0], texts[1]
