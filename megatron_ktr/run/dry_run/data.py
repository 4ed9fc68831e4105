"""The data check of a dry run: what training would read, as far as it is here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_ktr.config import Config
from megatron_ktr.data.dataset import PromptDataset
from megatron_ktr.data.skips import SkipCounter
from megatron_ktr.data.template import check_vocabulary, load_tokenizer
from megatron_ktr.data.tokenizer import Tokenizer
from megatron_ktr.rollout.questions import draws_of, open_records, read_questions
from megatron_ktr.run.dry_run.model import KnownModel


@dataclass(frozen=True)
class KnownData:
    """What is known of the run's records."""

    lines: tuple[str, ...]
    """For the console."""
    num_records: int | None
    """The records of an epoch; None if a file is not here."""
    not_checked: tuple[str, ...] = ()


def find_data(config: Config, model: KnownModel) -> KnownData:
    """Reads the run's question files, or its recorded rollouts, as training does: records that cannot be used are
    reported and left out. Without the model's directory only the files' own records are read, because media, wording
    and the length of prompts depend on tokenizer and preprocessor.

    Raises:
        UserError: training would refuse a file.
    """
    sources = config.data.sources
    paths = [source.path for source in sources] or [str(config.rollout.replay_path)]
    missing = [path for path in paths if not Path(path).exists()]
    if missing:
        words = f"the records of {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not there"
        lines = tuple(f"{path}: {'not there' if path in missing else 'there'}" for path in paths)
        return KnownData(lines, None, not_checked=(words,))
    if model.is_here:
        return _read(config, model)
    if not sources:
        return KnownData((f"{paths[0]}: there",), None, not_checked=("the recorded rollouts, without a tokenizer",))
    numbers = [len(open_records(config, source, is_spokesman=True)) for source in sources]
    lines = tuple(f"{path}: {number} records" for path, number in zip(paths, numbers, strict=True))
    not_checked = ("whether the records can be used (media, options, wording, length of prompts), without the model",)
    return KnownData(lines, sum(draws_of(sources, numbers)), not_checked=not_checked)


def tokenizer_of(config: Config, model: KnownModel) -> Tokenizer:
    """The tokenizer of a model that is here, as training reads it."""
    tokenizer = load_tokenizer(config.model.model, chat_template=config.data.chat_template)
    check_vocabulary(tokenizer, vocab_size=model.config.text.vocab_size)
    return tokenizer


def _read(config: Config, model: KnownModel) -> KnownData:
    vocab_size, tokenizer = model.config.text.vocab_size, tokenizer_of(config, model)
    questions = read_questions(config, tokenizer=tokenizer, vocab_size=vocab_size, is_spokesman=True)
    dataset = PromptDataset.of_sources(
        questions.sources,
        seed=config.trainer.seed,
        shuffle=config.data.shuffle_data,
        rank=0,
        size=1,
        skips=SkipCounter(max_skip_share=config.data.max_skip_share),
    )
    lines = []
    for source in questions.sources:
        number = len(source.records)
        lines.append(f"{source.name or config.rollout.replay_path}: {number} records, {len(source.left_out)} left out")
    lines += [f"wording: {line}" for line in dataset.wordings]
    media = "that media decode and prompts are not too long, which training finds when it draws a record"
    return KnownData(tuple(lines), dataset.num_kept, not_checked=(media,))
