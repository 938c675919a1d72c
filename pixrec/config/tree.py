"""The whole tree of settings, read from YAML text and written as YAML text. Knows no file."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from pixrec.config.demo import SyntheticConfig
from pixrec.config.embed import EmbedConfig
from pixrec.config.evaluate import EvaluateConfig, SasrecConfig
from pixrec.config.job import JobConfig
from pixrec.config.model import ModelConfig
from pixrec.config.pipeline import PipelineConfig
from pixrec.config.prepare import PrepareConfig
from pixrec.config.serve import ServeConfig
from pixrec.config.train import TrainConfig
from pixrec.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    sasrec: SasrecConfig = field(default_factory=SasrecConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    job: JobConfig = field(default_factory=JobConfig)
    demo: SyntheticConfig = field(default_factory=SyntheticConfig)


SECRET_KEYS = {"api_key", "api_keys", "admin_key"}


def load_config(text: str = "", overrides: typing.Sequence[str] = (), *, base: Config | None = None) -> Config:
    """Build the tree from YAML `text` with `overrides` on top, each `section.key=value` with a YAML value.

    `base` supplies what neither names (default: the defaults above). All of it is checked together, so settings that
    need each other may come in any order. Raises ConfigError on an unknown key, naming the nearest known one, and on a
    value of the wrong type.
    """
    try:
        tree = yaml.safe_load(text) if text else {}
    except yaml.YAMLError as error:
        raise ConfigError(f"the config file is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"the config file must hold a mapping of sections, not {type(tree).__name__}")
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"--set {override!r} must look like section.key=value")
        try:
            parsed = yaml.safe_load(value) if value.strip() else None
        except yaml.YAMLError:
            parsed = value
        _merge(tree, _nested(path.strip(), parsed))
    return _build(Config, tree, "", base or Config())


def change_config(config: Config, settings: typing.Mapping[str, Any]) -> Config:
    """`config` with `settings` on top: a mapping of dotted keys (`{"train.epochs": 3}`), of sections
    (`{"train": {"epochs": 3}}`), or of both. Raises ConfigError as `load_config` does.

    What several settings say together is checked together.
    """
    tree: dict[str, Any] = {}
    for path, value in settings.items():
        _merge(tree, _nested(str(path), value))
    return _build(Config, tree, "", config)


def _nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return typing.cast("dict[str, Any]", value)


def _merge(tree: dict[str, Any], more: typing.Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, typing.Mapping):
            section = tree.get(key)
            tree[key] = section if isinstance(section, dict) else {}
            _merge(tree[key], value)
        else:
            tree[key] = value


def to_dict(node: Any, *, redact: bool = True) -> Any:
    """Plain nested dicts and lists, as `dump_config` writes them; secrets are replaced unless `redact` is off."""
    if not dataclasses.is_dataclass(node):
        return [to_dict(entry, redact=redact) for entry in node] if isinstance(node, tuple) else node
    values = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    return {
        key: _redacted(value) if redact and key in SECRET_KEYS and value else to_dict(value, redact=redact)
        for key, value in values.items()
    }


def _redacted(secret: Any) -> Any:
    return ["***"] * len(secret) if isinstance(secret, tuple) else "***"


def dump_config(config: Config) -> str:
    """YAML text of the resolved tree, secrets left out; `load_config` reads it back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def _build(cls: type, tree: dict[str, Any], where: str, base: Any) -> Any:
    """A `cls` with what `tree` says; `base`, or where that is None the defaults, supply the rest."""
    hints = typing.get_type_hints(cls)
    changes = {}
    for key, value in tree.items():
        path = f"{where}{key}"
        if key not in hints:
            raise ConfigError(f"unknown config key {path!r}{_suggest(str(key), cls, where)}")
        changes[key] = _coerce(value, hints[key], path, getattr(base, key, None))
    return cls(**changes) if base is None else dataclasses.replace(base, **changes)


def _suggest(key: str, cls: type, where: str) -> str:
    here = {child: f"{where}{child}" for child in typing.get_type_hints(cls)}
    deepest_first = sorted(_paths(Config, ""), key=lambda path: -path.count("."))
    anywhere = {path.rsplit(".", 1)[-1]: path for path in deepest_first}  # of equal names the least deep one stays
    for names, likeness in ((here, 0.6), (anywhere, 0.8)):
        if close := difflib.get_close_matches(key, names, n=1, cutoff=likeness):
            return f"; did you mean {names[close[0]]!r}?"
    return f"; known here: {', '.join(here)}"


def _paths(cls: type, where: str) -> typing.Iterator[str]:
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _paths(typing.cast(type, hint), f"{where}{name}.")
        else:
            yield f"{where}{name}"


def _coerce(value: Any, hint: Any, path: str, base: Any = None) -> Any:
    """`value` as the annotated type, without guessing: an int may stand for a float, a list for a tuple.

    `base` supplies what the mapping of a section leaves out.
    """
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"config key {path!r} is a section; give its keys, not {value!r}")
        return _build(typing.cast(type, hint), value, f"{path}.", base)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        listed = [a for a in args if isinstance(value, (list, tuple)) and typing.get_origin(a) is tuple]
        return _coerce(value, next(a for a in (*listed, *args) if a is not type(None)), path)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"config key {path!r} is {value!r}: must be one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"config key {path!r} is {value!r}: must be a list, such as [a, b]")
        numbered = dataclasses.is_dataclass(args[0])
        return tuple(_coerce(v, args[0], f"{path}[{i}]" if numbered else path) for i, v in enumerate(value))
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-3 (no dot) as text
        except (ValueError, OverflowError):
            number = math.nan
        if math.isnan(number):
            raise ConfigError(f"config key {path!r} is {value!r}: must be a number")
        return number
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if (hint is int and isinstance(value, bool)) or not isinstance(value, hint):
        raise ConfigError(f"config key {path!r} is {value!r}: must be of type {hint.__name__}")
    return value
