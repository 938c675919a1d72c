"""The pages of the site: what is generated is complete, what is written agrees with the code, and code blocks work.

Commands, settings, links and make targets of the same pages are checked by `test_readme`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import doctest
import importlib
import inspect
import json
import re
import shlex
import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

import pixrec
from docs import check, generated
from docs.assemble import UNSOUGHT, assemble, page
from pixrec.cli import _parser
from pixrec.config import Config, load_config
from pixrec.report.words import FUSION_MEANINGS, SCORER_MEANINGS

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))} | {
    "README.md": (ROOT / "README.md").read_text(),
    "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(),
}
PROGRAMS = {"pixrec", "make", "python", "ray", "serve", "export", "docker", "kubectl", "helm", "cd", "git"}
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def blocks(*languages: str) -> list[Any]:
    """A parameter set (page, text) for every code block in one of the languages, called by page and line."""
    found = []
    for name, text in PAGES.items():
        for block in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if block[1] in languages:
                line = text[: block.start()].count("\n") + 1
                found.append(pytest.param(name, block[2], id=f"{name}:{line}"))
    return found


def nav(entries: list[Any]) -> list[str]:
    """The pages of the navigation."""
    found = []
    for entry in entries:
        for target in entry.values():
            found += [target] if isinstance(target, str) else nav(target)
    return found


def setting_paths(cls: type = Config, path: str = "") -> list[str]:
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        element = next(iter(typing.get_args(hint)), None) if typing.get_origin(hint) is tuple else None
        if dataclasses.is_dataclass(hint):
            found += setting_paths(typing.cast(type, hint), f"{path}{name}.")
        elif dataclasses.is_dataclass(element):
            found += [f"{path}{name}", *setting_paths(typing.cast(type, element), f"{path}{name}[].")]
        else:
            found.append(f"{path}{name}")
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    assemble(folder)
    return folder


def test_every_setting_is_in_the_reference_with_its_meaning() -> None:
    rows = {
        line.split("`")[1]: line.split(" | ") for line in generated.config_reference().splitlines() if "| `" in line
    }
    assert set(rows) == set(setting_paths())
    assert [path for path, cells in rows.items() if len(cells) != 5 or len(cells[4].strip(" |")) < 10] == []


def test_units_are_those_of_the_names() -> None:
    units = {setting.path: setting.unit for section in generated.sections() for setting in section.settings}
    assert units["prepare.image_size_px"] == "px"
    assert units["train.histories_per_step"] == "histories"
    assert units["serve.batch_wait_seconds"] == "s"
    assert units["prepare.history_events"] == ""  # words, not a number of events


def test_every_section_says_what_it_is() -> None:
    assert [section.path for section in generated.sections() if not section.meaning] == []


def test_every_public_name_is_in_the_reference() -> None:
    text = PAGES["reference_library.md"]
    assert [name for name in pixrec.__all__ if not re.search(rf"pixrec\.{name}\b", text)] == []


def test_every_public_name_has_a_docstring() -> None:
    documented = [name for name in pixrec.__all__ if callable(getattr(pixrec, name))]
    assert [name for name in documented if not inspect.getdoc(getattr(pixrec, name))] == []


def test_what_the_reference_names_is_there() -> None:
    for name in re.findall(r"^::: ([\w.]+)", PAGES["reference_library.md"], re.MULTILINE):
        assert _resolve(name) is not None, name


def test_every_verb_and_option_is_in_the_reference() -> None:
    text = generated.command_reference()
    (verbs,) = [a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction)]
    for name, verb in verbs.choices.items():
        part = text.partition(f"## pixrec {name}\n")[2].partition("\n## ")[0]
        assert [o for a in verb._actions for o in a.option_strings if o not in part] == [], name


def test_every_route_is_in_the_reference() -> None:
    text, routes = generated.http_reference(), generated.openapi()["paths"]
    assert routes
    assert [path for path, methods in routes.items() for m in methods if f"## {m.upper()} {path}" not in text] == []
    assert set(re.findall(r"\(#(\w+)\)", text)) <= {h.lower() for h in re.findall(r"^### (\w+)$", text, re.MULTILINE)}


def test_the_navigation_has_every_page(site: Path) -> None:
    named = nav(CONFIG["nav"])
    assert len(set(named)) == len(named)
    assert [name for name in named if not (site / name).exists()] == []
    assert {path.name for path in site.glob("*.md")} <= set(named)


def test_links_of_the_assembled_pages_lead_somewhere(site: Path) -> None:
    for path in site.rglob("*.md"):
        text = re.sub(r"^(`{3,})\w*\n.*?^\1$|`[^`\n]+`", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        links = re.findall(r"\]\(((?!http)[^)#]+)(?:#[^)]*)?\)", text)
        assert [link for link in links if not path.parent.joinpath(link).exists()] == [], path
        assert "<!-- generated:" not in text


def test_every_scorer_is_on_the_page_of_evaluation() -> None:
    assert [name for name in (*SCORER_MEANINGS, *FUSION_MEANINGS) if f"`{name}`" not in PAGES["evaluation.md"]] == []


def test_benchmarks_named_are_there() -> None:
    named = {m for text in PAGES.values() for m in re.findall(r"python -m (benchmarks(?:\.\w+)+)", text)}
    assert named
    assert [m for m in named if not (ROOT / f"{m.replace('.', '/')}.py").exists()] == []


def test_formulas_are_drawn_without_a_script() -> None:
    made = page("docs/x.md", "$$a_1$$ and $b$, but `$c` and\n```sh\necho $HOME $PATH\n```\n")
    assert made.count("<math") == 2
    assert "`$c` and\n```sh\necho $HOME $PATH\n```" in made


def test_what_is_generated_stands_where_the_marker_is_a_line_and_nowhere_else() -> None:
    made = page("docs/x.md", "as `<!-- generated: command -->` says\n\n<!-- generated: command -->\n")
    assert made.count("## pixrec train\n") == 1


def test_a_source_is_shown_as_code() -> None:
    assert page("serve/config.yaml", "a: 1\n") == f"{UNSOUGHT}# serve/config.yaml\n\n````yaml\na: 1\n````\n"


def test_the_check_tells_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "search.json").write_text(json.dumps({"items": [{"title": "LoRA", "text": "<p>cold start</p>"}]}))
    (tmp_path / "a.html").write_text('<script src="https://cdn.example/x.js"></script><!-- generated: config -->')
    found = "\n".join(check.problems(tmp_path))
    assert "a.html loads something from another host" in found
    assert "a.html holds a part that was not generated" in found
    assert "'filters'" in found
    assert "'lora'" not in found


@pytest.mark.parametrize(("name", "text"), blocks("python"))
def test_python(name: str, text: str) -> None:
    """A block with prompts is run and gives what it says; of any other, the names and arguments exist."""
    if ">>>" in text:
        example = doctest.DocTestParser().get_doctest(text, {}, name, name, 0)
        failures: list[str] = []
        doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL).run(example, out=failures.append)
        assert not failures, "".join(failures)
    else:
        _check_names(ast.parse(text))


@pytest.mark.parametrize(("name", "text"), blocks("yaml"))
def test_yaml(name: str, text: str) -> None:
    """A block that begins with a section of the settings can be loaded as settings; any other is YAML."""
    tree = yaml.safe_load(text)
    if set(tree) & set(Config.__dataclass_fields__):
        load_config(text)


@pytest.mark.parametrize(("name", "text"), blocks("json"))
def test_json(name: str, text: str) -> None:
    """A block is JSON, or a part of an object."""
    json.loads(text if text.lstrip().startswith(("{", "[")) else f"{{{text}}}")


@pytest.mark.parametrize(("name", "text"), blocks("sh"))
def test_shell(name: str, text: str) -> None:
    """Every line runs something that is there. What `pixrec`, `jobs/` and `make` are given, `test_readme` checks."""
    routes = [*generated.openapi()["paths"], "/", "/docs", "/openapi.json", "/metrics"]
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        program = words[0].removeprefix(".venv/bin/")
        if program == "pip":
            for extra in re.findall(r"\[(\w+)\]", line):
                assert extra in EXTRAS, line
        elif program == "curl":
            for path in re.findall(r"(?:localhost|127\.0\.0\.1):8000(/[\w/.-]*)", line):
                assert any(re.fullmatch(re.sub(r"\{[\w:]+\}", ".+", route), path) for route in routes), line
            for body in re.findall(r"-d '([^']*)'", line):
                json.loads(body)
        else:
            assert program in PROGRAMS, line


def _resolve(name: str) -> Any:
    """A dotted name, imported; None where there is no such thing."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found
    return None


