"""Text of models, of data and of file names reaches a terminal, a log and a page without control sequences."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys

import pytest

from megatron_ktr.report.markup import element
from megatron_ktr.terminal import LineFormatter, printable
from tests.house.test_borders import CODE_FOLDERS, code_files, name_of
from tests.support.paths import REPOSITORY

HOSTILE = {
    "clears the screen": "\x1b[2J",
    "names the window": "\x1b]0;title\x07",
    "a link": "\x1b]8;;http://h\x1b\\text\x1b]8;;\x1b\\",
    "C1 control": "\x9b2J",
    "turns around": "\u202egpj.exe\u202c",
    "isolates": "\u2066a\u2069",
    "no width": "a\u200bb\ufeff\u2060",
    "tags": "\U000e0041",
    "ends a line": "a\u2028b\u2029c\x85d",
    "half a pair": "\ud800",
    "goes back": "error\rfine",
    "erases": "x\x08\x7f",
}
UNWANTED = set("".join(HOSTILE.values())) - set("[2J]0;title8http://h\\text gpj.exeabcderrorfine\ud800")
FORGED = "a.mp4: fine\nerror: all is lost"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_one_line_of_printable_characters(name: str) -> None:
    shown = printable(HOSTILE[name])
    assert all(character.isprintable() for character in shown) and shown != HOSTILE[name]


def test_a_log_record_is_one_line_whatever_it_holds() -> None:
    formatter = LineFormatter("%(levelname)s %(name)s: %(message)s")
    for text in [*HOSTILE.values(), FORGED]:
        record = logging.LogRecord("megatron_ktr.data", logging.WARNING, "f", 1, "skipped: %s", (text,), None)
        line = formatter.format(record)
        assert line.startswith("WARNING megatron_ktr.data: skipped: ") and line.isprintable()
    try:
        raise ValueError(HOSTILE["clears the screen"])
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, "f", 1, "failed", (), sys.exc_info())
    assert "\x1b" not in formatter.format(record) and "\nTraceback" in formatter.format(record)


def test_no_command_prints_or_logs_a_control_sequence() -> None:
    program = (
        "import json, logging, sys\n"
        "from megatron_ktr.errors import UserError, run_cli\n"
        "texts = json.loads(sys.argv[1])\n"
        "def main():\n"
        "    for text in texts:\n"
        "        print('out', text)\n"
        "        print('err', text.replace('\\r', ''), file=sys.stderr)\n"
        "        logging.getLogger('any').warning('logged %s', text)\n"
        "    raise UserError('wrong: ' + ' '.join(texts))\n"
        "run_cli(main)\n"
    )
    import json

    texts = [*HOSTILE.values(), FORGED]
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(texts)], capture_output=True, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 2
    out, err = done.stdout.decode(), done.stderr.decode()
    for shown in (out, err):
        assert not UNWANTED & set(shown)
    assert out.count("\n") == len(texts) + 1, "a print keeps its ends of lines, of which one text has one"
    assert sum(line.startswith("logged") for line in err.split("\n")) == len(texts)
    assert [line for line in err.split("\n") if line.startswith("error: ")][-1].startswith("error: wrong: ")


def test_a_page_shows_no_character_that_turns_around_its_words() -> None:
    for name in ("clears the screen", "turns around", "isolates", "C1 control"):
        page = element("p", HOSTILE[name], title=HOSTILE[name])
        assert not set("\x1b\x9b\u202e\u202c\u2066\u2069") & set(page)


SETS_UP_LOGGING = {
    "basicConfig",
    "addHandler",
    "StreamHandler",
    "setFormatter",
    "dictConfig",
    "__stdout__",
    "__stderr__",
}


def test_one_place_sets_up_what_is_logged_and_every_command_is_run_by_run_cli() -> None:
    """So that nothing that is printed or logged has to be escaped where it is said."""
    found = []
    for path in code_files():
        tree = ast.parse(path.read_text())
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        if name_of(path) != "megatron_ktr/terminal.py" and (used := names & SETS_UP_LOGGING):
            found.append((name_of(path), sorted(used)))
    assert CODE_FOLDERS and not found
