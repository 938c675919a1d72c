"""The README says what is there: its tree, its commands, its settings, its links and targets."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from pixrec.cli import _parser
from pixrec.config import Config, load_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def _tree() -> list[str]:
    """Paths of the tree's lines, relative to the root; a line two spaces in lies in the folder above it."""
    (block,) = [text for _, text in BLOCKS if text.startswith("pixrec/ ")]
    paths, folder = [], ""
    for line in block.splitlines():
        name = line.split()[0]
        paths.append(folder + name if line.startswith(" ") else name)
        folder = folder if line.startswith(" ") else name
    return paths


def _lines(program: str) -> list[list[str]]:
    """The arguments of every line of the code blocks that runs `program`; continued lines are joined, comments gone."""
    text = "".join(text for language, text in BLOCKS if not language).replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in text.splitlines() if program in line]
    return [w[w.index(program) + 1 :] for w in words if program in w]


COMMANDS = _lines(".venv/bin/pixrec")


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
    assert {command[0] for command in COMMANDS} == set(verbs.choices)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_parse(command: list[str]) -> None:
    arguments = _parser().parse_args(command)
    text = (ROOT / arguments.config).read_text() if arguments.config else ""
    load_config(text, arguments.set)


def test_jobs_parse() -> None:
    jobs = _lines("python")
    assert jobs
    for script, *options in jobs:
        assert (ROOT / script).exists()
        arguments = _parser().parse_args([Path(script).stem, *options])
        load_config("", arguments.set)


def test_settings_named_exist() -> None:
    sections = "|".join(Config.__dataclass_fields__)
    for section, key in re.findall(rf"`({sections})\.([a-z_]+)(?:=\w+)?`", README):
        assert hasattr(getattr(Config(), section), key), f"{section}.{key}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
