"""The reference pages that are made from the code: the settings, the command, the HTTP interface.

Each function returns Markdown. `hooks` puts it in the place of a page's `<!-- generated: NAME -->` when the site is
built, so a page cannot tell another story than the code.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, cast

import yaml

from pixrec.cli import _parser
from pixrec.config import Config, ServeConfig, to_dict
from pixrec.serving.http import create_api

COUNTED = (
    "tokens items users events steps epochs histories pixels bytes characters samples layers heads replicas requests "
    "threads workers actors readers"
)
UNITS = {word: word for word in COUNTED.split()} | {
    "cpus": "CPUs",
    "gpus": "GPUs",
    "seconds": "s",
    "px": "px",
    "fraction": "share, 0 to 1",
    "share": "share, 0 to 1",
}
"""Of a number, by the last word of its field's name, or the last before `_per_`."""
SECTIONS = {
    "prepare": "`pixrec prepare`: tables and pictures to a prepared data set.",
    "model": "The towers: backbone, encoders, both user towers.",
    "train": "`pixrec train`.",
    "embed": "`pixrec embed`.",
    "evaluate": "`pixrec evaluate`.",
    "sasrec": "The baseline SASRec, which `pixrec evaluate` can train on the spot.",
    "serve": "`pixrec serve`.",
    "pipeline": "`pixrec pipeline`: prepare to publish as one run.",
    "job": "`pixrec submit`: a command as a job of a Ray cluster.",
    "demo": "The synthetic shop of `pixrec demo`.",
}


class Setting(NamedTuple):
    path: str
    """as `train.compact.epochs`"""
    type: str
    unit: str
    default: str
    meaning: str


class Section(NamedTuple):
    path: str
    meaning: str
    settings: list[Setting]


def sections(cls: type = Config, path: str = "") -> Iterator[Section]:
    """Every section of the settings with its own fields, a section before those inside it."""
    meanings, hints = field_docstrings(cls), typing.get_type_hints(cls)
    settings, inner = [], []
    for field in dataclasses.fields(cls):
        name, hint = f"{path}{field.name}", hints[field.name]
        element = next(iter(typing.get_args(hint)), None) if typing.get_origin(hint) is tuple else None
        if dataclasses.is_dataclass(hint):
            inner.append((cast(type, hint), name))
        else:
            if dataclasses.is_dataclass(element):
                inner.append((cast(type, element), f"{name}[]"))
            meaning = " ".join(meanings.get(field.name, "").split())
            settings.append(Setting(name, type_words(hint), unit_of(field.name, hint), default_of(field), meaning))
    about = SECTIONS.get(path.rstrip("."), "") or " ".join((cls.__doc__ or "").partition("\n\n")[0].split())
    if settings:
        yield Section(path.rstrip("."), "" if about.startswith(f"{cls.__name__}(") else about, settings)
    elif path:
        yield Section(path.rstrip("."), about, [])
    for nested, name in inner:
        yield from sections(nested, f"{name}.")


def field_docstrings(cls: type) -> dict[str, str]:
    """The string that stands below each field of a dataclass, those of its bases included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cast(type, base)))).body
        body = cast(ast.ClassDef, tree).body
        for field, below in itertools.pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[cast(ast.Name, field.target).id] = str(below.value.value)
    return found


def type_words(hint: Any) -> str:
    """A type as a reader of YAML would say it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if a is type(None) else type_words(a) for a in args)
    if origin is Literal:
        return ", ".join(f"`{a}`" for a in args)
    if origin is tuple:
        return "list of sections" if dataclasses.is_dataclass(args[0]) else f"list of {type_words(args[0])}"
    return {bool: "true or false", int: "integer", float: "number", str: "text"}[hint]


def unit_of(name: str, hint: Any) -> str:
    """The unit of a number; empty for what has none and for what is no number."""
    numbers = {int, float} & {hint, *typing.get_args(hint)}
    return UNITS.get(name.partition("_per_")[0].rsplit("_", 1)[-1], "") if numbers else ""


