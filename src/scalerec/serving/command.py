"""The commands `serve` and `key`: what they take, and the process that a service is."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scalerec.errors import InputError
from scalerec.hardware import cores, keep_freed_memory

NEEDS = "serving needs more packages: pip install -e '.[serve]'"


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add both commands; `command(name, run, help, overridable)` makes the parser of one."""
    parser = command("serve", serve, "answer requests over HTTP with one or several bundles", False)
    parser.add_argument("bundle", nargs="+", type=Path, help="what `scalerec export` wrote; the first one serves")
    parser.add_argument(
        "--state", action="append", metavar="FOLDER|URL",
        help="where histories are kept: a folder (LMDB), redis://HOST:PORT/0 or memory: (default, gone at the end); "
        "again for bundles that keep other histories",
    )  # fmt: skip
    parser.add_argument(
        "--users",
        type=Path,
        metavar="FILE",
        help="a row of columns for each user (default: --state's)",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--name", action="append", default=[], help="a host name that a proxy here forwards")
    parser.add_argument("--keys", type=Path, metavar="FILE", help="API keys, made with `scalerec key add`")
    parser.add_argument("--without-keys", action="store_true", help="let anybody in who can reach the port")
    parser.add_argument("--page", action="store_true", help="the page also where others can reach it, for keys")
    parser.add_argument("--exposures", type=Path, metavar="FOLDER", help="log what was shown, as Parquet files")
    parser.add_argument("--exposure-rate", type=float, default=1.0, metavar="SHARE", help="of the requests, logged")
    parser.add_argument("--weights", default="", metavar="NAME=SHARE,...", help="of users, for an A/B test")
    parser.add_argument("--salt", default="scalerec", help="deals users to models; another one deals them anew")
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8"), default="fp32")
    parser.add_argument("--index", choices=("exact", "faiss"), default="exact", help="how items are retrieved")
    parser.add_argument("--threads", type=int, metavar="N", help="of the model (default: OMP_NUM_THREADS or measured)")
    parser.add_argument("--batch-wait-ms", type=float, default=2.0, metavar="MS", help="for requests to come together")
    parser.add_argument("--timeout-ms", type=float, default=2_000.0, metavar="MS", help="for its turn, else 503")
    parser.add_argument(
        "--overload-ms", type=float, default=25.0, metavar="MS", help="the same while too much is asked"
    )
    parser.add_argument("--rate", type=float, default=1_000.0, metavar="N", help="requests a second of a key; 0: any")
    parser.add_argument("--max-candidates", type=int, default=4_096, metavar="N")
    parser.add_argument("--drain-seconds", type=float, default=2.0, metavar="S", help="between SIGTERM and the end")

    parser = command("key", key, "API keys: `key add NAME FILE`, `key list FILE`, `key remove NAME FILE`", False)
    parser.add_argument("action", choices=("add", "list", "remove"))
    parser.add_argument("words", nargs="+", metavar="[NAME] FILE")
    parser.add_argument("--admin", action="store_true", help="may also activate models and look at users")


def settings_of(options: argparse.Namespace) -> Any:
    """What the options say, checked; InputError names the option."""
    from scalerec import config
    from scalerec.serving.settings import Settings

    said = {
        "bundles": options.bundle, "state": options.state or ["memory:"], "users": options.users,
        "host": options.host, "port": options.port, "names": [name.lower() for name in options.name],
        "keys": options.keys, "without_keys": options.without_keys, "page": options.page,
        "exposures": options.exposures, "exposure_rate": options.exposure_rate,
        "weights": shares(options.weights, "--weights"), "salt": options.salt, "precision": options.precision,
        "index": options.index, "batch_wait_ms": options.batch_wait_ms, "drain_seconds": options.drain_seconds,
        "limits": {
            "wait_ms": options.timeout_ms, "overload_ms": options.overload_ms, "rate": options.rate,
            "candidates": options.max_candidates,
        },
    }  # fmt: skip
    return config.parse(Settings, said, "scalerec serve")


def serve(options: argparse.Namespace) -> None:
    """Load, listen, and serve until SIGTERM or SIGINT."""
    try:
        import uvicorn

        from scalerec.serving import logs
        from scalerec.serving.app import create_app, open_service
        from scalerec.serving.server import Server
    except ImportError as error:
        raise InputError(f"{NEEDS} ({error})") from None
    settings = settings_of(options)
    if options.threads is not None and options.threads < 1:
        raise InputError("--threads: at least 1")
    logs.start()
    keep_freed_memory()
    service = open_service(settings)
    set_threads(options.threads, service)
    app = create_app(settings, service)
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, log_config=None, access_log=False, proxy_headers=False,
        server_header=False, timeout_graceful_shutdown=30, lifespan="on", ws="none",
        limit_concurrency=2 * settings.limits.in_flight,
    )  # fmt: skip
    listening = Server(config, service)
    with listening.bound() as where:
        models = {one.name: one.bundle.version for one in service.models.by_name.values()}
        logs.say("listening", url=where, models=models, page=settings.shows_people, keys=settings.keys is not None)
        if options.json:
            print(json.dumps({"url": where, "models": models}), flush=True)
        else:
            print(f"{where}  ({', '.join(models)}); stop with Ctrl-C", file=sys.stderr, flush=True)
        # What was loaded stays: a collection that walks through it would stop all requests for its time.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 100)
        listening.run(sockets=listening.sockets)


