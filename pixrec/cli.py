"""The command `pixrec`: seven verbs. Parses, calls one function, prints one JSON line.

Progress and logs go to stderr; the last line of stdout is one JSON object. Exit 0: done; 2: the input or the
arguments are at fault, said in one line; 1: anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from pixrec import __version__, storage
from pixrec.config import Config, load_config
from pixrec.errors import ConfigError, PixRecError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            summary = _run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        fault = _user_fault(error)
        if fault is None:
            traceback.print_exc()
            return 1
        print(f"pixrec {arguments.verb}: {' '.join(str(fault).split())}", file=sys.stderr)
        return 2
    print(json.dumps(summary), flush=True)  # escaped to ASCII: no locale and no odd id can break the line
    return 0


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    from pixrec import verbs
    from pixrec.console import Console

    transformers_logging.disable_progress_bar()  # "Loading weights" on stderr, also before a one-line error
    a = arguments
    base = verbs.demo_config(Config()) if a.verb == "demo" else Config()
    config = load_config(overrides=a.set, base=_from_file(a.config, base) if a.config else base)
    with Console() as console:
        match a.verb:
            case "prepare":
                return verbs.prepare(a.items, a.interactions, a.out, a.source, config, console)
            case "train":
                return verbs.train(a.data, a.out, config, a.resume, console)
            case "embed":
                return verbs.embed(
                    a.model, a.data, a.out, config, console, list_only=a.list, rollback_to=a.rollback, keep=a.keep
                )
            case "evaluate":
                return verbs.evaluate(
                    a.model, a.data, a.index, a.out, config, console, predictions=a.predictions, also=a.also
                )
            case "recommend":
                history = [i for i in a.history.split(",") if i]
                return verbs.recommend(a.model, a.index, a.data, history, a.k, a.include_history, a.timestamps, console)
            case "serve":
                return verbs.serve(a.model, a.index, a.data, config, a.host, a.port, console)
            case _:
                return verbs.demo(a.out, config, console)


def _timestamps(text: str) -> list[int]:
    try:
        return [int(moment) for moment in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be whole milliseconds since the epoch, as 0,86400000"
        ) from None


def _from_file(place: str, base: Config) -> Config:
    try:
        return load_config(storage.read_text(place), base=base)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pixrec", description="Recommends the next product from what products look like and say.")
    parser.add_argument("--version", action="version", version=f"pixrec {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)

    def verb(name: str, help: str, *required: tuple[str, str]) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
        for option, what in required:
            sub.add_argument(f"--{option}", required=True, metavar="URI", help=what)
        sub.add_argument("--config", metavar="FILE", help="YAML file with sections of the config tree")
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, as train.epochs=3")
        return sub

    model, data, index = ("model", "model folder"), ("data", "prepared data set"), ("index", "index folder")
    sub = verb("prepare", "Turn input tables into a prepared data set.", ("interactions", "interactions table"))
    sub.add_argument("--items", metavar="URI", help="items table; without it the catalog is the set of ids seen")
    sub.add_argument(
        "--source",
        choices=["tables", "amazon2023"],
        default="tables",
        help="format of the input: Parquet tables, or raw .jsonl[.gz]",
    )
    sub.add_argument("--out", required=True, metavar="URI", help="folder of the prepared data set")
    sub = verb("train", "Fine-tune the towers.", data, ("out", "folder of the model"))
    sub.add_argument("--resume", action="store_true", help="continue the unfinished run of the same --out")
    sub = verb("embed", "Publish the vectors of a catalog as an index version.", ("out", "index folder"))
    sub.add_argument("--model", metavar="URI", help="model folder")
    sub.add_argument("--data", metavar="URI", help="prepared data set")
    choice = sub.add_mutually_exclusive_group()
    choice.add_argument("--list", action="store_true", help="list the versions of --out and do nothing else")
    choice.add_argument("--rollback", metavar="VERSION", help="make an older version of --out the one in use")
    sub.add_argument("--keep", type=int, metavar="N", help="delete all but the newest N versions and the one in use")
    sub = verb("evaluate", "Measure recommenders on the held-out events.", data, ("out", "folder of the report"))
    sub.add_argument("--model", metavar="URI", help="model folder; without it the predictions or the baselines alone")
    sub.add_argument("--predictions", metavar="FILE", help="Parquet of user_id and ranked item_ids, scored alike")
    sub.add_argument("--also", action="append", default=[], metavar="METRICS", help="metrics.json of another seed")
    sub.add_argument("--index", metavar="URI", help="use its item vectors instead of computing them")
    sub = verb("recommend", "Recommend the next items of a history.", model, index)
    sub.add_argument("--data", metavar="URI", help="prepared data set, where it has moved since embed")
    sub.add_argument("--history", required=True, metavar="ID,ID,...", help="item ids, oldest first")
    sub.add_argument(
        "--timestamps", type=_timestamps, metavar="MS,MS,...", help="when each was met, for a model that reads times"
    )
    sub.add_argument("-k", type=int, default=10, metavar="N", help="how many (default 10)")
    sub.add_argument("--include-history", action="store_true", help="may recommend items of the history again")
    sub = verb("serve", "Answer requests over HTTP.", model, index, data)
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    sub.add_argument("--port", type=int, default=8000, help="port to listen on (default 8000)")
    verb("demo", "Run everything on a synthetic catalog.", ("out", "folder for data, model, index and report"))
    return parser


def _user_fault(error: BaseException | None) -> PixRecError | None:
    """The PixRecError behind an error, also one that happened on a worker, whichever of them it was."""
    if error is None or isinstance(error, PixRecError):
        return error
    failures = getattr(error, "worker_failures", None)
    inner = [*failures.values()] if isinstance(failures, dict) else []
    faults = (_user_fault(e) for e in (getattr(error, "cause", None), *inner, error.__cause__) if e is not error)
    return next(filter(None, faults), None)
