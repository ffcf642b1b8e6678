"""Recipes by name: functions without arguments, in any module of this package, that return a complete Run."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable

from scalerec import config, recipes
from scalerec.errors import InputError
from scalerec.training.run import Run

Recipe = Callable[[], Run]


def all_recipes() -> dict[str, Recipe]:
    """Every recipe of the package, by name."""
    found: dict[str, Recipe] = {}
    for module_info in pkgutil.iter_modules(recipes.__path__):
        module = importlib.import_module(f"{recipes.__name__}.{module_info.name}")
        for name, value in vars(module).items():
            if inspect.isfunction(value) and inspect.signature(value).return_annotation == "Run" and name[0] != "_":
                if value.__module__ == module.__name__ and not inspect.signature(value).parameters:
                    found[name] = value
    return found


def find(name: str) -> Run:
    """The run of a recipe, or of a user's own "package.module:function".

    Raises:
        InputError: there is no such recipe (the nearest real one is named), or it does not return a Run.
    """
    if ":" in name:
        module_name, _, function = name.partition(":")
        config.allow(module_name.partition(".")[0])
        try:
            recipe = getattr(importlib.import_module(module_name), function)
        except (ImportError, AttributeError) as error:
            raise InputError(f"{name}: no such recipe ({error})") from None
        run = recipe()
        if not isinstance(run, Run):
            raise InputError(f"{name}: returned {type(run).__name__}, not a scalerec.training.run.Run")
        return run
    known = all_recipes()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise InputError(f"{name}: no such recipe; did you mean {near[0]}? (`scalerec recipes` lists them)")
    return known[name]()
