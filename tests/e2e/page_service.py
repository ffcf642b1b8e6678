"""A stand-in for the service, for states of the page that are hard to bring the real one into.

Tests hold its answers, and the page's requests, against the records of the real one.
"""

from __future__ import annotations

import json
import math
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = Path(__file__).parents[2] / "src" / "scalerec" / "serving" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
ITEMS = 300
VERSION = "1f0c2a77e9d4"
GENRES = ("Drama", "Comedy", "Action|Thriller", "Romance", "Sci-Fi", "Documentary")
NASTY = "<img src=x onerror=alert(1)>"
LOG = {"user": "user_id", "item": "item_id", "time": "time", "time_unit": 1.0}
LOG |= {"labels": ["like", "dislike"], "columns": ["year"]}
REASON = "It has no tokens."
TOKENS = ["user", "user_so_far", "rated", "liked", "disliked", "item", "item_so_far", "affinity", "context"]


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, detail: Any, **headers: str) -> None:
        self.status, self.detail, self.headers = status, detail, headers


class Service:
    """Users 1..60 with histories, two models; `users` may hold others."""

    def __init__(self) -> None:
        self.key: str | None = None  # asked for where it is set
        self.refusals: list[Refusal] = []  # given once each, to the next recommendations
        self.retrieves = True
        self.requests: list[tuple[str, Any]] = []
        self.answers: list[tuple[str, Any]] = []
        self.users: dict[str, tuple[Any, list[dict]]] = {str(user): (user, _past(user)) for user in range(1, 61)}
        self.events: set[str] = set()

    def models(self) -> list[dict]:
        context = {"hour": 20, "weekday": 4, "item_mean_rating": 3.5, "device": "tv"}
        common = {"precision": "fp32", "ranks": True, "tasks": ["like", "dislike"], "items": ITEMS, "log": LOG}
        first = {"name": "rankmixer", "version": VERSION, "active": True, "default": True, "context": context}
        other = {"name": "hstu", "version": "b81d3e9a0c55", "active": False, "default": False, "context": {}}
        common["context_columns"] = [*context, "age"]
        return [first | common | {"retrieves": self.retrieves}, other | common | {"retrieves": False}]

    def user(self, name: str) -> dict:
        if name not in self.users:
            raise Refusal(404, f"user: {name!r} is not known")
        user, past = self.users[name]
        history = {"rated": past[-50:]}
        for label in ("like", "dislike"):
            history[f"{label}d"] = [row for row in past if row[label]][-50:]
        kept = ("item_id", "year", "time")
        history = {name: [{column: row[column] for column in kept} for row in rows] for name, rows in history.items()}
        return {"user": user, "columns": {"age": 25, "occupation": NASTY}, "history": history}

    def probabilities(self, ask: dict, item: int) -> dict[str, float]:
        _, past = self.users.get(str(ask["user"]), (0, []))
        context = ask.get("context", {})
        taste = sum(row["like"] - row["dislike"] for row in past if row["item_id"] % 6 == item % 6) / (len(past) + 4)
        rough = random.Random(f"{ask['model']} {item}").gauss(0, 1)
        moment = (context.get("weekday", 4) - 4) * (item % 5 - 2) * 0.25
        logit = 1.5 * taste + 0.8 * rough + moment - 0.004 * item
        return {"like": 1 / (1 + math.exp(-logit)), "dislike": 1 / (1 + math.exp(1.6 + logit))}

    def recommend(self, ask: dict) -> dict:
        if self.refusals:
            raise self.refusals.pop(0)
        name = str(ask["user"])
        seen = {row["item_id"] for row in self.users[name][1]} if name in self.users and ask["filter_seen"] else set()
        cold = name not in self.users
        order = sorted(range(1, ITEMS + 1), key=lambda item: (item * 7919 + (0 if cold else len(name)) * 31) % 1009)
        found = [item for item in order if item not in seen][: ask["retrieve"]]
        scores = {item: self.probabilities(ask, item) for item in found}
        best = sorted(found, key=lambda item: -scores[item]["like"])[: ask["k"]]
        popular = cold or not self.retrieves
        cosine = [None if popular else 0.91 * 0.997**i for i in range(len(found))]
        places = [{"id": i, "place": n + 1, "similarity": c} for n, (i, c) in enumerate(zip(found, cosine))]
        timing = {"store": 0.31, "retrieve": 1.42, "features": 2.2, "user": 0.9, "candidates": 6.1, "total": 12.0}
        items = [{"id": item, "score": scores[item]["like"], "scores": scores[item]} for item in best]
        source = "popularity" if popular else "rankmixer"
        return self.said(ask) | {
            "items": items, "cold": cold, "retrieved": places, "source": source, "removed": {"seen": len(seen)},
            "timing": timing, "bucket": None, "stale": False, "time": ask.get("time"), "clock_behind": False,
            "unknown_items": [], "defaults": [] if ask.get("context") else ["hour"],
        }  # fmt: skip

    def said(self, ask: dict) -> dict:
        return {"request_id": f"r{len(self.requests)}", "model": ask["model"], "version": VERSION}

    def rank(self, ask: dict) -> dict:
        of_all = self.recommend(ask | {"filter_seen": False, "retrieve": ITEMS, "k": ITEMS})
        of_all["items"] = [row for row in of_all["items"] if row["id"] in ask["candidates"]]
        return {name: value for name, value in of_all.items() if name not in ("retrieved", "source", "removed")}

    def explain(self, ask: dict) -> dict:
        tokens = [] if ask["model"] == "hstu" else TOKENS
        chance = random.Random(str(ask["candidates"]))
        effect = [[chance.gauss(0.01, 0.06) for _ in ask["candidates"]] for _ in tokens]
        scores = [self.probabilities(ask, item)["like"] for item in ask["candidates"]]
        more = {"scores": scores, "effect": effect, "reason": "" if tokens else REASON}
        return self.said(ask) | {"tokens": tokens, "tasks": ["like", "dislike"]} | more

    def add(self, body: dict) -> dict:
        appended = 0
        for event in body["events"]:
            if event["event_id"] in self.events:
                continue
            self.events.add(event["event_id"])
            row = {"year": 1990, "like": event["like"], "dislike": event["dislike"]}
            row |= {"item_id": event["item_id"], "time": event["time"]}
            self.users.setdefault(str(event["user"]), (event["user"], []))[1].append(row)
            appended += 1
        return {"appended": appended, "repeated": len(body["events"]) - appended}

    def answer(self, method: str, url: str, body: Any, key: str | None) -> Any:
        self.requests.append((url, body))
        if self.key is not None and key != f"Bearer {self.key}":
            raise Refusal(401, "a key is needed" if key is None else "this key is not known")
        path = urlsplit(url).path
        name = unquote(path.rpartition("/")[2])
        if method == "POST":
            work = {"recommend": self.recommend, "rank": self.rank, "explain": self.explain, "events": self.add}
            return work[name](body)
        if path == "/v1/models":
            return {"models": self.models(), "weights": {}}
        if path == "/v1/users":
            query = parse_qs(urlsplit(url).query)
            prefix = query.get("prefix", [""])[0]
            ids = sorted((name for name in self.users if name.startswith(prefix)), key=len)
            return {"users": [self.users[name][0] for name in ids[: int(query["limit"][0])]]}
        if path.startswith("/v1/users/"):
            return self.user(name)
        item = int(name)
        return {"id": item, "columns": {"year": 1930 + item % 70, "genre_set": GENRES[item % 6], "popularity": 5}}


