"""From preset name and ``section.key=value`` overrides to a validated :class:`Config`.

Order: dataclass defaults < preset < overrides. Strict: an unknown key or a value of the wrong type
is a ``ValueError`` that names the key and the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ultramem_ds.config.presets import preset
from ultramem_ds.config.schema import Config

_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)


def valid_keys() -> tuple[str, ...]:
    """Every key that an override may set, as ``section.key``."""
    keys = []
    for section in dataclasses.fields(Config):
        value = section.default_factory
        if value is dataclasses.MISSING:
            continue
        keys += [f"{section.name}.{f.name}" for f in dataclasses.fields(value)]  # type: ignore[arg-type]
    return tuple(keys)


def to_dict(config: Config) -> dict[str, Any]:
    """``config`` as nested plain values, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> Config:
    """Validate nested plain values into a :class:`Config`.

    Raises:
        ValueError: naming the first bad key and what was expected.
    """
    try:
        return _ADAPTER.validate_python(dict(values))
    except ValidationError as error:
        raise ValueError(_explain(error)) from None


def load_config(name: str, overrides: Iterable[str] = ()) -> Config:
    """Resolve preset ``name`` with ``section.key=value`` overrides.

    Raises:
        ValueError: for an unknown preset, key or value.
    """
    values = to_dict(preset(name))
    known = valid_keys()
    for override in overrides:
        key, sep, text = override.partition("=")
        if not sep:
            raise ValueError(f"override {override!r} is not of the form section.key=value")
        _set(values, key.strip(), text.strip(), known)
    return from_dict(values)


def load_run_config(path: Path) -> Config:
    """Read a run directory's ``config.json``; the history of its changes is left out.

    Raises:
        ValueError: if the file is missing, is not JSON or does not fit the schema.
    """
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: is this a run directory?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    values.pop("history", None)
    try:
        return from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def changed_keys(old: Config, new: Config) -> list[str]:
    """Keys whose values differ, as ``section.key``, in schema order."""
    a, b = to_dict(old), to_dict(new)
    changed = [] if a["preset"] == b["preset"] else ["preset"]
    for key in valid_keys():
        section, name = key.split(".")
        if a[section][name] != b[section][name]:
            changed.append(key)
    return changed


def _set(values: dict[str, Any], key: str, text: str, known: tuple[str, ...]) -> None:
    section, _, name = key.partition(".")
    name, _, sub = name.partition(".")
    if f"{section}.{name}" not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown key {key!r}; the nearest valid key is {near!r}")
    value = _parse(text)
    if sub:
        if not isinstance(values[section][name], dict):
            raise ValueError(f"{section}.{name} has no sub-key {sub!r}")
        values[section][name] = {**values[section][name], sub: value}
    else:
        values[section][name] = value


def _parse(text: str) -> Any:
    """JSON where it is JSON (numbers, true, objects), Python's constants, or the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _explain(error: ValidationError) -> str:
    """One line for the first problem; a custom ValueError speaks for itself."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"][:2])
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "unexpected_keyword_argument":
        known = (*valid_keys(), "preset", "model", "memory", "moe", "optim", "train", "data")
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        return f"unknown key {key!r}; the nearest valid key is {near!r}"
    wanted = "; ".join(
        dict.fromkeys(str(e["msg"]) for e in error.errors() if e["loc"][:2] == first["loc"][:2])
    )
    return f"{key}={first['input']!r}: {wanted}"
