"""Recipes: YAML values and `key=value` overrides, checked against a package's config dataclass.

    base: small                       # another recipe, of which this one changes only what it lists
    image_size: 96
    stages:                           # a list of dataclasses with a `name`: merged and addressed by it
      - {name: codec, epochs: 20}

    stages.codec.epochs=30  stages.0.epochs=30  ssl.heatmap.method=eigencam  codec.re_depths=[1,1,2] or 1,1,2

Values are YAML as OmegaConf reads it, without its interpolation: a recipe or a run of someone else's could otherwise
look up what the environment holds. In: a dataclass (the schema and the defaults), a recipe and overrides. Out: an
object of that dataclass, or a RecipeError of one line before any work has started.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from cluster.credentials import refusal
from cluster.errors import RecipeError, RunError
from cluster.files import write_whole

C = TypeVar("C")
MISSING = "???"
FOLDERS = {"data", "codec", "run"}  # mandatory texts that name a folder
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
SAMPLES = {int: "1", float: "0.1", bool: "true", str: "TEXT"}


class Difference(NamedTuple):
    """A key whose value differs between two configs."""

    key: str
    before: Any
    after: Any


def load_config(schema: type[C], recipe: str | Path | None, overrides: list[str], recipe_folder: Path) -> C:
    """An object of the dataclass `schema` from a recipe and overrides, validated.

    Args:
        recipe: a name in `recipe_folder`, a path that ends in .yaml, or None for the schema's defaults.
        overrides: `key=value`, dotted keys, applied in order.

    Raises:
        RecipeError: unknown recipe or key, wrong type, missing value, no YAML; and whatever `schema.validate` raises.
    """
    refuse_credentials(overrides)  # before any other error shows them
    values: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(schema))  # type: ignore[assignment]
    if recipe is not None:
        given = read_recipe(recipe, recipe_folder)
        refuse_credentials(_texts(given))
        values = _merge(values, given)
    return _changed(schema, values, overrides)


def change_config(config: C, overrides: list[str]) -> C:
    """A copy of a config dataclass with `key=value` overrides, validated (RecipeError, as `load_config`)."""
    values: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[assignment]
    return _changed(type(config), values, overrides)


def _changed(schema: type[C], values: dict[str, Any], overrides: list[str]) -> C:
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise RecipeError(f"{override!r} is not of the form key=value; write for example seed=1")
        _set(values, key, _parse(override, text, _hint_at(schema, key)))
    _refuse_interpolation(values)
    _check(values, schema, schema)
    config = _build(schema, values)
    if hasattr(config, "validate"):
        config.validate()
    return config


def save_config(config: Any, path: Path) -> None:
    """Write a config dataclass as YAML, whole or not at all (RunError where the disk refuses)."""
    try:
        write_whole(path, OmegaConf.to_yaml(OmegaConf.structured(config)))
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror}); make the folder writable, or name another"
        ) from error


def load_saved(schema: type[C], path: Path) -> C:
    """Read what `save_config` wrote (RecipeError where it does not fit `schema`)."""
    values = _read_yaml(path)
    try:
        _refuse_interpolation(values)
        _check(values, schema, schema)
        return _build(schema, values)
    except RecipeError as error:
        raise RecipeError(f"{path} is not a config of this version: {error}") from error


def config_diff(before: Any, after: Any) -> list[Difference]:
    """Keys, dotted, whose values differ between two config dataclasses, in order."""
    first, second = dict(_flatten(before)), dict(_flatten(after))
    return [
        Difference(key, first.get(key), second.get(key))
        for key in [*first, *(key for key in second if key not in first)]
        if first.get(key) != second.get(key)
    ]


def _build(schema: type[C], values: dict[str, Any]) -> C:
    try:
        config: C = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))  # type: ignore[assignment]
    except MissingMandatoryValue as error:
        raise _missing(schema, values, str(error.full_key)) from error
    except OmegaConfBaseException as error:  # what fits key by key, and not together
        key = _named(values, str(error.full_key or ""))
        raise RecipeError(f"{key}: {str(error.msg or error).splitlines()[0]}") from error
    for key, value in _flatten(config):
        if value == MISSING:
            raise _missing(schema, values, key)
    return config


def refuse_credentials(texts: Iterable[str]) -> None:
    """RecipeError for an address with a key or a token in it, which the error does not show.

    The address would stand in the run's config, in the list of jobs, in logs and in errors.
    """
    for text in texts:
        if line := refusal(text):
            raise RecipeError(line)


def _texts(values: Any, key: str = "") -> Iterator[str]:
    """`key=value` of each text in nested dicts and lists."""
    if isinstance(values, dict | list):
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, str):
        yield f"{key}={values}"


def _refuse_interpolation(values: dict[str, Any]) -> None:
    """RecipeError for a text that OmegaConf would look up elsewhere; it shows the text, not what that stands for."""
    for text in _texts(values):
        if "${" in text:
            raise RecipeError(
                f"{text}: values are not looked up elsewhere; write the value itself, or key=value on the command "
                "line, where the shell fills in $NAME"
            )


def _missing(schema: type, values: Any, key: str) -> RecipeError:
    key = _named(values, key)
    hint = _hint_at(schema, key)
    sample = "DIR" if key in FOLDERS else SAMPLES.get(hint, "VALUE")
    return RecipeError(f"{key} is missing; give it a value, for example {key}={sample}")


def read_recipe(recipe: str | Path, folder: Path, inside: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a recipe over those of its `base`, unchecked (RecipeError where it cannot be read).

    Args:
        recipe: a name in `folder`, or a path that ends in .yaml.
        inside: the recipes that led here.
    """
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{recipe}.yaml"
        if not path.is_file():
            names = sorted(other.stem for other in folder.glob("*.yaml"))
            raise RecipeError(f"no recipe {str(recipe)!r}; {_nearest(str(recipe), names)}, or name a .yaml file")
    elif inside and not path.is_absolute():
        path = inside[-1].parent / path
    if path.resolve() in inside:
        raise RecipeError(f"{path}: is its own base ({' -> '.join(p.stem for p in inside)} -> {path.stem})")
    values = _read_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return values
    return _merge(read_recipe(str(base), folder, (*inside, path.resolve())), values)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = OmegaConf.to_container(OmegaConf.load(path)) if path.read_text().strip() else {}
    except RecursionError as error:
        raise RecipeError(f"{path}: cannot be read (brackets without end)") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{where}: not YAML ({getattr(error, 'problem', None) or 'unreadable'})") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not a text file; name a recipe of `key: value` lines") from error
    except OSError as error:
        # OmegaConf raises one without a number for a file that holds a single word.
        reason = error.strerror if error.errno else "a recipe is a list of `key: value` lines"
        raise RecipeError(f"{path}: cannot be read ({reason})") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: cannot be read (a recipe is a list of `key: value` lines)")
    return {str(key): value for key, value in values.items()}


