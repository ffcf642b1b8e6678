"""Typed configurations <-> JSON: every component is found again by its `kind`, every field overridden by its path."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from scalerec.errors import InputError
from scalerec.schema import Frozen

Config = Frozen
ConfigT = TypeVar("ConfigT", bound=BaseModel)

_ROOMS = ("scalerec.models", "scalerec.data.sources")
_allowed: set[str] = set()


class Component(Config):
    """A configuration that JSON finds again: `kind` is the name of its module, `package.module:Class` from outside."""

    kind: str


def allow(package: str) -> None:
    """Let configurations name classes of this outside package; nothing from outside is imported without it.

    The package is also looked for in the current folder, as `python -m` would.
    """
    _allowed.add(package)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def allowed() -> list[str]:
    """The outside packages that `allow` has let in."""
    return sorted(_allowed)


def component(value: Any) -> Any:
    """A mapping with a `kind` -> the configuration of that kind; anything else passes through (for BeforeValidator)."""
    if not isinstance(value, dict):
        return value
    if "kind" not in value:
        raise ValueError("has no `kind`")
    return component_class(value["kind"]).model_validate(value)


def component_class(kind: str) -> type[Component]:
    """The configuration class of a kind; ValueError when there is none or it comes from a package not allowed."""
    if not isinstance(kind, str) or not re.fullmatch(r"\w+|\w+(\.\w+)*:\w+", kind):
        raise ValueError(f"unknown kind {kind!r}")
    module_name, _, class_name = kind.partition(":")
    if class_name:
        if module_name.partition(".")[0] not in _allowed:
            raise ValueError(
                f"kind {kind!r} comes from outside scalerec: pass `--allow {module_name.partition('.')[0]}`"
            )
        try:
            found = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"kind {kind!r}: {error}") from None
        if not (isinstance(found, type) and issubclass(found, Component)):
            raise ValueError(f"kind {kind!r} is not a configuration class")
        return found
    for room in _ROOMS:
        if importlib.util.find_spec(f"{room}.{kind}") is not None:
            module = importlib.import_module(f"{room}.{kind}")
            for value in vars(module).values():
                if isinstance(value, type) and issubclass(value, Component) and value.__module__ == module.__name__:
                    if value.model_fields["kind"].default == kind:
                        return value
    raise ValueError(f"unknown kind {kind!r}")


def read(cls: type[ConfigT], path: str | Path) -> ConfigT:
    """Read a JSON file as `cls`; InputError names the file and the field."""
    path = Path(path)
    try:
        return parse(cls, json.loads(path.read_text()), str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None


def parse(cls: type[ConfigT], value: Any, where: str) -> ConfigT:
    """Validate as `cls`, turning pydantic's report into one line that starts with `where`."""
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise InputError(f"{where}: {path + ': ' if path else ''}{message}{more}") from None


def paths(config: BaseModel, prefix: str = "", *, branches: bool = False) -> dict[str, Any]:
    """Every field of a configuration by its path; with `branches` also the nested configurations as wholes."""
    found: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            found |= {prefix + name: value} if branches else {}
            found |= paths(value, f"{prefix}{name}.", branches=branches)
        elif not (name == "kind" and isinstance(config, Component)):
            found[prefix + name] = value
    return found


def override(config: ConfigT, changes: dict[str, str]) -> ConfigT:
    """A copy with fields replaced by path ("model.dim" -> "256"); InputError names the nearest path that exists."""
    known = paths(config, branches=True)
    tree = config.model_dump(mode="json")
    for path, text in changes.items():
        if path not in known:
            near = difflib.get_close_matches(path, known, n=1, cutoff=0.0)
            raise InputError(f"--{path}: no such option; did you mean --{near[0]}?")
        *parents, leaf = path.split(".")
        branch = tree
        for parent in parents:
            branch = branch[parent]
        branch[leaf] = _literal(text, known[path])
    return parse(type(config), tree, "options")


def _literal(text: str, current: Any) -> Any:
    if isinstance(current, str):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None if text == "None" else {"True": True, "False": False}.get(text, text)