def default_of(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default is not dataclasses.MISSING else cast(Any, field.default_factory)()
    if value is None or value == "":
        return "none" if value is None else '""'
    text = yaml.safe_dump(to_dict(value), default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def config_reference() -> str:
    parts = []
    for section in sections():
        level = "###" if "." in section.path else "##"
        parts.append(f"{level} {section.path}\n\n{section.meaning}\n")
        if section.settings:
            rows = [(f"`{s.path}`", s.type, s.unit, f"`{s.default}`", s.meaning) for s in section.settings]
            parts.append(table(("setting", "type", "unit", "default", "meaning"), rows))
    return "\n".join(parts)


def command_reference() -> str:
    parser = _parser()
    (verbs,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    parts = []
    for name, verb in verbs.choices.items():
        usage = " ".join(verb.format_usage().removeprefix("usage: ").split())
        wrapped = textwrap.fill(usage, 96, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
        parts.append(f"## pixrec {name}\n\n{verb.description or ''}\n\n```text\n{wrapped}\n```\n")
        rows = []
        for action in verb._actions:
            option = ", ".join(action.option_strings) or action.dest
            value = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else "")
            shown = f"`{option} {value}`" if value and action.nargs != 0 else f"`{option}`"
            rows.append((shown, "yes" if action.required else "", action.help or ""))
        parts.append(table(("option", "required", "meaning"), rows))
    return "\n".join(parts)


def openapi() -> dict[str, Any]:
    """The OpenAPI file of the server, as `GET /openapi.json` gives it where a key is set."""
    return create_api(cast(Any, None), ServeConfig(api_key="set")).openapi()


def http_reference() -> str:
    file = openapi()
    schemas = file["components"]["schemas"]
    parts, bodies = ["The file itself: [openapi.json](openapi.json).\n"], dict[str, None]()
    for path, methods in file["paths"].items():
        for method, route in methods.items():
            parts.append(f"## {method.upper()} {path}\n\n{route.get('description', '')}\n")
            body = _schema_of(route.get("requestBody", {}))
            given = [
                (f"`{p['name']}` in the {p['in']}", p["schema"].get("type", "")) for p in route.get("parameters", [])
            ]
            if given:
                parts.append(table(("parameter", "type"), given))
            if body:
                parts.append(f"Body: [{body}](#{body.lower()})\n")
                bodies[body] = None
            answers = []
            for status, answer in sorted(route["responses"].items()):
                name = _schema_of(answer)
                bodies |= {name: None} if name else {}
                linked = f"[{name}](#{name.lower()})" if name else ""
                answers.append((status, answer["description"], linked))
            parts.append(table(("status", "meaning", "body"), answers))
    parts.append("## Bodies\n")
    pending = list(bodies)
    for name in pending:
        properties = schemas[name].get("properties", {})
        pending += [n for p in properties.values() for n in _refs(p) if n not in pending]
        required = schemas[name].get("required", [])
        rows = [
            (f"`{key}`", _json_type(p), "yes" if key in required else _default(p), p.get("description", ""))
            for key, p in properties.items()
        ]
        parts.append(f"### {name}\n\n{schemas[name].get('description', '')}\n")
        parts.append(table(("field", "type", "required, or default", "meaning"), rows))
    return "\n".join(parts)


def _schema_of(body: Mapping[str, Any]) -> str:
    schema = body.get("content", {}).get("application/json", {}).get("schema", {})
    return next(iter(_refs(schema)), "")


def _refs(schema: Any) -> list[str]:
    """Names of the schemas that one refers to."""
    if isinstance(schema, dict):
        own = [schema["$ref"].rsplit("/", 1)[-1]] if "$ref" in schema else []
        return own + [name for value in schema.values() for name in _refs(value)]
    return [name for entry in schema for name in _refs(entry)] if isinstance(schema, list) else []


def _json_type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_json_type(s) for s in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_json_type(schema.get('items', {}))}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_json_type(schema['additionalProperties'])}"
    return str(schema.get("type", "any"))


def _default(schema: Mapping[str, Any]) -> str:
    return (
        f"`{yaml.safe_dump(schema['default'], default_flow_style=True).split(chr(10))[0]}`"
        if "default" in schema
        else ""
    )


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    escaped = [
        "| " + " | ".join(" ".join(cell.replace("|", "&#124;").split()) for cell in line) + " |" for line in lines
    ]
    return "\n".join(escaped) + "\n"


GENERATED = {"config": config_reference, "command": command_reference, "http": http_reference}
"""By the name in a page's `<!-- generated: NAME -->`."""