def _check_names(tree: ast.Module) -> None:
    """Every import and attribute of PixRec that a block uses is there, and functions take the arguments they get."""
    known: dict[str, Any] = {}
    for node in ast.walk(tree):  # breadth first: the statements of a block in order, before what is inside them
        if isinstance(node, ast.Import):
            known |= {a.asname or a.name.split(".")[0]: importlib.import_module(a.name) for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            known |= {a.asname or a.name: getattr(module, a.name) for a in node.names}
        elif (
            isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and isinstance(node.targets[0], ast.Name)
        ):
            known[node.targets[0].id] = _made_by(_value(node.value.func, known))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            _value(node, known)
        if isinstance(node, ast.Call) and callable(function := _value(node.func, known)):
            parameters = inspect.signature(function).parameters
            takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            assert takes_any or {k.arg for k in node.keywords} <= set(parameters), ast.unparse(node)


def _value(node: ast.expr, known: dict[str, Any]) -> Any:
    """What a name or an attribute stands for, as far as that is known; an attribute that is not there is a failure."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := _value(node.value, known)) is not None:
        fields = getattr(owner, "__dataclass_fields__", {})
        assert hasattr(owner, node.attr) or node.attr in fields, ast.unparse(node)
        return getattr(owner, node.attr, None)
    return None


def _made_by(function: Any) -> Any:
    """The class of what a function of PixRec returns; None where it is not ours, or does not say."""
    if not getattr(function, "__module__", "").startswith("pixrec"):
        return None
    if isinstance(function, type):
        return function
    name = str(inspect.signature(function).return_annotation)
    return getattr(pixrec, name, None) if name in pixrec.__all__ else None
