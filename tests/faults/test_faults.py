"""Over 200 seeded faults; after each of them every invariant of ``invariants.py`` is checked.

``make faults-nightly`` runs thousands. A failure names the command that repeats it.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from megatron_ktr import errors
from tests.faults import zygote
from tests.faults.__main__ import BEGIN, DOCUMENT, END, RESULTS, table
from tests.faults.damage import KINDS, damage_file
from tests.faults.harness import run_seeds
from tests.faults.injector import Injector, Plan
from tests.faults.invariants import (
    DOCUMENTED,
    Facts,
    check_end,
    check_nothing_left,
    check_same,
    check_same_but_for_skips,
)
from tests.faults.scenarios import AREAS
from tests.faults.world import World, finish
from tests.faults.zygote import Ended, Job, Process
from tests.support.paths import REPOSITORY


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()


def test_ci_draws_at_least_200_faults() -> None:
    assert sum(quota for _, quota in AREAS.values()) >= 200


@pytest.mark.slow
@pytest.mark.parametrize("area", AREAS)
def test_every_invariant_holds_after_every_fault(world: World, area: str) -> None:
    quota = AREAS[area][1]
    summary = run_seeds(world, [(area, seed) for seed in range(quota)])
    assert not summary.failures, "\n".join(f"{one['text']}\n  {one['command']}" for one in summary.failures)
    if area in summary.left_out:
        pytest.skip(summary.left_out[area])
    assert summary.num_faults + summary.missed[area] == quota
    assert summary.num_faults >= 3 * quota / 4, "nothing happened to the other commands before they ended"


# The harness itself: an invariant that is broken is seen.


def test_the_codes_of_the_program_are_those_of_the_documentation() -> None:
    text = (REPOSITORY / "docs" / "launching.md").read_text(encoding="utf-8")
    table_of_codes = text.partition("| exit code | meaning |\n|---|---|\n")[2].partition("\n\n")[0]
    first_cells = " ".join(line.split("|")[1] for line in table_of_codes.splitlines())
    assert {int(number) for number in re.findall(r"\d+", first_cells)} == DOCUMENTED
    of_code = (errors.__doc__ or "").partition("what ended the command\n")[2].partition("\n\n")[0]
    assert [int(line.split()[0]) for line in of_code.splitlines()] == sorted(DOCUMENTED)


def test_a_fault_whose_moment_never_comes_is_not_counted(tmp_path: Path) -> None:
    run = Path(tmp_path, "run")
    for k, has_fired in ((1, True), (2, False)):
        injector = Injector(Plan("rename", k, "full"), root=str(run), fired=tmp_path / f"fired {k}")
        with contextlib.suppress(OSError):
            injector.reach("rename")
        assert injector.fired.exists() == has_fired


def test_a_command_that_hangs_is_seen_and_does_not_hang_the_harness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zygote, "PATIENCE_SECONDS", 0.0)
    with subprocess.Popen(["sleep", "infinity"]) as child:
        process = Process(cast(Any, None), Job("", (), tmp_path, "faulted"), child.pid)
        with pytest.raises(AssertionError, match="I5: faulted in .* does not end"):
            finish(process)
    assert child.returncode == -signal.SIGKILL


def test_whatever_is_left_in_scratch_or_shared_memory_is_seen(tmp_path: Path) -> None:
    check_nothing_left(tmp_path / "tmp", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    (tmp_path / "shm" / "frames").touch()
    with pytest.raises(AssertionError, match="I4: left behind in shm: frames"):
        check_nothing_left(tmp_path / "tmp", tmp_path / "shm")


def test_a_traceback_and_an_unknown_exit_code_are_seen() -> None:
    for ended in (Ended(70, "", "Traceback (most recent call last):"), Ended(1, "", ""), Ended(2, "", "no error line")):
        with pytest.raises(AssertionError, match="I5"):
            check_end(ended)


def test_a_changed_number_response_or_weight_is_seen() -> None:
    def facts(loss: float = 0.5, token: int = 3, digest: str = "a") -> Facts:
        return Facts({1: {"loss": loss}}, {"step_00000001.jsonl": [{"token_ids": [token]}]}, {"model": digest})

    for check in (check_same, check_same_but_for_skips):
        check(facts(), facts())
        for other in (facts(loss=0.50000001), facts(token=4), facts(digest="b")):
            with pytest.raises(AssertionError, match="I3"):
                check(other, facts())


def test_a_sample_that_a_worker_cost_excuses_other_numbers_only_from_its_batch_on() -> None:
    def facts(losses: tuple[float, ...], skipped: tuple[float, ...]) -> Facts:
        records = {
            n: {"loss": loss, "num_skipped": skips}
            for n, (loss, skips) in enumerate(zip(losses, skipped, strict=True), 1)
        }
        return Facts(records, {}, {"model": str(losses)})

    whole = facts((0.1, 0.2, 0.3, 0.4), (0, 0, 0, 0))
    check_same_but_for_skips(facts((0.1, 0.2, 0.31, 0.41), (0, 0, 0, 1)), whole)
    with pytest.raises(AssertionError, match="I3: step 2"):
        check_same_but_for_skips(facts((0.1, 0.21, 0.31, 0.41), (0, 0, 0, 1)), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_damage_changes_the_file(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"some content")
    other.write_bytes(b"something else")
    assert damage_file(path, random.Random(0), kinds=(kind,), others=(path, other)) == kind
    assert not path.exists() or path.read_bytes() != b"some content"


def test_the_table_in_the_documentation_is_that_of_the_results() -> None:
    found = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert found == table(json.loads(RESULTS.read_text(encoding="utf-8")))
