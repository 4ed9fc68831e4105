"""Every kind of incident that the code knows is described, and people are told which kinds look wrong."""

from __future__ import annotations

import re

from megatron_ktr.run import incidents
from megatron_ktr.run.status.judge import WRONG_INCIDENTS
from tests.support.paths import REPOSITORY


def test_the_documented_kinds_are_those_of_the_code() -> None:
    added = re.compile(r'ncidents(?:\([^()]*\))?\.add\(\s*"(\w+)"')
    texts = [path.read_text(encoding="utf-8") for path in (REPOSITORY / "megatron_ktr").rglob("*.py")]
    of_code = {kind for text in texts for kind in added.findall(text)}
    page = (REPOSITORY / "docs" / "watching.md").read_text(encoding="utf-8")
    rows = page.partition("| kind | what happened |\n|---|---|\n")[2].partition("\n\n")[0].splitlines()
    of_page = [kind for row in rows for kind in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(of_page) == sorted(of_code)
    assert set(of_page[: len(WRONG_INCIDENTS)]) == WRONG_INCIDENTS, "the page says that the first kinds look wrong"
    assert all(re.search(rf"\b{kind}\b", incidents.__doc__ or "") for kind in of_code)
