"""Configurations: found again by their kind, changed by the path of a field, and never code from outside unasked."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BeforeValidator, PositiveInt, SerializeAsAny

from scalerec import config
from scalerec.config import Component, Config, allow, component, component_class, override, parse, paths, read
from scalerec.errors import InputError
from scalerec.models.base import ModelConfig
from scalerec.models.dcnv2 import DCNv2Config
from scalerec.models.rankmixer import RankMixerConfig
from scalerec.recipes.catalogue import all_recipes
from scalerec.training.run import Run


class Inner(Config):
    rate: float = 0.5
    name: str = "sgd"
    kind: Literal["a", "b"] = "a"


class Outer(Config):
    title: str = "run"
    steps: PositiveInt = 10
    fast: bool = False
    sizes: tuple[int, ...] = (4, 2)
    limit: int | None = None
    inner: Inner = Inner()
    model: Annotated[SerializeAsAny[ModelConfig], BeforeValidator(component)] = DCNv2Config()


# -- kinds


def test_a_kind_is_the_name_of_its_module():
    assert component_class("rankmixer") is RankMixerConfig
    assert component_class("dcnv2") is DCNv2Config
    found = component({"kind": "rankmixer", "dim": 32})
    assert type(found) is RankMixerConfig and found.dim == 32
    assert component(found) is found


@given(
    st.builds(
        RankMixerConfig,
        dim=st.integers(1, 10**6),
        num_heads=st.integers(0, 9),
        dropout=st.floats(0, 0.99),
        shared_ffn=st.booleans(),
        head=st.sampled_from(["linear", "mlp"]),
    )
    | st.builds(DCNv2Config, hidden=st.lists(st.integers(1, 99), max_size=4).map(tuple), rank=st.integers(0, 9))
)
@settings(deadline=None, max_examples=40)
def test_json_keeps_the_class_and_the_values(model):
    outer = Outer(model=model)
    back = Outer.model_validate_json(outer.model_dump_json())
    assert back == outer and type(back.model) is type(model)
    assert component(json.loads(model.model_dump_json())) == model


@pytest.mark.parametrize("name", all_recipes())
def test_recipes_survive_json(name):
    run = all_recipes()[name]()
    back = Run.model_validate(json.loads(run.model_dump_json()))
    assert back == run
    assert (type(back.model), type(back.data)) == (type(run.model), type(run.data))


@pytest.mark.parametrize("kind", ["nothing", "", "base", "RankMixer", "rankmixer ", "os"])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(InputError, match=f"options: model: unknown kind '{kind}'"):
        parse(Outer, {"model": {"kind": kind}}, "options")


@pytest.mark.parametrize("kind", ["rankmixer.x", "../models/rankmixer", 5, None, ["rankmixer"]])
def test_a_kind_that_is_no_name_is_refused(kind):
    with pytest.raises(InputError, match="options: model"):
        parse(Outer, {"model": {"kind": kind}}, "options")


def test_a_component_without_a_kind_is_refused():
    with pytest.raises(InputError, match="options: model: has no `kind`"):
        parse(Outer, {"model": {"dim": 3}}, "options")


OUTSIDE = """
from scalerec.models.base import ModelConfig

