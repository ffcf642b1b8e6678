"""API keys: shown once when made, kept as salted scrypt hashes, compared in constant time.

A key is `sr_<id>_<secret>`. The id finds the entry without a hash, so a key that nobody made costs nothing to refuse;
the secret is 192 random bits. A key that was right is remembered as a keyed digest for as long as the process lives,
so that scrypt is paid once and not for each request.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import threading
import time
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from scalerec import config
from scalerec.errors import InputError
from scalerec.schema import Frozen
from scalerec.serving import logs

_FORM = re.compile(r"sr_([0-9a-f]{12})_([A-Za-z0-9_-]{32})")
_COST = {"n": 2**14, "r": 8, "p": 1}  # 16 MiB and some tens of milliseconds
_WRONG_A_SECOND = 5.0  # wrong secrets of one id that are looked at; each costs a hash


class Key(Frozen):
    """One key at rest."""

    id: str
    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    role: Literal["use", "admin"] = "use"  # admin: also activate models and look at users
    salt: str
    hash: str
    created: str


class _File(Frozen):
    format: Literal[1] = 1
    keys: tuple[Key, ...] = ()


def add(file: Path, name: str, admin: bool = False) -> str:
    """Make a key and keep its hash in `file`; the key itself is returned, and nowhere else."""
    found = read(file) if file.exists() else ()
    if any(key.name == name for key in found):
        raise InputError(f"{file}: there is a key {name!r} already: remove it or choose another name")
    identity, secret, salt = secrets.token_hex(6), secrets.token_urlsafe(24), secrets.token_bytes(16)
    entry = {
        "id": identity, "name": name, "role": "admin" if admin else "use", "salt": salt.hex(),
        "hash": _hash(secret, salt).hex(), "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    _write(file, (*found, config.parse(Key, entry, "key")))
    return f"sr_{identity}_{secret}"


def remove(file: Path, name: str) -> None:
    """Forget a key; a service that runs forgets it within a second."""
    found = read(file)
    rest = tuple(key for key in found if key.name != name)
    if len(rest) == len(found):
        raise InputError(f"{file}: no key {name!r}; there is {', '.join(key.name for key in found) or 'none'}")
    _write(file, rest)


def read(file: Path) -> tuple[Key, ...]:
    """All keys of a file."""
    return config.read(_File, file).keys


class Keys:
    """Tells whose key a request carries; may be used from several threads."""

    def __init__(self, file: Path):
        """A change of the file counts within a second, unless it cannot be read."""
        self._file, self._stamp, self._next_look = file, 0, 0.0
        self._failing = logs.Once("keys")
        self._keys = {key.id: key for key in read(file)}
        self._stamp = file.stat().st_mtime_ns
        self._secret = secrets.token_bytes(32)
        self._right: dict[str, bytes] = {}  # id -> keyed digest of the secret that was right
        self._wrong: dict[str, tuple[float, float]] = {}  # id -> tries left, when that was
        self._lock = threading.Lock()

    def known(self, text: str) -> Key | None:
        """The key if it was found right before, without hashing."""
        self._look()
        match = _FORM.fullmatch(text)
        right = self._right.get(match[1]) if match else None
        if match is None or right is None or not hmac.compare_digest(right, self._digest(match[2])):
            return None
        return self._keys.get(match[1])

    def check(self, text: str) -> Key | None:
        """The key, or None; takes tens of milliseconds for an id that exists."""
        match = _FORM.fullmatch(text)
        key = self._keys.get(match[1]) if match else None
        if match is None or key is None:
            return None
        digest = self._digest(match[2])
        with self._lock:  # one hash at a time: guessing takes one core at most
            if hmac.compare_digest(self._right.get(key.id, b""), digest):
                return key  # a request beside this one has paid for it
            if not self._may_try(key.id):
                return None
            if not hmac.compare_digest(_hash(match[2], bytes.fromhex(key.salt)), bytes.fromhex(key.hash)):
                return None
            self._right[key.id] = digest
            self._wrong.pop(key.id, None)
        return key

    def _look(self) -> None:
        """Read the file again where it has changed, at most once a second."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + 1.0
        try:
            stamp = self._file.stat().st_mtime_ns
            if stamp != self._stamp:
                self._keys = {key.id: key for key in read(self._file)}
                self._right = {}
                self._stamp = stamp
            self._failing.worked()
        except (OSError, InputError) as error:
            self._failing.failed(error)

    def _digest(self, secret: str) -> bytes:
        return hmac.digest(self._secret, secret.encode(), "sha256")

    def _may_try(self, identity: str) -> bool:
        now = time.monotonic()
        left, when = self._wrong.get(identity, (_WRONG_A_SECOND, now))
        left = min(left + (now - when) * _WRONG_A_SECOND, _WRONG_A_SECOND)
        self._wrong[identity] = (left - 1 if left >= 1 else left, now)
        return left >= 1


def _hash(secret: str, salt: bytes) -> bytes:
    return hashlib.scrypt(secret.encode(), salt=salt, dklen=32, **_COST)


def _write(file: Path, keys: tuple[Key, ...]) -> None:
    """Replace the file in one step, readable by its owner alone."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as out:
        json.dump(_File(keys=keys).model_dump(mode="json"), out, indent=1)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(file)
