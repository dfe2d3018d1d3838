"""Settings back to text: the whole configuration as one TOML file that loads to the same thing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dynamo_core.config.origins import Setting

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def nested(settings: Iterable[Setting]) -> dict[str, Any]:
    """Settings as plain nested data; those that are off are left out, as TOML has no word for them."""
    root: dict[str, Any] = {}
    for setting in settings:
        if setting.value is None:
            continue
        place: Any = root
        for step, following in zip(setting.key, setting.key[1:], strict=False):
            place = _inside(place, step, [] if isinstance(following, int) else {})
        place[setting.key[-1]] = setting.value
    return root


def _inside(place: Any, step: str | int, empty: Any) -> Any:
    if isinstance(step, str):
        return place.setdefault(step, empty)
    if step == len(place):
        place.append(empty)
    return place[step]


def to_toml(data: Mapping[str, Any]) -> str:
    return "\n".join(_table(data, ())).strip() + "\n"


def _table(data: Mapping[str, Any], at: tuple[str, ...]) -> list[str]:
    lines: list[str] = []
    deeper: list[str] = []
    for key, value in data.items():
        path = (*at, key)
        if isinstance(value, Mapping) and "use" not in value:
            deeper += ["", f"[{'.'.join(map(_key, path))}]", *_table(value, path)]
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) and "use" not in item for item in value):
            for item in value:
                deeper += ["", f"[[{'.'.join(map(_key, path))}]]", *_table(item, path)]
        else:
            lines.append(f"{_key(key)} = {value_text(value)}")
    return lines + deeper


def value_text(value: Any) -> str:
    """One value as TOML, on one line."""
    if value is None:
        return "(none)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {value_text(item)}" for key, item in value.items()) + " }" if value else "{}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(value_text, value)) + "]"
    return repr(value)


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else json.dumps(key, ensure_ascii=False)
