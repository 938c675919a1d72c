"""The command `pixrec`: its verbs. Parses, calls one function, prints one JSON line.

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
from typing import TYPE_CHECKING, Any, NoReturn

from pixrec import __version__
from pixrec.config import Config, load_config
from pixrec.errors import InputError, PixRecError, surfaced

if TYPE_CHECKING:
    from pixrec.console import Console
    from pixrec.handles import Handle


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in `cluster.session`; torch reads it when it is loaded
    arguments = _parser().parse_args(argv)
    try:
        with contextlib.redirect_stdout(sys.stderr), surfaced():
            summary = _run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except PixRecError as fault:
        print(f"pixrec {arguments.verb}: {' '.join(str(fault).split())}", file=sys.stderr)
        return fault.exit_code
    except Exception:
        traceback.print_exc()
        return 1
    print(json.dumps(summary), flush=True)  # escaped to ASCII: no locale and no odd id can break the line
    faults = summary["faults"] if arguments.verb == "doctor" else []
    for line in faults:
        print(f"pixrec doctor: {line}", file=sys.stderr)
    return 2 if faults else 0


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.verb == "bench-serve":  # which wants its cores for the load
        return _bench_serve(arguments)
    if arguments.verb == "events":
        from pixrec.live.places import export_events

        return {"out": arguments.out, "events": export_events(arguments.events, arguments.out).rows}
    from pixrec import verbs
    from pixrec.console import Console

    a = arguments
    base = verbs.demo_config() if a.verb == "demo" else Config()
    config = load_config(overrides=a.set, base=verbs.read_settings(a.config or None, base))
    with Console() as console:
        match a.verb:
            case "prepare":
                data = verbs.prepare(a.items, a.interactions, a.out, source=a.source, config=config, progress=console)
                return _summary(data, "items", "images", "interactions", "cold", "users", "split")
            case "train" if a.dry_run:
                rate = a.tokens_per_second
                return verbs.plan_training(a.data, config=config, tokens_per_second=rate, progress=console)
            case "train":
                options = {"overrides": a.set, "resume": a.resume, "progress": console}
                return _summary(verbs.train(a.data, a.out, config=a.config or None, **options))
            case "embed":
                return _embed(a, config, console)
            case "evaluate":
                report = verbs.evaluate(
                    a.model, a.data, a.out, index=a.index, predictions=a.predictions, also=a.also, config=config,
                    progress=console,
                )  # fmt: skip
                return _summary(report, "users", "results", "guards")
            case "recommend":
                history = [i for i in a.history.split(",") if i]
                return verbs.recommend(a.model, a.index, a.data, history, a.k, a.include_history, a.timestamps)
            case "doctor":
                from pixrec.cluster.doctor import doctor

                return doctor(config, {**dict.fromkeys(a.read, "read"), **dict.fromkeys(a.write, "write")}, console)
            case "pipeline":
                from pixrec.pipeline import pipeline

                options = {"source": a.source, "overrides": a.set, "progress": console}
                return pipeline(a.items, a.interactions, a.out, config=a.config or None, **options)
            case "submit":
                from pixrec.cluster.submit import submit

                return submit(a.name, a.command, config.job, console)
            case "serve":
                return verbs.serve(a.model, a.index, a.data, config, a.host, a.port)
            case _:
                return verbs.demo(a.out, config=config, progress=console)


def _bench_serve(a: argparse.Namespace) -> dict[str, Any]:
    from pixrec.serving.loadtest import Load, run

    return run(Load(a.url, a.seconds, a.rate, a.clients, a.api_key, a.k, a.history_items))


def _summary(made: Handle, *keys: str) -> dict[str, Any]:
    """The place of what was made, and what its JSON file says: of that the named keys, or all."""
    return {"out": made.uri, **({key: made.info[key] for key in keys} if keys else made.info)}


def _embed(a: argparse.Namespace, config: Config, console: Console) -> dict[str, Any]:
    """Publish a version of `--out`, or list its versions, or go back to one; `--keep` deletes old ones then."""
    from pixrec import verbs
    from pixrec.artifact import keep_newest, list_versions, rollback

    if a.keep is not None and a.keep < 1:
        raise InputError(f"--keep {a.keep}: at least 1 version must stay")
    if a.list or a.rollback is not None:
        if a.model is not None or a.data is not None or (a.list and a.keep is not None):
            raise InputError("--list goes with --out alone, --rollback with --out and --keep")
    elif (a.model is None) != (a.data is None) or (a.model is None and a.keep is None):
        raise InputError("embed needs --model and --data; without both: --list, --rollback VERSION or --keep N")
    if a.list:
        versions = list_versions(a.out)
        current = next((found["version"] for found in versions if found["current"]), None)
        return {"out": a.out, "current": current, "versions": versions}
    summary: dict[str, Any] = {"out": a.out}
    if a.rollback is not None:
        summary |= {"before": rollback(a.out, a.rollback), "current": a.rollback}
    elif a.model is not None:
        summary = _summary(verbs.embed(a.model, a.data, a.out, config=config, progress=console))
    return summary if a.keep is None else {**summary, "deleted": keep_newest(a.out, a.keep)}


def _timestamps(text: str) -> list[int]:
    try:
        return [int(moment) for moment in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be whole milliseconds since the epoch, as 0,86400000"
        ) from None


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

    def verb_on_tables(name: str, help: str, out: str) -> None:
        sub = verb(name, help)
        several = "; may be given again: rows follow each other"
        what = f"interactions table{several}, and an event that several tables hold counts once"
        sub.add_argument("--interactions", required=True, action="append", metavar="URI", help=what)
        what = f"items table{several}; without it the catalog is the set of ids seen"
        sub.add_argument("--items", action="append", metavar="URI", help=what)
        sub.add_argument(
            "--source",
            choices=["tables", "amazon2023"],
            default="tables",
            help="format of the input: Parquet tables, or raw .jsonl[.gz]",
        )
        sub.add_argument("--out", required=True, metavar="URI", help=out)

    verb_on_tables("prepare", "Turn input tables into a prepared data set.", "folder of the prepared data set")
    sub = verb("train", "Fine-tune the towers.", data, ("out", "folder of the model"))
    sub.add_argument("--resume", action="store_true", help="continue the unfinished run of the same --out")
    sub.add_argument("--dry-run", action="store_true", help="say what it would need (memory, steps, time), and stop")
    sub.add_argument(
        "--tokens-per-second", type=float, metavar="N", help="a worker's measured rate, for the time of --dry-run"
    )
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
    verb_on_tables(
        "pipeline",
        "Prepare, train, embed, evaluate, and publish unless the new model may be worse.",
        "folder of data sets, models, reports and the index that servers follow",
    )
    sub = verb("submit", "Run a command as a job of a Ray cluster, or join the job of that name that runs.")
    sub.add_argument("--name", required=True, help="name of the run, which is the job's submission id")
    sub.add_argument("command", nargs=argparse.REMAINDER, metavar="-- VERB ...", help="the command, as after pixrec")
    sub = verb("doctor", "Tell what the cluster has, what a run would use, and what is wrong.")
    sub.add_argument("--read", action="append", default=[], metavar="URI", help="a place that a run will read")
    sub.add_argument("--write", action="append", default=[], metavar="URI", help="a place that a run will write")
    what = "Write the events that a server has stored as an interactions table, for prepare."
    sub = verbs.add_parser("events", help=what, description=what, allow_abbrev=False)
    sub.add_argument("action", choices=["export"])
    sub.add_argument("--events", required=True, metavar="FILE", help="serve.store, such as INDEX/live.sqlite")
    sub.add_argument("--out", required=True, metavar="FILE", help="the Parquet file")
    what = "Put load on a running server and measure its answers."
    sub = verbs.add_parser("bench-serve", help=what, description=what, allow_abbrev=False)
    sub.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default http://127.0.0.1:8000)")
    sub.add_argument("--rate", type=float, metavar="N", help="requests a second, whether or not earlier are answered")
    sub.add_argument("--clients", type=int, metavar="N", help="clients that send their next when the last is answered")
    sub.add_argument("--seconds", type=float, default=30.0, metavar="S", help="how long (default 30)")
    sub.add_argument("--api-key", default=os.environ.get("PIXREC_API_KEY"), help="default: PIXREC_API_KEY")
    sub.add_argument("--history-items", type=int, default=10, metavar="N", help="mean length of a history (default 10)")
    sub.add_argument("-k", type=int, default=10, metavar="N", help="how many items to ask for (default 10)")
    verb("demo", "Run everything on a synthetic catalog.", ("out", "folder for data, model, index and report"))
    return parser