def _parse(override: str, text: str, hint: Any) -> Any:
    if hint is str:
        return text  # a folder called 1e5 or on stays what it is
    if get_origin(hint) is list and text and not text.startswith(("[", "{")):
        text = f"[{text}]"  # anchors=jpeg,hevc for anchors=[jpeg,hevc]
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload,index]
    except yaml.YAMLError as error:
        raise RecipeError(f"{override!r}: its value is not YAML; quote it for the shell") from error


def _merge(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`values` over `base`; named lists item by item, keeping the order of `base`."""
    merged = dict(base)
    for key, value in values.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _merge(old, value)
        elif _is_named(old) and _is_named(value):
            items = {item["name"]: item for item in old}
            for item in value:
                items[item["name"]] = _merge(items.get(item["name"], {}), item)
            merged[key] = list(items.values())
        else:
            merged[key] = value
    return merged


def _is_named(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "name" in item for item in value)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested dicts and lists, whose items go by index or by name."""
    *parents, last = key.split(".")
    here: Any = values
    for depth, parent in enumerate(parents):
        if isinstance(here, list):
            here = here[_index(here, parent, key)]
        else:
            if here.get(parent) is None:
                here[parent] = {}
            here = here[parent]
        if not isinstance(here, dict | list):
            raise RecipeError(f"{key}={value}: {'.'.join(parents[: depth + 1])} has no options of its own")
    place: Any = _index(here, last, key) if isinstance(here, list) else last
    old = here[place] if isinstance(here, list) else here.get(place)
    here[place] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value


def _index(items: list[Any], name: str, key: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if name in names:
        return names.index(name)
    if name.isdigit() and int(name) < len(items):
        return int(name)
    there = [str(item) for item in names if item is not None] or [str(index) for index in range(len(items))]
    raise RecipeError(f"{key}: no item {name!r}; {_nearest(name, there)}")


def _check(values: dict[str, Any], schema: Any, root: Any, prefix: str = "") -> None:
    """RecipeError for a key that `schema` does not have or a value that is not of its type, all the way down."""
    hints = get_type_hints(schema)
    leaves = {}
    for key, value in values.items():
        full = f"{prefix}{key}"
        if key not in hints:
            shown = f"{full}={value}" if not isinstance(value, dict | list) else full
            raise RecipeError(f"unknown key {shown}; {_nearest_key(str(key), prefix, hints, root)}")
        inner = _strip_optional(hints[key])
        item = get_args(inner)[0] if get_origin(inner) is list else None
        if is_dataclass(inner) and isinstance(value, dict):
            _check(value, inner, root, f"{full}.")
        elif is_dataclass(item) and isinstance(value, list):
            for index, one in enumerate(value):
                if not isinstance(one, dict):
                    raise RecipeError(f"{full}.{index}={one}: expected {_expected(item)}")
                _check(one, item, root, f"{full}.{one.get('name', index)}.")
        else:
            leaves[key] = value
    if not _fits(schema, leaves):
        key = next(key for key, value in leaves.items() if not _fits(schema, {key: value}))
        raise RecipeError(f"{prefix}{key}={leaves[key]}: expected {_expected(hints[key])}")


def _fits(schema: Any, values: dict[str, Any]) -> bool:
    try:
        OmegaConf.merge(OmegaConf.structured(schema), values)
    except OmegaConfBaseException:
        return False
    return True


def _nearest_key(key: str, prefix: str, hints: dict[str, Any], root: Any) -> str:
    """Advice for an unknown key: a sibling that looks like it, the same name elsewhere, or all siblings."""
    if near := difflib.get_close_matches(key, hints, n=1, cutoff=0.6):
        return f"did you mean {prefix}{near[0]}?"
    elsewhere = [name for name in _all_keys(root) if name.rpartition(".")[2] == key]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:2])}?"
    return f"{prefix.removesuffix('.') or 'a recipe'} has {', '.join(hints)}"


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"there are {', '.join(names) or 'none'}"


