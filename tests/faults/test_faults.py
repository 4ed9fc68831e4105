"""Over 200 seeded faults; after each of them every invariant of ``invariants.py`` is checked.

``make faults-nightly`` runs thousands. A failure names the command that repeats it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.__main__ import RESULTS, table
from tests.faults.damage import KINDS, damage_file
from tests.faults.harness import run_seeds
from tests.faults.invariants import Facts, check_end, check_same
from tests.faults.scenarios import AREAS
from tests.faults.world import World
from tests.faults.zygote import Ended
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
    assert summary.num_faults == quota


# The harness itself: an invariant that is broken is seen.


def test_a_traceback_and_an_unknown_exit_code_are_seen() -> None:
    for ended in (Ended(70, "", "Traceback (most recent call last):"), Ended(1, "", ""), Ended(2, "", "no error line")):
        with pytest.raises(AssertionError, match="I5"):
            check_end(ended)


def test_a_changed_number_response_or_weight_is_seen() -> None:
    def facts(loss: float = 0.5, token: int = 3, digest: str = "a") -> Facts:
        return Facts({1: {"loss": loss}}, {"step_00000001.jsonl": [{"token_ids": [token]}]}, {"model": digest})

    check_same(facts(), facts())
    for other in (facts(loss=0.50000001), facts(token=4), facts(digest="b")):
        with pytest.raises(AssertionError, match="I3"):
            check_same(other, facts())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_damage_changes_the_file(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"some content")
    other.write_bytes(b"something else")
    assert damage_file(path, random.Random(0), kinds=(kind,), others=(path, other)) == kind
    assert not path.exists() or path.read_bytes() != b"some content"


def test_the_table_in_the_documentation_is_that_of_the_results() -> None:
    text = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")
    found = text.partition("<!-- faults:begin -->\n")[2].partition("<!-- faults:end -->")[0]
    assert found == table(json.loads(RESULTS.read_text(encoding="utf-8")))
