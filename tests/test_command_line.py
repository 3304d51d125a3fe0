"""What a mistyped command, option or value says: a line, whole, that names what is nearest."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import tiny_checkpoint

from btok.tools.cli import COMMANDS, main
from btok.tools.command_line import option_names
from train.main import main as train

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
            "search m --tpo 3",
            f"'--tpo' is no option of python -m btok search; did you mean --top or --output? "
            f"{OF_SEARCH}",
        ),
        (
            "encode --ouptut x",
            "'--ouptut' is no option of python -m btok encode; did you mean --output? "
            "`python -m btok encode --help` shows all",
        ),
        (
            "serve --prot=3",
            "'--prot' is no option of python -m btok serve; did you mean --port or --host? "
            "`python -m btok serve --help` shows all",
        ),
        (
            "search --hlp",
            "'--hlp' is no option of python -m btok search; did you mean --help or --clip? "
            f"{OF_SEARCH}",
        ),
        (
            "merge a b --weihgts 2 -1 --output x",
            "'--weihgts' is no option of python -m btok merge; did you mean --weights? "
            "`python -m btok merge --help` shows all",
        ),
        ("search m -x", f"'-x' is no option of python -m btok search; {OF_SEARCH}"),
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


@pytest.mark.parametrize(
    "words",
    [
        "search m --query_instruction x --no-rescore --exact",
        "merge m --weights -1 2",
        "search -- --tpo",
    ],
)
def test_what_is_missing_is_said_where_no_option_is_mistyped(capsys, words):
    assert main(words.split()) == 2
    assert capsys.readouterr().err.startswith("error: Missing")


@pytest.mark.parametrize("command", [[], ["search"], ["train"]])
def test_help_in_a_narrow_terminal_can_be_read(capsys, monkeypatch, command):
    def asked_with(columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit):
            train(["--help"]) if command == ["train"] else main([*command, "--help"])
        assert os.environ["COLUMNS"] == str(columns)
        return capsys.readouterr().out

    assert asked_with(10) == asked_with(60) != asked_with(100)


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


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A checkpoint, an empty folder, a file, and a mixture of what does not exist."""
    folder = tmp_path_factory.mktemp("places")
    tiny_checkpoint(folder / "model")
    (folder / "empty").mkdir()
    (folder / "folder/.btok").mkdir(parents=True)
    (folder / "file").write_text("a text")
    for name in ("trained/checkpoint-9", "trained/checkpoint-1000", "stock/checkpoint-8"):
        shutil.copytree(folder / "model", folder / name)
    for name in ("trained/checkpoint-2000", "trained/checkpoint-best"):
        (folder / name).mkdir()
    (folder / "trained/config.json").write_text('{"recipe": {"seed": 0}}')
    (folder / "stock/config.json").write_text('{"model_type": "qwen2_vl"}')
    for name in ("file.parquet", "pairs.jsonl"):
        (folder / name).write_text("{}\n")
    for name in ("folder.npz", "folder.jsonl"):
        (folder / name).mkdir()
    (folder / "gone.toml").write_text('[[dataset]]\npath = "gone.jsonl"\n')
    return folder