def set_threads(asked: int | None, service: Any) -> None:
    """As many threads for the model as asked, or as OMP_NUM_THREADS says, or as are measured to be worth it."""
    import torch

    from scalerec.inference.engine import Ask
    from scalerec.inference.threads import best_threads, measure_threads
    from scalerec.serving import logs
    from scalerec.serving.states import clock

    if asked is None and "OMP_NUM_THREADS" in os.environ:
        return
    measured: dict[int, float] = {}
    if asked is None:
        served = next((one for one in service.models.by_name.values() if one.ranks), None)
        if served is None:
            return
        engine = served.engine
        ask = Ask(engine.catalogue.ids[0], {}, {}, engine.catalogue.ids[:200], (), clock(served.columns))
        measured = measure_threads(lambda: engine.rank([ask]), seconds=1.0)
        asked = best_threads(measured, cores())
    torch.set_num_threads(asked)
    logs.say("threads", threads=asked, milliseconds={str(count): round(time, 2) for count, time in measured.items()})


def key(options: argparse.Namespace) -> None:
    """Make, list or remove keys; a new key is printed once, on standard output."""
    from scalerec.serving import keys

    named = options.action != "list"
    if len(options.words) != 1 + named:
        raise InputError(f"scalerec key {options.action}: give {'NAME FILE' if named else 'FILE'}")
    file = Path(options.words[-1])
    if options.action == "add":
        made = keys.add(file, options.words[0], options.admin)
        print(json.dumps({"key": made}) if options.json else made)
        print(f"kept as a hash in {file}; it is shown this once", file=sys.stderr)
    elif options.action == "remove":
        keys.remove(file, options.words[0])
        print(f"{options.words[0]} removed from {file}", file=sys.stderr)
    else:
        found = [{"name": one.name, "role": one.role, "created": one.created} for one in keys.read(file)]
        lines = [f"{one['name']}  {one['role']}  {one['created']}" for one in found]
        print(json.dumps(found) if options.json else "\n".join(lines))


def shares(text: str, option: str) -> dict[str, float]:
    """{"a": 0.9, "b": 0.1} of "a=0.9,b=0.1"; InputError names the option."""
    found: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, share = part.rpartition("=")
        try:
            found[name.strip()] = float(share)
        except ValueError:
            raise InputError(f"{option} {part}: write NAME=NUMBER,NAME=NUMBER") from None
    return found
