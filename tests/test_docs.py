"""README and docs: snippets run, links lead somewhere, the site builds without a warning."""

from __future__ import annotations

import argparse
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from helpers import nested_checkpoint, tiny_backbone, tiny_checkpoint, tiny_tokenizer
from mmeb_miniature import Miniature
from packaging.requirements import Requirement
from PIL import Image
from snippets import (
    COMPILED,
    PAGES,
    PARSED,
    PARSED_FLAGS,
    ROOT,
    Snippet,
    blocks,
    snippets,
    words_of,
)

from btok.tools import cli
from btok.tools.evaluate import Evaluate, chosen
from train import main as training
from train.recipes import RECIPES, Recipe

TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
MARKDOWN = [ROOT / line for line in TRACKED.splitlines() if line.endswith(".md")]
TINY = ["--group-size", "2", "--groups-per-batch", "1", "--steps", "1", "--warmup-steps", "0"]
TINY += ["--caption-steps", "0", "--reading-steps", "0", "--eval-queries", "0", "--workers", "0"]
TINY += ["--dtype", "float32", "--chunk-tokens", "512"]
OTHERS = {  # flags of other programs
    *("--max-restarts", "--enable-lora", "--mm-processor-kwargs", "--media-io-kwargs", "--runner"),
    *("--pooler-config", "--chat-template", "--chat-template-content-format", "--help"),
}


class Parsed(BaseException):
    """A command got as far as its settings."""


def reaching(parse: Callable[..., Any]) -> Callable[..., Any]:
    """A parser that ends the program where it is through."""

    def reach(*args: Any, **options: Any) -> Any:
        raise Parsed(parse(*args, **options))

    return reach