def _all_keys(schema: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(schema).items():
        inner = _strip_optional(hint)
        if is_dataclass(inner):
            yield from _all_keys(inner, f"{prefix}{name}.")
        elif get_origin(inner) is list and is_dataclass(get_args(inner)[0]):
            yield from _all_keys(get_args(inner)[0], f"{prefix}{name}.NAME.")
        else:
            yield f"{prefix}{name}"


def _hint_at(schema: Any, key: str) -> Any:
    """The type of a dotted key, or None where the schema has no such key."""
    hint: Any = schema
    for part in key.split("."):
        hint = _strip_optional(hint)
        if is_dataclass(hint):
            hint = get_type_hints(hint).get(part)
        else:
            arguments = get_args(hint)
            hint = arguments[-1] if get_origin(hint) in (list, dict) and arguments else None
    return hint


def _strip_optional(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        inner = [argument for argument in get_args(hint) if argument is not type(None)]
        return inner[0] if len(inner) == 1 else hint
    return hint


def _expected(hint: Any) -> str:
    inner = _strip_optional(hint)
    suffix = " or null" if inner is not hint else ""
    if get_origin(inner) in (list, tuple) and get_args(inner):
        return f"a list, each {_expected(get_args(inner)[0])}{suffix}"
    if is_dataclass(inner):
        return f"options ({', '.join(field.name for field in fields(inner))}){suffix}"
    return WORDS.get(inner, str(getattr(inner, "__name__", inner))) + suffix


def _named(values: Any, key: str) -> str:
    """OmegaConf's `stages[0].epochs` as users write it: `stages.ssl.epochs`."""
    named = []
    for part in re.findall(r"[^.\[\]]+", key):
        if isinstance(values, list) and part.isdigit() and int(part) < len(values):
            values = values[int(part)]
            name = values.get("name", MISSING) if isinstance(values, dict) else MISSING
            named.append(part if name == MISSING else str(name))
        else:
            values = values.get(part) if isinstance(values, dict) else None
            named.append(part)
    return ".".join(named)


def _flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if is_dataclass(config):
        items = [(field.name, getattr(config, field.name)) for field in fields(config)]
    elif isinstance(config, list) and config and is_dataclass(config[0]):
        items = [(str(getattr(item, "name", index)), item) for index, item in enumerate(config)]
    else:
        yield prefix[:-1], config
        return
    for name, item in items:
        yield from _flatten(item, f"{prefix}{name}.")
