"""Virtual environments of peers, apart from scalerec's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def python_of(environment: Path) -> Path:
    return environment / "bin" / "python"


def install(environment: Path, needs: Path) -> None:
    """An environment with what the requirements file `needs` pins; pip's own variables decide where from."""
    if not python_of(environment).exists():
        say(f"making {environment}")
        venv.create(environment, with_pip=True)
    say(f"installing {needs.name} (1.5 GB with torch for CPUs, several more with CUDA)")
    pip = [str(python_of(environment)), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    if subprocess.run([*pip, "-r", str(needs)], check=False).returncode:
        raise SystemExit(f"pip could not install {needs} into {environment}: see above")


def versions(environment: Path, peer: Path, variables: dict[str, str]) -> dict[str, str] | str:
    """What the peer's script says of its packages; or why it cannot run there."""
    if not python_of(environment).exists():
        return f"no environment in {environment}"
    command = [str(python_of(environment)), str(peer), "--versions"]
    asked = subprocess.run(command, env=variables, capture_output=True, text=True)
    if asked.returncode:
        return f"{peer.stem} cannot be imported in {environment}: {asked.stderr[-500:].strip()}"
    return json.loads(asked.stdout)


def without_scalerec() -> dict[str, str]:
    """This process's variables less those by which Python would find other packages than the environment's."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
