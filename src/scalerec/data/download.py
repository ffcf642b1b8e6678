"""Fetch files of a public archive; everything that goes wrong is an OSError with one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterable
from pathlib import Path

TIMEOUT_S = 10.0  # to connect, and without a byte
PIP_TIMEOUT_S = 120.0


def fetch_zip(url: str, names: Iterable[str], folder: Path) -> None:
    """Download the archive at `url` and put its files with these names into `folder`."""
    with tempfile.TemporaryDirectory() as temporary:
        archive = Path(temporary) / "archive.zip"
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer, archive.open("wb") as file:
            shutil.copyfileobj(answer, file)
        _unpack(archive, names, folder)


def fetch_from_wheel(requirement: str, names: Iterable[str], folder: Path) -> None:
    """Let pip download a wheel, without installing it, and put its files with these names into `folder`."""
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        command = [*pip, "--no-deps", "--only-binary=:all:", "--dest", temporary, requirement]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise OSError(f"pip download {requirement}: no answer in {PIP_TIMEOUT_S:g} s") from None
        wheel = next(Path(temporary).glob("*.whl"), None)
        if wheel is None:
            lines = done.stderr.strip().splitlines() or ["nothing downloaded"]
            raise OSError(f"pip download {requirement}: {lines[-1]}")
        _unpack(wheel, names, folder)


def _unpack(archive: Path, names: Iterable[str], folder: Path) -> None:
    """All of the files or none: `folder` appears when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unpacked = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
    try:
        with zipfile.ZipFile(archive) as members:
            paths = {Path(member).name: member for member in members.namelist()}
            for name in names:
                if name not in paths:
                    raise OSError(f"{archive.name} holds no {name}")
                (unpacked / name).write_bytes(members.read(paths[name]))
        shutil.rmtree(folder, ignore_errors=True)
        unpacked.rename(folder)
    except zipfile.BadZipFile as error:
        raise OSError(f"{archive.name} is not a zip archive ({error})") from None
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