def _past(user: int) -> list[dict]:
    chance = random.Random(user)
    time, rows = 880_000_000 + user * 10_000, []
    for item in chance.sample(range(1, ITEMS + 1), 40):
        time += 60 if chance.random() < 0.8 else 500_000
        stars = chance.randint(1, 5)
        row = {"item_id": item, "year": 1930 + item % 70, "time": time}
        rows.append(row | {"like": int(stars > 3), "dislike": int(stars < 3)})
    return rows


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    service: Service

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        file = PAGE / (path.removeprefix("/page/") if path.startswith("/page/") else "index.html")
        if path == "/" or path.startswith("/page/"):
            return self.reply(200, file.read_bytes(), TYPES[file.suffix], **{"Content-Security-Policy": POLICY})
        self.api(None)

    def do_POST(self) -> None:
        self.api(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def api(self, body: Any) -> None:
        try:
            found = self.service.answer(self.command, self.path, body, self.headers["authorization"])
            self.service.answers.append((urlsplit(self.path).path, found))
            self.reply(200, json.dumps(found).encode(), "application/json")
        except Refusal as refusal:
            text = json.dumps({"error": refusal.detail, "field": ""}).encode()
            self.reply(refusal.status, text, "application/json", **refusal.headers)

    def reply(self, status: int, content: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def start(service: Service, port: int = 0) -> tuple[ThreadingHTTPServer, str]:
    """The service on a free port of the loopback; `shutdown` and `server_close` end it."""
    server = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"service": service}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/"