def parsed(run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The settings that a program has when it begins to work, which it does not."""
    with monkeypatch.context() as patch:
        for kind, name in ((tyro, "cli"), (argparse.ArgumentParser, "parse_args")):
            patch.setattr(kind, name, reaching(getattr(kind, name)))
        with pytest.raises(Parsed) as found:
            run()
    return found.value.args[0]


def script(path: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python file of the repository, as `python path ...` runs it; it must end with 0."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [path, *arguments])
        try:
            runpy.run_path(str(ROOT / path), run_name="__main__")
        except SystemExit as end:
            assert not end.code, f"{path} ended with {end.code}"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Tiny checkpoints: a plain one, and one for budgets and components."""
    folder = tmp_path_factory.mktemp("models")
    return tiny_checkpoint(folder / "plain"), nested_checkpoint(folder / "nested")


@pytest.fixture
def folder(tmp_path, models, monkeypatch):
    """The working folder of a page: everything that the pages name is there, tiny."""
    monkeypatch.chdir(tmp_path)
    for page in PAGES:
        for name in re.findall(r"[\w/]+/checkpoint-\d+|\bCHECKPOINT\b", page.read_text("utf-8")):
            place = tmp_path / name
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(models["nested" in name])
    backbone, tokenizer = tiny_backbone(), tiny_tokenizer()
    backbone.resize_token_embeddings(len(tokenizer))
    for part in (backbone, tokenizer):  # as others save theirs
        part.save_pretrained("BACKBONE")
    mine = tmp_path / "my-files"
    mine.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    pictures = [Image.fromarray(each).resize((32, 24)) for each in pixels]
    for i, picture in enumerate(pictures):
        picture.save(mine / f"scene{i}.png")
    for name, picture in zip(("one", "two", "page", "1"), pictures, strict=False):
        picture.save(tmp_path / f"{name}.png")
    pictures[0].save(tmp_path / "report.pdf", save_all=True, append_images=pictures[1:4])
    pictures[0].save(mine / "report.pdf", save_all=True, append_images=pictures[1:4])
    (mine / "note.txt").write_text("milk, bread and a red seven")
    shutil.copytree(mine, tmp_path / "runs/demo/files/scenes")
    rows = [{"query": f"the number {i}", "positive": f"it is {i * i}"} for i in range(120)]
    for name in ("pairs.jsonl", "other.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    Miniature(tmp_path / "DIR").make("MSVD")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_snippets_of_a_page(page, folder, monkeypatch, capfd):
    """In their order; what a snippet prints is shown where one fails."""
    namespace: dict[str, Any] = {"__name__": "snippet"}
    said = io.StringIO()
    for snippet in snippets(page):
        print(f"--- {snippet.where}\n{snippet.text}")
        if snippet.kind == "python":
            lines = "\n" * (int(snippet.where.rpartition(":")[2]) - 1)
            code = compile(lines + snippet.text, str(page), "exec")
            with redirect_stdout(said := io.StringIO()):
                exec(code if not snippet.why else "", namespace)
            print(said.getvalue())
        elif snippet.kind == "output":
            assert snippet.text == said.getvalue()
        elif snippet.kind == "bash":
            carry_out(snippet, folder, monkeypatch)
        elif snippet.kind == "json":
            assert json.loads(snippet.text)
        else:
            assert tomllib.loads(snippet.text)
            Path("mixture.toml").write_text(snippet.text)


def carry_out(snippet: Snippet, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command, or parse it to its settings."""
    _, (program, *words) = words_of(snippet.text)
    alone = {"make": make, "pip": install, "pytest": collect}
    if program in alone:
        alone[program](words)
        return
    if program in ("source", "vllm", "curl"):
        return
    if program == "torchrun":
        from torch.distributed.run import parse_args

        options = parse_args(words)
        words = [options.training_script, *options.training_script_args]
        words = ["-m", *words] if options.module else words
    elif program != "python":
        pytest.fail(f"{snippet.where}: {program} is no program that the pages may name")
    if words[:2] == ["-m", "btok"]:
        btok(words[2:], bool(snippet.why), monkeypatch)
    elif words[0] == "train/main.py":
        train(words[1:], bool(snippet.why), folder, monkeypatch)
    elif snippet.why:
        if words != ["tests/snippets.py"] and words[0] != "tests/odd_files.py":
            parsed(lambda: script(words[0], words[1:], monkeypatch), monkeypatch)
        assert (ROOT / words[0]).exists()
    else:
        script(words[0], words[1:], monkeypatch)


def make(words: list[str]) -> None:
    """A target that is there, of variables that are."""
    said = (ROOT / "Makefile").read_text()
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{name} \?=" if is_variable else rf"^{name}:"
        assert re.search(pattern, said, re.M), f"the Makefile has no {word}"


def install(words: list[str]) -> None:
    """Extras that are there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words[1:]:
        if not word.startswith("-"):
            asked = Requirement(word.replace(".[", "btok["))
            assert asked.name == "btok" and asked.extras <= {*extras["optional-dependencies"]}


@cache
def help_of_pytest() -> str:
    """Its plugins' options too."""
    command = [sys.executable, "-m", "pytest", "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


def collect(words: list[str]) -> None:
    """Files that are there, and options that pytest has."""
    for word in words:
        if word.startswith("-"):
            name = word.partition("=")[0]
            assert re.search(rf"(?<!\S){name}\b", help_of_pytest()), f"pytest has no {word}"
        elif "/" in word:
            assert (ROOT / word).exists(), f"there is no {word}"


def btok(words: list[str], only_parsed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m btok ...`; MMEB-V2 with one of its sets."""
    settings = parsed(lambda: cli.main(words), monkeypatch)
    if isinstance(settings, Evaluate):
        assert chosen(settings.tasks)
        words = [*words, "--tasks", "MSVD"]
    if not only_parsed:
        assert cli.main(words) == 0


def train(
    words: list[str], only_parsed: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train/main.py ...`: as it stands parsed to its recipe, then run by a tiny one."""
    recipe = parsed(lambda: training.main([*words]), monkeypatch)
    if only_parsed:
        return
    number = len(list(folder.glob("run-*")))
    words = [*words, *TINY, "--output", str(folder / f"run-{number}")]
    if recipe.model not in ("pocket", "runs/demo/checkpoint-1000"):
        words += ["--model", "CHECKPOINT"]
    assert training.main(words) == 0
    assert list((folder / f"run-{number}").glob("checkpoint-1/*.safetensors"))
    shutil.copytree(folder / f"run-{number}", recipe.output, dirs_exist_ok=True)  # for what follows


def test_what_is_parsed_only_is_told():
    """The command's table; and every reason in the lists is that of some snippet."""
    command = [sys.executable, "tests/snippets.py"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = [snippet for page in PAGES for snippet in snippets(page)]
    only = [snippet for snippet in found if snippet.why]
    total = f"{len(found)} +{len(found) - len(only)} +{len(only)}"
    assert re.search(rf"^all +{total}$", said, re.M), said
    assert said.count("\n    ") == len(only)
    reasons = {*PARSED.values(), *PARSED_FLAGS.values(), *COMPILED.values()}
    assert reasons == {snippet.why for snippet in only}
    assert len(only) < 2 / 5 * len(found)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("python\nimport btok.nothing\n", "No module named 'btok.nothing'"),
        (
            "python\nfrom btok.kernels import CondensedLayout as C\nC.from_lengths([1], [2])\n",
            "num_btoks",
        ),
        ("bash\npython -m btok search CHECKPOINT my-files red --tops 3\n", "--tops"),
        ("bash\npython -m btok eval CHECKPOINT mmeb-v2 --data DIR --tasks MSVDD\n", "MSVDD"),
        ("bash\npython -m btok eval CHECKPOINT mmeb-v2 --fetch --task MSVD\n", "--task"),
        (
            "bash\ntorchrun --nproc-per-node 8 train/main.py btok-qwen3vl-8b --shards true\n",
            "--shards",
        ),
        ("bash\ntorchrun --gpus 8 train/main.py pocket\n", "--gpus"),
        ("bash\npython train/main.py pocket --pooling first\n", "pooling"),
        ("bash\npython bench/report.py NOWHERE.json\n", "ended with 2"),
        ("bash\nmake demos\n", "no demos"),
        ("bash\npytest tests/test_nothing.py\n", "no tests/test_nothing.py"),
        ("bash\npytest tests/test_docs.py --benchmark-onl\n", "no --benchmark-onl"),
        ('bash\npip install "btok[lances]"\n', "lances"),
        ("bash\nrm -r runs\n", "rm is no program"),
        ("python\nprint(1)\n```\n```text\n2\n", "'2\\n' == '1\\n'"),
        ("json\n{'a': 1}\n", "property name"),
        ("sh\nls\n", "'sh' is no kind of block"),
    ],
)
def test_a_wrong_snippet_fails(block, message, folder, monkeypatch, capfd):
    """Each by its own way: run, parsed, or looked up."""
    page = folder / "page.md"
    page.write_text(f"# A page\n```{block}```\n")
    monkeypatch.setattr("snippets.ROOT", folder)
    with pytest.raises((Exception, SystemExit, pytest.fail.Exception)) as failed:
        test_the_snippets_of_a_page(page, folder, monkeypatch, capfd)
    assert message in f"{failed.value}{capfd.readouterr().err}"


def headings(page: Path) -> set[str]:
    """The anchors of a page: its headings as repository browsers and the site spell them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        found.append(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return {*found}


def links(page: Path) -> list[str]:
    """Where a page's links and pictures lead; not those in code."""
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", page.read_text("utf-8"), flags=re.M | re.S)
    return re.findall(r"\]\(<?([^)\s>]+)>?\)", text)


def dead(page: Path) -> list[str]:
    """The links of a page that lead nowhere in the repository."""
    wrong = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if link.startswith(("https://", "http://")):
            continue
        if not target.is_file() or (anchor and anchor not in headings(target)):
            wrong.append(f"{page.name}: {link}")
    return wrong


def test_no_link_is_dead(tmp_path):
    """Of all pages of the repository, to files and to headings."""
    assert sum(len(links(page)) for page in MARKDOWN) > 150
    assert not [link for page in MARKDOWN for link in dead(page)]
    page = tmp_path / "page.md"
    page.write_text("# A b, `c`\n[1](#a-b-c) [2](#a-b) [3](no.md) ![4](page.md) `[5](no)` [6](.)\n")
    assert dead(page) == ["page.md: #a-b", "page.md: no.md", "page.md: ."]


def flags() -> set[str]:
    """What our commands take, and the other programs' that the pages name."""
    found = [field for kind in (Recipe, *cli.COMMANDS.values()) for field in fields(kind)]
    named = [field.name for field in found]
    named += [f"no_{field.name}" for field in found if field.type in (bool, "bool")]
    of_pytest = re.findall(r"(?<!\S)--[\w-]+", help_of_pytest())
    return {*OTHERS, *of_pytest, *(f"--{name.replace('_', '-')}" for name in named)}


def test_what_the_text_names_is_there():
    """Files, targets of make, recipes, commands and flags in code between backquotes."""
    known, targets = flags(), (ROOT / "Makefile").read_text()
    wrong, seen = [], 0
    for page in {*PAGES, ROOT / "CONTRIBUTING.md"} - {ROOT / "docs/files.md"}:
        text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
        for code in re.findall(r"`([^`\n]+)`", text):
            words = code.split()
            checks = [
                (word, word in known) for word in words if re.fullmatch(r"--[a-z][\w-]+", word)
            ]
            if re.fullmatch(r"[\w.-]+(/[\w.-]+)+\.(py|md|toml|txt|json)", code):
                own = ("tests", "btok/", "train/", "bench/", "docs/", "kernels/", "examples/")
                checks += [(code, (ROOT / code).exists())] * code.startswith(own)
            if words[0] == "make" and len(words) > 1:
                checks.append((code, bool(re.search(rf"^{words[1]}:", targets, re.M))))
            if words[:3] == ["python", "-m", "btok"] and re.match("[a-z]", " ".join(words[3:])):
                checks.append((code, words[3] in cli.COMMANDS))
            if re.fullmatch(r"(btok|vlm2vec)-[\w]+-\d+b", code):
                checks.append((code, code in RECIPES))
            seen += len(checks)
            wrong += [f"{page.name}: {what}" for what, right in checks if not right]
    assert not wrong and seen > 100


def test_the_readme_is_short_and_every_page_begins_with_something_to_run():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    for page in PAGES:
        runs = [block.line for block in blocks(page) if block.kind in ("bash", "python")]
        assert runs and runs[0] <= 20, f"{page.name} runs nothing on its first screen"


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip("sphinx", reason="needs the extra docs")
    command = next(x for x in (ROOT / "Makefile").read_text().splitlines() if "sphinx-build" in x)
    words = command.split()[1:]  # as `make docs` has it, but for the folder
    words[words.index("$(DOCS_OUT)")] = str(tmp_path)
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 0 and not built.stderr, built.stderr[-4000:]
    pages = list(tmp_path.rglob("*.html"))
    assert {page.stem for page in PAGES} <= {page.stem for page in pages}
    for page in pages:
        loaded = re.findall(
            r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"([^\"]+)\"", page.read_text()
        )
        assert not [where for where in loaded if where.startswith(("http", "//"))], page
    assert "README.html" in (tmp_path / "index.html").read_text()
    assert "float32 [N, D], unit norm" in (tmp_path / "docs/reference.html").read_text()


def test_the_drawings_are_those_of_the_code(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra demo")
    drawings = runpy.run_path(str(ROOT / "docs/drawings.py"))
    drawings["main"](tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == {*drawings["DRAWINGS"]}
    for path in tmp_path.iterdir():
        made, kept = (
            np.asarray(Image.open(x)).astype(float) for x in (path, ROOT / "docs" / path.name)
        )
        assert made.shape == kept.shape and abs(made - kept).mean() < 1, path.name
