"""How the package is built: importing it does nothing, its rooms are small and named, nothing in it can unpickle."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import scalerec
from scalerec import cli

ROOT = Path(scalerec.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LINES = 400
NAMELESS = {"common", "helpers", "misc", "util", "utils"}
UNPICKLERS = {"cPickle", "cloudpickle", "dill", "joblib", "pickle", "shelve"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def more_than_exports(source: str) -> list[str]:
    """Statements of an `__init__` that are not a docstring, an import of names or the version and `__all__`."""
    found = []
    for statement in ast.parse(source).body:
        match statement:
            case ast.Expr(value=ast.Constant(value=str())) | ast.ImportFrom():
                continue
            case ast.Assign(targets=[ast.Name(id="__all__" | "__version__")]):
                continue
        found.append(ast.unparse(statement))
    return found


def unpickling(source: str) -> list[str]:
    """Imports of pickle and its like, and uses of `torch.load`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(module=str() as module, names=names):
                modules = [module, *(f"{module}.{alias.name}" for alias in names)]
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                modules = ["torch.load"]
            case _:
                continue
        found += [m for m in modules if m.partition(".")[0] in UNPICKLERS or m == "torch.load"]
    return found


def imports(source: str, package: str) -> bool:
    nodes = list(ast.walk(ast.parse(source)))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return any(module.partition(".")[0] == package for module in modules)


def private_imports(source: str) -> list[str]:
    """Names that a file keeps to itself and another one imports."""
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    names = [(node.module, alias.name) for node in imports for alias in node.names]
    return [f"{module}.{name}" for module, name in names if name.startswith("_") and not name.startswith("__")]


def test_importing_has_no_side_effects(tmp_path):
    script = """
import logging, os, sys, threading, warnings
def seen():
    return dict(os.environ), list(warnings.filters), list(logging.getLogger().handlers), threading.active_count()
before = seen()
import scalerec
assert seen() == before, "the environment, the warnings, the logging or the threads changed"
heavy = {"torch", "numpy", "pyarrow", "pydantic", "matplotlib", "rich"} & set(sys.modules)
assert not heavy, f"imported {sorted(heavy)}"
"""
    # -S: without site-packages, whose .pth files may import things of their own
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT.parent)!r})\n{script}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "settled"),
    [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_the_command_settles_openmp_before_torch_is_there(given, settled, monkeypatch):
    script = """
import os, sys
from scalerec.__main__ import settle_openmp
settle_openmp()
assert "torch" not in sys.modules
print(os.environ.get("GOMP_SPINCOUNT"))
"""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, **given}, capture_output=True, text=True)
    assert done.stdout.strip() == str(settled), done.stderr


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=name_of)
def test_init_only_exports(path):
    assert more_than_exports(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_file_fits_the_budget(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_unpickles(path):
    assert unpickling(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_torchrec_stays_in_its_room(path):
    if path.relative_to(ROOT).parts[0] != "distributed":
        source = path.read_text(encoding="utf-8")
        assert not imports(source, "torchrec")
        assert not imports(source, "fbgemm_gpu")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_private_is_imported(path):
    assert private_imports(path.read_text(encoding="utf-8")) == []


def test_every_room_has_a_noun():
    assert [name_of(p) for p in ROOT.rglob("*") if p.stem in NAMELESS] == []


@pytest.mark.parametrize(
    "source",
    ["import torch", "print('hello')", "x = 1", "def f():\n    ...", "if True:\n    from a import b"],
)
def test_an_init_that_does_more_is_found(source):
    assert more_than_exports(f'"""A room."""\nfrom a import b\n__all__ = ["b"]\n{source}\n') == [source]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import joblib.numpy_pickle as p",
        "from pickle import loads",
        "from torch import load",
        "def f(path):\n    return torch.load(path, weights_only=True)",
        "read = torch.load",
    ],
)
def test_unpickling_is_found(source):
    assert unpickling(source)


@pytest.mark.parametrize(
    "source", ["import torch", "torch.save(x, y)", "json.load(file)", "from safetensors.torch import load"]
)
def test_harmless_loading_is_not(source):
    assert unpickling(source) == []


def test_a_private_import_is_found():
    source = "from a import __version__\nfrom a.b import c, _d\ndef f():\n    from a._b import e"
    assert private_imports(source) == ["a.b._d"]


@pytest.mark.parametrize("source", ["import torchrec.distributed as d", "def f():\n    from torchrec.modules import x"])
def test_an_import_of_torchrec_is_found(source):
    assert imports(source, "torchrec")
    assert not imports(source, "torch")


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"scalerec {scalerec.__version__}\n"
