"""What a mistyped command, option or value says: a line, whole, that names what is nearest."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from btok.tools.cli import COMMANDS, main
from btok.tools.command_line import option_names

ALL = "`python -m btok --help` shows all"
OF_SEARCH = "`python -m btok search --help` shows all"
LONG = "a-" * 90  # int() shows 200 characters


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("serch m f", f"'serch' is no command; did you mean search or serve? {ALL}"),
        ("evaluate m", f"'evaluate' is no command; did you mean eval? {ALL}"),
        ("frobnicate", f"'frobnicate' is no command; {ALL}"),
        ("--top 3 search", f"'--top' is no command; {ALL}"),
        ("", f"expected a command; {ALL}"),
        (
            "search m f q --topp 3",
            f"'--topp' is no option of python -m btok search; did you mean --top? {OF_SEARCH}",
        ),
        (
            "search m f q --frobnicate",
            f"'--frobnicate' is no option of python -m btok search; {OF_SEARCH}",
        ),
        (
            "env --jsn",
            "'--jsn' is no option of python -m btok env; did you mean --json? "
            "`python -m btok env --help` shows all",
        ),
        (
            "search m f red seven",
            "'seven' is an argument too many for python -m btok search; words that belong together "
            "need quotes",
        ),
    ],
)
def test_a_mistyped_word_names_the_nearest(capsys, words, line):
    assert main(words.split()) == 2
    assert capsys.readouterr() == ("", f"error: {line}\n")


@pytest.mark.parametrize("columns", [None, "40"])
def test_no_word_of_a_line_is_cut(capsys, monkeypatch, columns):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    assert main(["search", "m", "f", "--top", LONG]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: Error parsing --top: ") and said.count("\n") == 1
    assert f"'{LONG}'" in said and "how many files to show" in said
    assert os.environ.get("COLUMNS") == columns
    assert main(["search", "m"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: Missing from python -m btok search: FOLDER what to index; ")
    assert said.endswith("(required)\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_are_those_of_the_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    said = re.findall(r"^[│ ]{1,3}(?:-h, )?(--[a-z][\w-]*)", capsys.readouterr().out, re.MULTILINE)
    assert stop.value.code == 0
    assert {*option_names(COMMANDS[command])} == {*said} - {"--help"}


def test_the_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(re.search(rf"• {command} ", said) for command in COMMANDS)


def test_it_ends_with_2():
    command = [sys.executable, "-m", "btok", "serch"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: 'serch' is no command; did")
