"""Recipes: YAML values and `key=value` overrides, checked against a package's config dataclass.

A recipe may name another as its `base` and changes only what it lists. Lists of dataclasses whose items have a `name`
(the stages of pretraining) are merged and addressed by it: `stages.codec.rate=0.1`.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from cluster.errors import RecipeError

C = TypeVar("C")


class Difference(NamedTuple):
    """A key whose value differs between two configs."""

    key: str
    before: Any
    after: Any


def load_config(schema: type[C], recipe: str | Path | None, overrides: list[str], folder: Path) -> C:
    """An object of the dataclass `schema` from a recipe (a name in `folder`, or a path) and `key=value` overrides.

    Raises:
        RecipeError: unknown recipe or key, wrong type, missing value; whatever `schema.validate` raises.
    """
    values = _read_recipe(recipe, folder) if recipe is not None else {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise RecipeError(f"{override!r} is not of the form key=value; write for example seed=1")
        _set(values, key, _parse(override, text), schema)
    _check_keys(values, schema, "")
    try:
        config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), _plain(values)))
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        raise RecipeError(f"{key} is missing; give it a value: {key}=...") from error
    except OmegaConfBaseException as error:
        raise RecipeError(f"{error.full_key}: {str(error.msg).splitlines()[0]}") from error
    if missing := [field.name for field in fields(config) if getattr(config, field.name) == "???"]:
        raise RecipeError(f"{missing[0]} is missing; give it a value: {missing[0]}=...")
    if hasattr(config, "validate"):
        config.validate()
    return config


def save_config(config: Any, path: Path) -> None:
    """Write a config dataclass as YAML, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    os.replace(temporary, path)


def load_saved(schema: type[C], path: Path) -> C:
    """Read what `save_config` wrote (RecipeError where it does not fit `schema`)."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except (OmegaConfBaseException, yaml.YAMLError, OSError) as error:
        raise RecipeError(f"{path}: not a config of this version ({str(error).splitlines()[0]})") from error


def config_diff(before: Any, after: Any) -> list[Difference]:
    """Keys, dotted, whose values differ between two config dataclasses."""
    first, second = _flatten(before), _flatten(after)
    return [
        Difference(key, first.get(key), second.get(key))
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key)
    ]


def _read_recipe(recipe: str | Path, folder: Path) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{recipe}.yaml"
        if not path.is_file():
            names = sorted(other.stem for other in folder.glob("*.yaml"))
            nearest = difflib.get_close_matches(str(recipe), names, n=1)
            hint = f"did you mean {nearest[0]}? " if nearest else ""
            raise RecipeError(f"no recipe {recipe!r}; {hint}there are {', '.join(names)}, or name a YAML file")
    try:
        values = yaml.load(path.read_text(), Loader=_Loader) or {}
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "somewhere"
        raise RecipeError(f"{path}, {where}: not YAML ({getattr(error, 'problem', error)})") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a list of `key: value` lines")
    base = values.pop("base", None)
    return _merge(_read_recipe(base, folder), values) if base else values


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; users mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse(override: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{override!r}: its value is not YAML; quote it for the shell") from error


def _merge(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`values` over `base`; named lists item by item, keeping the order of `base`."""
    merged = dict(base)
    for key, value in values.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _merge(old, value)
        elif isinstance(old, list) and _is_named(old) and _is_named(value):
            items = {item["name"]: item for item in old}
            for item in value:
                items[item["name"]] = _merge(items.get(item["name"], {}), item)
            merged[key] = list(items.values())
        else:
            merged[key] = value
    return merged


def _is_named(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) and "name" in v for v in value)


def _set(values: dict[str, Any], key: str, value: Any, schema: Any) -> None:
    """Set a dotted key in nested dicts and named lists."""
    *parents, last = key.split(".")
    here: Any = values
    for parent in parents:
        if isinstance(here, list):
            names = [item.get("name") for item in here]
            if parent.isdigit() and int(parent) < len(here):
                here = here[int(parent)]
            elif parent in names:
                here = here[names.index(parent)]
            else:
                raise RecipeError(f"{key}: no item {parent!r}; there are {', '.join(map(str, names))}")
        elif isinstance(here, dict):
            here = here.setdefault(parent, {})
        else:
            raise RecipeError(f"{key}: {parent!r} has no options of its own")
    if not isinstance(here, dict):
        raise RecipeError(f"{key}: give one option of an item, for example {key}.name=...")
    here[last] = value


def _check_keys(values: dict[str, Any], schema: Any, prefix: str) -> None:
    hints = get_type_hints(schema)
    for key, value in values.items():
        if key not in hints:
            nearest = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            remedy = f"did you mean {prefix}{nearest[0]}?" if nearest else f"there are {', '.join(hints)}"
            raise RecipeError(f"unknown key {prefix}{key} (value {value!r}); {remedy}")
        inner = hints[key]
        if is_dataclass(inner) and isinstance(value, dict):
            _check_keys(value, inner, f"{prefix}{key}.")
        elif isinstance(value, list) and (items := get_args(inner)) and is_dataclass(items[0]):
            for item in value:
                if isinstance(item, dict):
                    _check_keys(item, items[0], f"{prefix}{key}.{item.get('name', '?')}.")


def _plain(values: dict[str, Any]) -> DictConfig:
    return OmegaConf.create(values)


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    if is_dataclass(config):
        items = [(field.name, getattr(config, field.name)) for field in fields(config)]
    elif isinstance(config, list) and config and is_dataclass(config[0]):
        items = [(getattr(item, "name", str(i)), item) for i, item in enumerate(config)]
    else:
        return {prefix[:-1]: config}
    return {key: value for name, item in items for key, value in _flatten(item, f"{prefix}{name}.").items()}
