"""From a YAML mapping and dotted overrides to a tree of frozen, typed settings.

First link of the pipeline: `config.py` declares the tree, this module fills it. Invariant: a tree
that was built holds only known keys with values of their declared types; everything else became a
`ConfigError` that names the key, what was found and the nearest known key.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from disttrain.errors import ConfigError, DataError
from disttrain.files import read_text

Settings = TypeVar("Settings")

CONFIG_LIMIT = 2**20


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds.

    Raises:
        ConfigError: missing file, not YAML, or not a mapping.
    """
    try:
        value = _parse(read_text(path, CONFIG_LIMIT))
    except DataError as error:
        raise ConfigError(
            f"{error}; give the path of a config such as configs/lora.yaml"
        ) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "nested too deeply or not valid"
        raise ConfigError(f"{path}{place}: not YAML ({problem})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys, this is {_kind(value)}")
    return value


def _parse(text: str) -> Any:
    """Plain YAML, without keys given twice, one of which would be ignored in silence."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        _refuse_repeated_keys(node, set(), ())
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _refuse_repeated_keys(node: Any, done: set[int], above: tuple[int, ...]) -> None:
    if id(node) in above:
        raise yaml.MarkedYAMLError(problem="it holds itself", problem_mark=node.start_mark)
    if id(node) in done or not isinstance(node, yaml.CollectionNode):
        return
    done.add(id(node))
    children = node.value
    if isinstance(node, yaml.MappingNode):
        children = [value for _, value in node.value]
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                problem = f"key '{key.value}' is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            names.add(str(key.value))
    for child in children:
        _refuse_repeated_keys(child, done, (*above, id(node)))


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`tree` with each `section.key=value` laid over it; list items by number.

    Values are read as YAML, so `subjects.0.token=sks` and `train.sample_prompts=[a, b]` work.

    Raises:
        ConfigError: no `=`, or a path through something that holds no keys.
    """
    result = _copy(tree)
    for override in overrides:
        dotted, separator, text = override.partition("=")
        if not separator or not dotted:
            raise ConfigError(f"override '{override}': write it as section.key=value")
        try:
            value = _parse(text) if text else ""
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise ConfigError(f"override '{override}': the value is not YAML; quote it") from error
        _assign(result, dotted.split("."), value, override)
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _assign(node: Any, names: list[str], value: Any, override: str) -> None:
    for depth, name in enumerate(names):
        last = depth == len(names) - 1
        if isinstance(node, list):
            if not name.isdecimal() or int(name) >= len(node):
                raise ConfigError(
                    f"override '{override}': '{name}' must be a number below {len(node)}"
                )
            key: Any = int(name)
        elif isinstance(node, dict):
            key = name
            if not last and node.get(name) is None:
                node[name] = {}
        else:
            raise ConfigError(f"override '{override}': '{names[depth - 1]}' has no keys inside")
        if last:
            node[key] = value
        else:
            node = node[key]