NO_MODEL = "which has no config.json, so it is no checkpoint"
RUN = "whose config.json is of no model, so it is no checkpoint; did you mean "
RUN += "trained/checkpoint-1000?"
GONE, FILE = "which does not exist; expected", "which is a file; expected"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("search folder stock x", f"BTokModel: checkpoint is folder, {NO_MODEL}"),
        ("encode empty stock", f"BTokModel: checkpoint is empty, {NO_MODEL}"),
        ("search trained stock x", f"BTokEncoder: checkpoint is trained, {RUN}"),
        ("search stock stock x", "BTokEncoder: stock has no btok_config.json, so its bottleneck"),
        ("export trained out", f"export: checkpoint is trained, {RUN}"),
        ("export empty out", f"export: checkpoint is empty, {NO_MODEL}"),
        (
            "export stock out",
            "export: checkpoint is stock, which has no btok_config.json, so it was never trained "
            "here; did you mean stock/checkpoint-8?",
        ),
        (
            "merge model trained --weights 0.5 0.5 --output out",
            f"merge: checkpoint is trained, {RUN}",
        ),
        ("train --model trained", f"BTokModel: checkpoint is trained, {RUN}"),
        ("encode model stock --output file", f"output is file, {FILE} a folder"),
        ("search model stock x --output file", f"output is file, {FILE} a folder"),
        ("serve model stock --output file", f"output is file, {FILE} a folder"),
        ("serve model stock --no-update --output file", f"output is file, {FILE} a folder"),
        ("encode model stock --output file/x", "output is file/x, and "),
        ("encode model stock --output file.parquet", f"output is file.parquet, {FILE} a folder"),
        (
            "encode model stock --output folder.npz",
            "output is folder.npz, which is a folder; expected a file",
        ),
        (
            "encode model stock --output file/x.npz",
            f"output is file/x.npz, whose folder is file, {FILE} a folder",
        ),
        ("mine model pairs.jsonl --output file", f"mine: output is file, {FILE} a folder"),
        (
            "mine model pairs.jsonl --output folder.jsonl",
            "mine: output is folder.jsonl, which is a folder; expected a file",
        ),
        ("eval model mmeb-v2 --data empty --output file", f"output is file, {FILE} a folder"),
        ("encode model gone", f"folder is gone, {GONE} a folder"),
        ("encode model file", f"folder is file, {FILE} a folder"),
        ("search model gone x", f"folder is gone, {GONE} a folder"),
        ("search model empty x --image gone.png", f"image is gone.png, {GONE} a file"),
        (
            "search model empty x --image empty",
            "image is empty, which is a folder; expected a file",
        ),
        ("serve model gone", f"folder is gone, {GONE} a folder"),
        ("index gone", f"index is gone, {GONE} one that `python -m btok encode` makes"),
        ("index file", f"index is file, {FILE} one that `python -m btok encode` makes"),
        ("index empty", "index is empty, which holds none that `python -m btok encode` makes"),
        (
            "index folder",
            "index is folder, which holds none that `python -m btok encode` makes; "
            "did you mean folder/.btok?",
        ),
        ("export gone out", f"export: checkpoint is gone, {GONE} a folder"),
        ("export file out", f"export: checkpoint is file, {FILE} a folder"),
        ("export gone.gguf out", f"export: checkpoint is gone.gguf, {GONE} a file"),
        ("export model file", f"export: out is file, {FILE} a folder"),
        ("merge gone model --weights 0.5 0.5 --output out", f"merge: checkpoint is gone, {GONE}"),
        ("merge model model --weights 0.5 0.5 --output file", f"merge: output is file, {FILE}"),
        ("check-server http://localhost:1 ./gone", "the checkpoint ./gone does not exist, and is"),
        ("check-server http://localhost:1 gone", "the checkpoint gone does not exist here, and "),
        ("calibrate gone file", f"checkpoint is gone, {GONE} a folder to write into"),
        ("calibrate model gone.jsonl", f"inputs is gone.jsonl, {GONE} a folder or a .jsonl file"),
        ("mine model gone.jsonl --output out", f"mine: pairs is gone.jsonl, {GONE} a .jsonl file"),
        ("eval model mmeb-v2 --data gone", f"data is gone, {GONE} MMEB-V2's folder, which --fetch"),
        ("eval model mmeb-v2 --data empty --compare gone", f"compare is gone, {GONE} a file"),
        ("report gone", f"run is gone, {GONE} the folder of a run or of an evaluation"),
        ("report file", f"run is file, {FILE} the folder of a run or of an evaluation"),
        ("report empty --output empty", "output is empty, which is a folder; expected a file"),
        (
            "report empty --output gone/x.html",
            f"output is gone/x.html, whose folder is gone, {GONE}",
        ),
        ("train --data gone.jsonl", f"data is gone.jsonl, {GONE} a file .jsonl, .parquet or .toml"),
        ("train --data gone", f"data is gone, {GONE} a file .jsonl, .parquet or .toml"),
        ("train --data file", f"data is file, {FILE} one that ends in .jsonl or .parquet"),
        ("train --data gone.toml", "gone.toml, data set 1: path is gone.jsonl, which does not"),
        ("train --model ./gone", "the checkpoint ./gone does not exist, and is no hub id"),
        (
            "train --model gone",
            "the checkpoint gone does not exist here, and the hub does not give",
        ),
        ("train --output file", f"output is file, {FILE} a folder"),
        ("train --output file/run", "output is file/run, and "),
    ],
)
def test_a_path_of_nothing_or_of_another_kind_says_so(
    places, tmp_path, capsys, monkeypatch, words, line
):
    monkeypatch.chdir(places)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command, *rest = words.split()
    if command == "train":
        rest += ["--caption-steps", "0"]
        rest += ["--output", str(tmp_path / "run")] * ("--output" not in rest)
    assert (train(rest) if command == "train" else main([command, *rest])) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}") and said.count("\n") == 1, said
    assert not {"out", "run"} & {path.name for path in (*places.iterdir(), *tmp_path.iterdir())}
