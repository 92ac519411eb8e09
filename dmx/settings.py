"""Settings by dotted names: from nested mappings and back, converted, and what each of them wants."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import yaml

from dmx.errors import DmxError

SHOWN = 4

_WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    bool: ("true or false", "true or false each"),
}


def wanted(kind: Any) -> str:
    """What a setting of type `kind` takes, in words."""
    root, args = typing.get_origin(kind), typing.get_args(kind)
    if root in (types.UnionType, typing.Union):
        return " or ".join("null" if arg is type(None) else wanted(arg) for arg in args)
    if root is Literal:
        return " or ".join(map(str, args))
    if root is tuple:
        return f"a list of {_WORDS[args[0]][1] if args[0] in _WORDS else wanted(args[0])}"
    return "a mapping" if root is dict else _WORDS[kind][0]


def from_words(words: list[str], kind: Any, name: str) -> Any:
    """What the words behind an option mean, as YAML would give it: text as it stands, the rest as YAML.

    Args:
        words: of the command line; none is `true`.
        kind: the setting's type. A list is one word a value, or a list of YAML in one word.
        name: of the option, for errors.
    """
    if not words:
        return True
    root, args = typing.get_origin(kind), typing.get_args(kind)
    if root is tuple and not (len(words) == 1 and words[0].lstrip().startswith("[")):
        return [from_words([word], args[0], name) for word in words]
    (word,) = words
    may_be_null = root in (types.UnionType, typing.Union) and type(None) in args
    is_text = kind is str or root is Literal or (may_be_null and str in args)
    return word if is_text and not (may_be_null and word == "null") else from_yaml(word, name)


def from_yaml(text: str, name: str) -> Any:
    """A value of the command line."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DmxError(f"{name}: {text!r} is no YAML value") from error


def assignment(item: str) -> tuple[str, Any]:
    """Name and value of one `name=value`."""
    name, sign, text = item.partition("=")
    if not sign:
        raise DmxError(f"--set wants name=value, found {item!r}")
    return name, from_yaml(text, f"--set {name}")


def limits(item: dataclasses.Field[Any]) -> str:
    """The limits of a setting in words; empty where it has none."""
    low, high = item.metadata.get("low"), item.metadata.get("high")
    if low is None:
        return ""
    return f"at least {low}" if high is None else f"between {low} and {high}"


def convert(value: Any, kind: Any, name: str, origin: str) -> Any:
    """`value` (as YAML gives it) as `kind`, or an error that names the field and where it stands."""
    root, args = typing.get_origin(kind), typing.get_args(kind)
    if root in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return convert(value, next(arg for arg in args if arg is not type(None)), name, origin)
    if root is Literal and value in args:
        return value
    if root is tuple and isinstance(value, list | tuple):
        return tuple(convert(item, args[0], name, origin) for item in value)
    if root is dict and isinstance(value, Mapping):
        return dict(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 3.5e-4 as a number but 1e-4 as a string.
        with contextlib.suppress(ValueError):
            return float(value)
    if kind in (int, str) and isinstance(value, kind) and not isinstance(value, bool):
        return value
    raise DmxError(f"{origin}: {name} wants {wanted(kind)}, found {value!r}")


def check_limits(value: Any, item: dataclasses.Field[Any], name: str, origin: str) -> None:
    low, high = item.metadata.get("low"), item.metadata.get("high")
    for number in value if isinstance(value, tuple) else (value,):
        if not isinstance(number, int | float) or isinstance(number, bool):
            continue
        if (low is not None and not number >= low) or (high is not None and not number <= high):
            raise DmxError(f"{origin}: {name} must be {limits(item)}, found {number!r}")


def unflatten(values: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """[('a.b', 1), ('a.c', 2)] as {'a': {'b': 1, 'c': 2}}; later values win, mappings are joined.

    Raises:
        DmxError: a name is given a value and, by a longer name, parts.
    """
    tree: dict[str, Any] = {}
    for name, value in values:
        *parents, leaf = name.split(".")
        branch = tree
        for depth, parent in enumerate(parents, 1):
            branch = branch.setdefault(parent, {})
            if not isinstance(branch, dict):
                raise _parts_of_value(".".join(parents[:depth]), branch, name)
        held = branch.get(leaf)
        if isinstance(held, dict) and not isinstance(value, dict):
            raise _parts_of_value(name, value, f"{name}.{next(iter(held), '')}")
        branch[leaf] = _joined(held, value) if isinstance(held, dict) else value
    return tree


def _parts_of_value(name: str, value: Any, longer: str) -> DmxError:
    return DmxError(f"--set gives {name} the value {value!r} and sets {longer} inside it: leave one out")


def _joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Two mappings as one, the new one winning, section by section."""
    both = {
        key: _joined(old[key], new[key])
        for key in old.keys() & new.keys()
        if isinstance(old[key], dict) and isinstance(new[key], dict)
    }
    return old | new | both


def flatten(
    tree: Mapping[str, Any], known: Mapping[str, Any], origin: str, prefix: str = ""
) -> dict[str, Any]:
    """The tree as dotted names; a name that is no setting is an error with the nearest right one."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in known:
            flat[name] = value
        elif isinstance(value, Mapping) and any(other.startswith(name + ".") for other in known):
            flat |= flatten(value, known, origin, name + ".")
        else:
            raise DmxError(f"{origin}: {_no_setting(name, value, known)}")
    return flat


def _no_setting(name: str, value: Any, known: Iterable[str]) -> str:
    inside = [other for other in known if other.startswith(name + ".")]
    if inside:
        more = ", ..." if len(inside) > SHOWN else ""
        shown = ", ".join(inside[:SHOWN]) + more
        return f"{name} is a section and takes no value, found {value!r}; its settings are {shown}"
    near = difflib.get_close_matches(name, [*known, *{n.split(".")[0] for n in known}], 1)
    return f"there is no setting {name}" + (f"; did you mean {near[0]}?" if near else "")