def build(kind: type[Settings], value: Any, where: str = "") -> Settings:
    """A settings dataclass from a mapping; `where` is the dotted path for messages.

    Raises:
        ConfigError: unknown key, missing required key, or a value of the wrong type.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where or 'config'}: expected keys, found {_kind(value)}")
    hints = field_types(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in value:
        if key not in fields:
            raise ConfigError(_unknown(str(key), fields, where))
    filled = {}
    for name, field in fields.items():
        dotted = f"{where}.{name}" if where else name
        if name in value:
            filled[name] = convert(hints[name], value[name], dotted)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{dotted}: missing; {_first_line(help_of(kind, name))}")
    return kind(**filled)


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the declared type, or a `ConfigError` that says what was expected."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(hint, value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, found {_kind(value)}")
        item = typing.get_args(hint)[0]
        return tuple(convert(item, entry, f"{where}.{i}") for i, entry in enumerate(value))
    if origin is Literal:
        return _convert_literal(typing.get_args(hint), value, where)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    return _convert_plain(hint, value, where)


def _convert_literal(allowed: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is False and "no" in allowed:  # YAML reads a bare `no` as false
        return "no"
    if value not in allowed:
        names = ", ".join(str(item) for item in allowed)
        raise ConfigError(f"{where}: {value!r} is not one of {names}{_nearest(value, allowed)}")
    return value


def _convert_union(hint: Any, value: Any, where: str) -> Any:
    """Optional values, and the tagged union of methods told apart by their `name`."""
    members = typing.get_args(hint)
    if value in (None, "") and type(None) in members:  # an override `key=` gives empty text
        return None
    tagged = {tag: member for member in members for tag in _tags(member)}
    if not tagged:
        plain = [member for member in members if member is not type(None)]
        words = [word for member in plain for word in typing.get_args(member)]
        if value in words:  # a word such as "auto" beside a number
            return value
        return convert(next(m for m in plain if not typing.get_args(m)), value, where)
    if not isinstance(value, Mapping) or "name" not in value:
        raise ConfigError(f"{where}.name: missing; choose one of {', '.join(tagged)}")
    name = value["name"]
    if not isinstance(name, str) or name not in tagged:
        known = ", ".join(tagged)
        raise ConfigError(
            f"{where}.name: {name!r} is not one of {known}{_nearest(name, tuple(tagged))}"
        )
    return build(tagged[name], value, where)


def _tags(member: Any) -> tuple[str, ...]:
    if not dataclasses.is_dataclass(member):
        return ()
    return typing.get_args(field_types(typing.cast(type, member)).get("name", None))


def _convert_plain(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads `1e-3` as text
        except (ValueError, OverflowError):
            pass
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise ConfigError(f"{where}: expected {expected[hint]}, found {_kind(value)}")
    return value


def to_mapping(settings: Any) -> Any:
    """The tree as plain dicts and lists, ready for YAML or JSON."""
    if dataclasses.is_dataclass(settings):
        return {
            field.name: to_mapping(getattr(settings, field.name))
            for field in dataclasses.fields(settings)
        }
    if isinstance(settings, tuple):
        return [to_mapping(item) for item in settings]
    return settings


def flatten(tree: Any, where: str = "") -> dict[str, Any]:
    """A plain tree as dotted keys with numbers, text and truth values."""
    if isinstance(tree, dict):
        pairs = tree.items()
    elif isinstance(tree, list):
        pairs = enumerate(tree)
    else:
        return {where: tree if isinstance(tree, (int, float, bool)) else str(tree)}
    found = {}
    for key, value in pairs:
        found.update(flatten(value, f"{where}.{key}" if where else str(key)))
    return found


def differences(old: Any, new: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two plain trees, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = {}
        for key in sorted(old.keys() | new.keys()):
            dotted = f"{where}.{key}" if where else key
            found.update(differences(old.get(key), new.get(key), dotted))
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        found = {}
        for i, (left, right) in enumerate(zip(old, new, strict=True)):
            found.update(differences(left, right, f"{where}.{i}"))
        return found
    return {} if old == new else {where: (old, new)}


@lru_cache(maxsize=64)
def field_types(kind: type) -> dict[str, Any]:
    """Resolved annotations of a settings dataclass."""
    return typing.get_type_hints(kind)


@lru_cache(maxsize=64)
def _field_docs(kind: type) -> dict[str, str]:
    """The string literal under each field of a dataclass, inherited fields included."""
    docs: dict[str, str] = {}
    for parent in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0]
        assert isinstance(body, ast.ClassDef)
        for first, second in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(first, ast.AnnAssign)
                and isinstance(first.target, ast.Name)
                and isinstance(second, ast.Expr)
                and isinstance(second.value, ast.Constant)
            ):
                docs[first.target.id] = inspect.cleandoc(str(second.value.value))
    return docs


def help_of(kind: type, name: str) -> str:
    """The docstring under a field: its help text."""
    return _field_docs(kind)[name]


def describe(kind: type, where: str = "") -> list[tuple[str, str, str]]:
    """Every key below `kind` as (dotted key, default, help), in declared order."""
    rows: list[tuple[str, str, str]] = []
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        dotted = f"{where}.{field.name}" if where else field.name
        hint = field_types(kind)[field.name]
        members = typing.get_args(hint) if typing.get_origin(hint) else (hint,)
        nested = [member for member in members if dataclasses.is_dataclass(member)]
        if nested:
            for member in nested:
                tags = _tags(member)
                label = f"{dotted}({tags[0]})" if tags else dotted
                label += ".N" if typing.get_origin(hint) is tuple else ""
                rows.extend(describe(typing.cast(type, member), label))
            continue
        default = "required" if field.default is dataclasses.MISSING else _show(field.default)
        rows.append((dotted, default, help_of(kind, field.name)))
    return rows


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(str(item) for item in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value != "" else '""'


def _unknown(key: str, known: Mapping[str, Any], where: str) -> str:
    dotted = f"{where}.{key}" if where else key
    suggestion = _nearest(key, tuple(known))
    return f"{dotted}: unknown key{suggestion or '; known here: ' + ', '.join(known)}"


def _nearest(value: Any, known: tuple[Any, ...]) -> str:
    close = difflib.get_close_matches(str(value), [str(item) for item in known], n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return f"{type(value).__name__} {value!r}"


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0]
