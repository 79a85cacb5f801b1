"""The settings that a training command names, and the same command with other ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mcore_monitors.config import from_dict, load
from mcore_monitors.errors import ConfigError

#: Options whose value is a file that may hold our settings.
YAML_OPTIONS = ("--mcore-monitors",)
JSON_OPTIONS = ("--deepspeed_config", "--deepspeed-config", "--deepspeed")
OPTIONS = (*YAML_OPTIONS, *JSON_OPTIONS)


def named_file(command: Sequence[str]) -> tuple[int, str, str] | None:
    """Return (place of the file's word, option, file) of the settings in a command, or None."""
    for i, word in enumerate(command):
        option, equals, value = word.partition("=")
        if option not in OPTIONS:
            continue
        if equals:
            return i, option, value
        follows = next(iter(command[i + 1 : i + 2]), "")
        # --deepspeed is also a switch without a value
        if option in YAML_OPTIONS or follows.endswith(".json"):
            return i + 1, option, follows
    return None


def read_settings(command: Sequence[str], given: Path | None) -> dict[str, Any]:
    """Return the settings to use, checked: those of a file, else those that the command names.

    Raises:
        ConfigError: they cannot be used.
    """
    named = named_file(command)
    if given is None and named is not None and named[1] in JSON_OPTIONS:
        settings = _json(Path(named[2])).get("mcore_monitors") or {}
        if settings:
            from_dict(settings)
        return settings
    if given is None and named is None:
        return {}
    path = given if given is not None else Path(named[2])
    load(path)
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def with_settings(
    command: Sequence[str], settings: dict[str, Any], folder: Path
) -> list[str]:
    """Return the command with other settings, which are written into ``folder``."""
    command, named = list(command), named_file(command)
    if named is not None and named[1] in JSON_OPTIONS:
        path = folder / "deepspeed.json"
        whole = _json(Path(named[2])) | {"mcore_monitors": settings}
        path.write_text(json.dumps(whole, indent=1))
    else:
        path = folder / "monitors.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
    if named is None:
        return [*command, YAML_OPTIONS[0], str(path)]
    place, option, _ = named
    command[place] = f"{option}={path}" if command[place].startswith("--") else str(path)
    return command


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("--deepspeed_config", str(path), "a JSON file", f"{error}.") from None
    if not isinstance(found, dict):
        raise ConfigError("--deepspeed_config", str(path), "a JSON object")
    return found