class OutsideConfig(ModelConfig):
    kind: str = "outside_package.inside:OutsideConfig"
    size: int = 1

    def build(self, layout):
        raise NotImplementedError
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A package of which scalerec knows nothing."""
    (tmp_path / "outside_package").mkdir()
    (tmp_path / "outside_package" / "__init__.py").touch()
    (tmp_path / "outside_package" / "inside.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(config, "_allowed", set())
    yield {"kind": "outside_package.inside:OutsideConfig", "size": 7}
    for name in ("outside_package", "outside_package.inside"):
        sys.modules.pop(name, None)


def test_a_class_from_outside_is_refused_and_not_imported(outside):
    with pytest.raises(InputError, match="comes from outside scalerec: pass `--allow outside_package`"):
        parse(Outer, {"model": outside}, "options")
    assert "outside_package" not in sys.modules
    allow("another_package")
    with pytest.raises(InputError, match="outside"):
        parse(Outer, {"model": outside}, "options")
    assert "outside_package" not in sys.modules


def test_a_class_from_outside_is_found_where_its_package_is_allowed(outside):
    allow("outside_package")
    outer = parse(Outer, {"model": outside}, "options")
    assert type(outer.model).__name__ == "OutsideConfig" and outer.model.size == 7
    assert Outer.model_validate_json(outer.model_dump_json()) == outer


@pytest.mark.parametrize(
    "kind", ["outside_package.none:X", "outside_package.inside:X", "outside_package.inside:__file__"]
)
def test_a_class_from_outside_that_is_not_there(outside, kind):
    allow("outside_package")
    with pytest.raises(InputError, match="outside_package"):
        parse(Outer, {"model": {"kind": kind}}, "options")


# -- paths


def test_paths_name_every_field_but_kinds():
    found = paths(Outer())
    assert found["inner.rate"] == 0.5 and found["model.crosses"] == 3 and found["sizes"] == (4, 2)
    assert "model.kind" not in found and "inner" not in found
    assert found["inner.kind"] == "a"  # an option like any other where it does not choose the class
    assert not issubclass(Inner, Component)


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("steps", "25", 25),
        ("title", "25", "25"),
        ("title", "None", "None"),
        ("title", '"quoted"', '"quoted"'),
        ("fast", "true", True),
        ("fast", "True", True),
        ("sizes", "[1, 2, 3]", (1, 2, 3)),
        ("sizes", "[]", ()),
        ("limit", "5", 5),
        ("inner.rate", "1e-3", 0.001),
        ("inner.rate", "2", 2.0),
        ("inner.name", "adam", "adam"),
        ("inner.kind", "b", "b"),
        ("model.rank", "8", 8),
        ("model.hidden", "[16]", (16,)),
        ("model.structure", "stacked", "stacked"),
    ],
)
def test_a_field_is_replaced_by_its_path(path, text, value):
    before = Outer()
    after = override(before, {path: text})
    changed = {name: new for name, new in paths(after).items() if new != paths(before)[name]}
    assert changed == {path: value}
    assert type(changed[path]) is type(value) and type(after.model) is DCNv2Config
    assert before == Outer()


def test_a_whole_part_is_replaced_by_json():
    after = override(Outer(), {"inner": '{"rate": 2}', "model": '{"kind": "rankmixer", "dim": 32}'})
    assert after == Outer(inner=Inner(rate=2), model=RankMixerConfig(dim=32))
    assert type(after.model) is RankMixerConfig


@pytest.mark.parametrize("text", ["None", "null"])
def test_nothing_is_a_value(text):
    assert override(Outer(limit=3), {"limit": text}).limit is None


def test_several_fields_at_once():
    after = override(Outer(), {"steps": "3", "inner.rate": "0.1", "model.rank": "2"})
    assert (after.steps, after.inner.rate, after.model.rank) == (3, 0.1, 2)
    assert override(Outer(), {}) == Outer()


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("step", "steps"),
        ("inner.rat", "inner.rate"),
        ("model.hiddens", "model.hidden"),
        ("model.dim.x", "model"),
        ("", ""),
    ],
)
def test_an_unknown_path_names_the_nearest(path, nearest):
    with pytest.raises(InputError, match=rf"^--{path}: no such option; did you mean --{nearest}"):
        override(Outer(), {path: "1"})


def test_the_kind_of_a_component_is_no_option():
    with pytest.raises(InputError, match=r"--model\.kind: no such option"):
        override(Outer(), {"model.kind": "rankmixer"})


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("steps", "many", "options: steps: .*integer"),
        ("steps", "0", "options: steps: .*greater than 0"),
        ("steps", "2.5", "options: steps"),
        ("fast", "maybe", "options: fast: .*boolean"),
        ("sizes", "4", "options: sizes"),
        ("inner.kind", "c", "options: inner.kind: .*'a' or 'b'"),
        ("inner.rate", "NaN?", "options: inner.rate"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_its_path(path, text, words):
    with pytest.raises(InputError, match=words) as error:
        override(Outer(), {path: text})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", all_recipes())
def test_recipes_stay_what_they_are_under_their_own_values(name):
    run = all_recipes()[name]()
    tree = run.model_dump(mode="json")

    def text(path: str) -> str:
        value = tree
        for part in path.split("."):
            value = value[part]
        return value if isinstance(value, str) else json.dumps(value)

    assert override(run, {path: text(path) for path in paths(run)}) == run


# -- files


def test_a_file_is_read(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(Outer(steps=3).model_dump_json())
    assert read(Outer, path) == Outer(steps=3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", r"run\.json: not JSON"),
        (b"\xff\xfe\x00", r"run\.json: not JSON"),
        (b"[]", r"run\.json: .*valid dictionary"),
        (b'{"step": 1}', r"run\.json: step: Extra inputs are not permitted"),
        (b'{"steps": 0, "fast": "x"}', r"run\.json: steps: .* \(and 1 more\)"),
        (b'{"inner": {"rate": "x"}}', r"run\.json: inner\.rate: "),
    ],
)
def test_a_bad_file_is_named_with_the_field(tmp_path, content, words):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        read(Outer, path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: no such file"):
        read(Outer, tmp_path / "none.json")


def test_configurations_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        Outer().steps = 3  # type: ignore[misc]
