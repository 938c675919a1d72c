"""README and the pages of docs/ say what is there: the tree, the commands, the settings, the links and targets."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import figures
from pixrec.cli import _parser
from pixrec.config import Config, load_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*GUIDES, ROOT / "CHANGELOG.md", ROOT / "recipes" / "README.md", *sorted((ROOT / "benchmarks").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
GUIDE_TEXTS = {name: TEXTS[name] for name in (page.relative_to(ROOT).as_posix() for page in GUIDES)}


def _blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of every code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def _tree() -> list[str]:
    """Paths of the tree's lines, relative to the root; a line two spaces in lies in the folder above it."""
    (block,) = [text for _, text in _blocks(TEXTS["CONTRIBUTING.md"]) if text.startswith("pixrec/ ")]
    paths, folder = [], ""
    for line in block.splitlines():
        name = line.split()[0]
        paths.append(folder + name if line.startswith(" ") else name)
        folder = folder if line.startswith(" ") else name
    return paths


def _lines(text: str, *programs: str) -> list[list[str]]:
    """The arguments of every line of the code blocks that runs one of `programs`; continued lines are joined."""
    code = "".join(block for language, block in _blocks(text) if language in ("", "sh")).replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in code.splitlines() if any(p in line for p in programs)]
    return [w[w.index(p) + 1 :] for w in words for p in programs if p in w]


COMMANDS = {name: _lines(text, "pixrec", ".venv/bin/pixrec") for name, text in GUIDE_TEXTS.items()}


def test_tree_is_there() -> None:
    missing = [path for path in _tree() if not (ROOT / path).exists()]
    assert missing == []
    assert [p for p in _tree() if (ROOT / p).is_dir() != p.endswith("/")] == []


def test_tree_names_every_room() -> None:
    named = set(_tree())
    rooms = {f"pixrec/{p.name}" for p in (ROOT / "pixrec").glob("*.py")} - {"pixrec/__init__.py"}
    rooms |= {f"pixrec/{p.name}/" for p in (ROOT / "pixrec").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms - named == set()


def test_all_verbs_are_shown() -> None:
    parser = _parser()
    (verbs,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    assert {command[0] for command in COMMANDS["README.md"]} == set(verbs.choices)


@pytest.mark.parametrize(
    ("page", "command"),
    [(page, command) for page, commands in COMMANDS.items() for command in commands],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_commands_parse(page: str, command: list[str]) -> None:
    arguments = _parser().parse_args(command)
    if hasattr(arguments, "config"):  # the others have no settings
        text = (ROOT / arguments.config).read_text() if arguments.config else ""
        load_config(text, arguments.set)


def test_jobs_parse() -> None:
    jobs = [line for text in GUIDE_TEXTS.values() for line in _lines(text, "python") if line[0].startswith("jobs/")]
    assert jobs
    for script, *options in jobs:
        assert (ROOT / script).exists()
        arguments = _parser().parse_args([Path(script).stem, *options])
        load_config("", arguments.set)


def test_modules_that_are_run_exist() -> None:
    run = [line[1] for text in TEXTS.values() for line in _lines(text, "python") if line[:1] == ["-m"]]
    assert "benchmarks.figures" in run
    ours = {name.replace(".", "/") for name in run if name.split(".")[0] == "benchmarks"}
    assert [name for name in ours if not any((ROOT / f"{name}{end}").exists() for end in (".py", "/__main__.py"))] == []


@pytest.mark.parametrize("page", GUIDE_TEXTS)
def test_settings_named_exist(page: str) -> None:
    sections = "|".join(Config.__dataclass_fields__)
    for section, path in re.findall(rf"`({sections})((?:\.[a-z_0-9]+)+)(?:=[^`]*)?`", GUIDE_TEXTS[page]):
        if path in (".json", ".yaml", ".py"):
            continue
        value = getattr(Config(), section)
        for key in path.strip(".").split("."):
            assert hasattr(value, key), f"{section}{path}"
            value = getattr(value, key)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in GUIDE_TEXTS.values():
        assert set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)) <= targets
    assert {"demo", "test"} <= set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE))


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", TEXTS[page])
    assert links or page in ("CHANGELOG.md",)
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_links_to_a_heading_find_it() -> None:
    for page, text in TEXTS.items():
        for link, heading in re.findall(r"\]\(((?!http)[^)#]*)#([^)]+)\)", text):
            target = (ROOT / page).parent.joinpath(link) if link else ROOT / page
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert heading in slugs, f"{page}: {link}#{heading}"


def test_every_page_is_reached_from_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[a-z_]+\.md)\)", README))
    assert {name for name in TEXTS if name.startswith("docs/")} == linked


def test_the_demos_table_and_pictures_are_of_one_run() -> None:
    assert figures.BEGIN in README
    assert figures.END in README
    stamps = {figures.picture_stamp(ROOT / picture) for picture in (figures.REPORT_PICTURE, figures.HISTORIES_PICTURE)}
    assert stamps == {figures.stamp_in(README)}
