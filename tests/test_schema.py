"""From YAML and overrides to typed settings: what is accepted, and how everything else is named."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from disttrain import schema
from disttrain.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    width: int = 3
    """Inner width."""
    names: tuple[str, ...] = ()
    """Inner names."""


@dataclass(frozen=True)
class Round:
    name: Literal["round"] = "round"
    """A shape without corners."""
    radius: float = 1.0
    """Its radius."""


@dataclass(frozen=True)
class Square:
    name: Literal["square"] = "square"
    """A shape with four corners."""
    side: float = 2.0
    """Its side."""


@dataclass(frozen=True)
class Outer:
    count: int
    """How many; a required key."""
    shape: Round | Square
    """Which shape."""
    rate: float = 0.5
    """A rate
    over two lines."""
    label: str = ""
    """A label."""
    active: bool = False
    """Whether it is active."""
    mode: Literal["no", "yes"] = "no"
    """A choice."""
    limit: float | None = None
    """An optional number."""
    inner: Inner = field(default_factory=Inner)
    """Nested settings."""
    items: tuple[Inner, ...] = ()
    """A list of settings."""


BASE: dict[str, Any] = {"count": 2, "shape": {"name": "round"}}


def outer(**changes: Any) -> Outer:
    return schema.build(Outer, {**BASE, **changes})


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        outer(**changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lable": "x"}, "lable: unknown key; did you mean label?"),
        ({"inner": {"widht": 1}}, "inner.widht: unknown key; did you mean width?"),
        ({"items": [{}, {"nmaes": []}]}, "items.1.nmaes: unknown key; did you mean names?"),
        ({"inner": {"zzzz": 1}}, "inner.zzzz: unknown key; known here: width, names"),
        ({"inner": {7: 1}}, "inner.7: unknown key; known here: width, names"),
        ({"shape": {"name": "round", "side": 1}}, "shape.side: unknown key; known here: name"),
        ({"shape": {"name": "rund"}}, "shape.name: 'rund' is not one of round, square; did you"),
        ({"shape": {"name": ["round"]}}, "shape.name: ['round'] is not one of round, square"),
        ({"shape": {"radius": 1}}, "shape.name: missing; choose one of round, square"),
        ({"shape": "round"}, "shape.name: missing; choose one of round, square"),
        ({"shape": None}, "shape.name: missing; choose one of round, square"),
        ({"mode": "yse"}, "mode: 'yse' is not one of no, yes; did you mean yes?"),
        ({"mode": True}, "mode: True is not one of no, yes"),
        ({"mode": ["no"]}, "mode: ['no'] is not one of no, yes"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest_known(
    changes: dict[str, Any], message: str
) -> None:
    assert refusal(**changes).startswith(message)


WRONG = {
    "count": [None, True, "3", 1.5, float("inf"), float("nan"), [1], {"a": 1}],
    "rate": [None, True, "fast", "", [1.0], {"a": 1}, 10**400],
    "label": [None, True, ["a"], {"a": 1}],
    "active": [None, 1, 0, "true", "yes", [], {}],
    "limit": [True, "fast", [1]],
    "inner": [None, 3, "x", [1], [{"width": 1}]],
    "items": [None, 3, "x", {"width": 1}, [3], ["x"]],
}
EXPECTED = {
    "count": "expected a whole number",
    "rate": "expected a number",
    "label": "expected text",
    "active": "expected true or false",
    "limit": "expected a number",
    "inner": "expected keys",
    "items": "expected a list",
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values]
)
def test_every_wrong_type_names_key_expectation_and_finding(key: str, value: Any) -> None:
    message = refusal(**{key: value})
    where = "items.0" if key == "items" and isinstance(value, list) else key
    expected = "expected keys" if where == "items.0" else EXPECTED[key]
    assert message.startswith(f"{where}: {expected}, found ")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("null", "nothing"),
        ("{a: 1}", "a mapping"),
        ("[1]", "a list"),
        ("wide", "str 'wide'"),
        ("true", "bool True"),
    ],
)
def test_what_was_found_is_said_in_words(text: str, kind: str) -> None:
    message = refusal(inner={"width": yaml.safe_load(text)})
    assert message == f"inner.width: expected a whole number, found {kind}"


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("mode: no", "mode", "no"),  # YAML: false
        ("rate: 1e-3", "rate", 1e-3),  # YAML: text
        ("rate: 2", "rate", 2.0),
        ("rate: '2.5'", "rate", 2.5),
        ("count: 3.0", "count", 3),
        ("count: 2.0e+1", "count", 20),
        ("label: 12", "label", "12"),
        ("label: 1.5", "label", "1.5"),
        ("limit:", "limit", None),
        ("limit: ''", "limit", None),
        ("limit: 1e-2", "limit", 1e-2),
        ("inner: {names: [a, 3]}", "inner", Inner(names=("a", "3"))),
        ("items: [{width: 1}, {}]", "items", (Inner(1), Inner(3))),
        ("shape: {name: square, side: 4}", "shape", Square(side=4.0)),
    ],
)
def test_yaml_traps_are_read_as_they_are_meant(text: str, key: str, value: Any) -> None:
    found = getattr(outer(**yaml.safe_load(text)), key)
    assert found == value
    assert type(found) is type(value)


def test_missing_required_key_is_named_with_the_first_line_of_its_help() -> None:
    with pytest.raises(ConfigError, match=r"^count: missing; How many; a required key\.$"):
        schema.build(Outer, {"shape": {"name": "round"}})


def test_built_settings_are_frozen() -> None:
    built = outer()
    for settings, name in ((built, "count"), (built.inner, "width"), (built.shape, "name")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings, name, 1)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("count=7", ("count",), 7),
        ("label=", ("label",), ""),
        ("label=a=b", ("label",), "a=b"),
        ("inner.width=5", ("inner", "width"), 5),
        ("inner.names=[a, b]", ("inner", "names"), ["a", "b"]),
        ("items.1.width=9", ("items", 1, "width"), 9),
        ("items.0={width: 8}", ("items", 0, "width"), 8),
        ("made.on.the.way=1", ("made", "on", "the", "way"), 1),
        ("empty.width=1", ("empty", "width"), 1),
        ("rate=1e-3", ("rate",), "1e-3"),
        ("limit=null", ("limit",), None),
    ],
)
def test_overrides_lay_values_over_the_tree(
    override: str, path: tuple[Any, ...], value: Any
) -> None:
    tree = {"count": 2, "inner": {"width": 1}, "items": [{"width": 1}, {"width": 2}], "empty": None}
    before = yaml.safe_dump(tree)
    found: Any = schema.apply_overrides(tree, [override])
    for step in path:
        found = found[step]
    assert found == value
    assert yaml.safe_dump(tree) == before, "the given tree must stay as it was"


def test_later_overrides_win() -> None:
    assert schema.apply_overrides({}, ["a.b=1", "a.b=2", "a.c=3"]) == {"a": {"b": 2, "c": 3}}


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("count", "write it as section.key=value"),
        ("=3", "write it as section.key=value"),
        ("", "write it as section.key=value"),
        ("items.2.width=1", "'2' must be a number below 2"),
        ("items.first.width=1", "'first' must be a number below 2"),
        ("items.-1.width=1", "'-1' must be a number below 2"),
        ("items.².width=1", "'²' must be a number below 2"),
        ("count.deeper=1", "'count' has no keys inside"),
        ("items.0.width.deeper=1", "'width' has no keys inside"),
        ("label=[a", "the value is not YAML; quote it"),
        ("label=2024-13-45", "the value is not YAML; quote it"),
        ("label=" + "[" * 5000, "the value is not YAML; quote it"),
        ("inner={width: 1, width: 2}", "the value is not YAML; quote it"),
    ],
)
def test_unusable_overrides_are_quoted_in_the_message(override: str, fragment: str) -> None:
    tree = {"count": 2, "label": "", "items": [{"width": 1}, {"width": 2}]}
    with pytest.raises(ConfigError) as caught:
        schema.apply_overrides(tree, [override])
    assert str(caught.value) == f"override '{override}': {fragment}"


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "a config is a mapping of keys, this is nothing"),
        (b"- a\n", "a config is a mapping of keys, this is a list"),
        (b"words\n", "a config is a mapping of keys, this is str 'words'"),
        (b"a: [1\nb: 2\n", "line 2: not YAML (expected ',' or ']'"),
        (b"a: 1\nb: !!python/object/apply:os.getcwd []\n", "line 2: not YAML (could not determine"),
        (b"a: 1\nb: {x: 1,\n  x: 2}\n", "line 3: not YAML (key 'x' is given twice)"),
        (b"a: 1\na: 2\n", "line 2: not YAML (key 'a' is given twice)"),
        (b"items:\n- {a: 1}\n- {b: 1, b: 1}\n", "line 3: not YAML (key 'b' is given twice)"),
        (b"a: &x {b: *x}\n", "line 1: not YAML (it holds itself)"),
        (b"a: 2024-13-45\n", "not YAML (nested too deeply or not valid)"),
        (b"a: " + b"[" * 5000, "not YAML (nested too deeply or not valid)"),
        (b"\xff\xfea", "not UTF-8 text (byte 0)"),
        (b"a: " + b"x" * 2**20, "1048579 bytes of text, the limit is 1048576"),
    ],
)
def test_unreadable_config_files_are_one_line(
    tmp_path: Path, content: bytes, fragment: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        schema.read_mapping(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert fragment in message
    assert "\n" not in message


def test_missing_config_file_and_folder_are_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match=r"give the path of a config such as configs/"):
            schema.read_mapping(path)


def test_one_anchor_may_be_used_twice(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("base: &b {x: 1}\none: *b\ntwo: {<<: *b, y: 2}\n", encoding="utf-8-sig")
    expected = {"base": {"x": 1}, "one": {"x": 1}, "two": {"x": 1, "y": 2}}
    assert schema.read_mapping(path) == expected


def test_a_tree_survives_yaml() -> None:
    built = outer(items=[{"names": ["a"]}], limit=3, shape={"name": "square", "side": 1e-9})
    text = yaml.safe_dump(schema.to_mapping(built))
    assert schema.build(Outer, yaml.safe_load(text)) == built


def test_flatten_gives_dotted_numbers_text_and_truth_values() -> None:
    tree = {"a": {"b": [1, {"c": 2.5}]}, "d": None, "e": True, "f": "x", "g": []}
    expected = {"a.b.0": 1, "a.b.1.c": 2.5, "d": "None", "e": True, "f": "x"}
    assert schema.flatten(tree) == expected


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1}, {"a": 1}, {}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, {"a.c": (2, 3)}),
        ({"a": 1}, {"b": 2}, {"a": (1, None), "b": (None, 2)}),
        ({"l": [{"x": 1}, {"x": 2}]}, {"l": [{"x": 1}, {"x": 9}]}, {"l.1.x": (2, 9)}),
        ({"l": [1]}, {"l": [1, 2]}, {"l": ([1], [1, 2])}),
        ({"a": {"b": 1}}, {"a": 5}, {"a": ({"b": 1}, 5)}),
    ],
)
def test_differences_name_what_changed(old: Any, new: Any, expected: dict[str, Any]) -> None:
    assert schema.differences(old, new) == expected


def test_describe_lists_every_key_with_default_and_help() -> None:
    rows = {key: (default, text) for key, default, text in schema.describe(Outer)}
    assert list(rows) == [
        "count",
        "shape(round).name",
        "shape(round).radius",
        "shape(square).name",
        "shape(square).side",
        "rate",
        "label",
        "active",
        "mode",
        "limit",
        "inner.width",
        "inner.names",
        "items.N.width",
        "items.N.names",
    ]
    assert rows["count"] == ("required", "How many; a required key.")
    assert rows["rate"] == ("0.5", "A rate\nover two lines.")
    assert rows["label"][0] == '""'
    assert rows["active"][0] == "false"
    assert rows["inner.names"][0] == "[]"
    assert rows["limit"][0] == "None"
