"""Where settings come from: flags before LAPWING_ variables before a TOML file before defaults."""

from __future__ import annotations

import logging
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import pydantic_settings
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import EnvSettingsSource, TomlConfigSettingsSource

from lapwing_server.settings import PATHS_OF_SECRETS, Contradiction, Settings

log = logging.getLogger("lapwing.server")

PREFIX: Final = "LAPWING_"
CONFIG: Final = "LAPWING_CONFIG"
"""Names the TOML file where no flag does."""

OTHERS: Final = frozenset(
    {"LAPWING_REGISTRY", "LAPWING_SERVER", "LAPWING_TOKEN", "LAPWING_SOAK", "LAPWING_IMAGE"}
    | {"LAPWING_WRITE_ARCHITECTURES"}
)
"""Variables that other commands and the tests read; in the environment of a server they mean nothing."""

NOT_SHOWN: Final = "(not shown: it may be the secret itself)"


class UnusableSettings(ValueError):
    """Some settings can't be used; the text names each, with its value, its source and what was expected."""


@dataclass(frozen=True)
class Found:
    """Settings, and where those that were given came from."""

    settings: Settings
    origins: Mapping[str, str]
    """Source by name, such as {"port": "LAPWING_PORT"}, of all that were given; the rest are defaults."""

    def lines(self) -> Iterator[str]:
        """What the log says of them at start."""
        values = flat(self.settings.model_dump())
        for name, origin in sorted(self.origins.items()):
            yield f"setting {name} is {shown(name, values[name])} (from {origin})"
        rest = ", ".join(f"{name} {shown(name, value)}" for name, value in values.items() if name not in self.origins)
        yield f"all other settings have their defaults: {rest}"


def read(flags: Mapping[str, Any], config: Path | None = None) -> Found:
    """The settings of a server.

    Args:
        flags: what the command line gives, by dotted name, such as {"limits.batch_items": "8"}.
        config: the TOML file; the one that LAPWING_CONFIG names without it.

    Raises:
        UnusableSettings: one is unknown or has an unusable value, or some exclude each other.
    """
    config = config or (Path(named) if (named := os.environ.get(CONFIG)) else None)
    problems = list(unknown_variables())
    layers = [(from_file(config), str(config)), (from_environment(), ""), (nested(flags), "--")]
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for values, source in layers:
        merged = merge(merged, values)
        origins |= {name: origin(name, source) for name in flat(values)}
    try:
        settings = Settings(**merged)
    except ValidationError as error:
        problems += [told(problem, origins) for problem in error.errors(include_url=False)]
    if problems:
        raise UnusableSettings("\n".join(problems))
    return Found(settings, origins)


def from_file(config: Path | None) -> dict[str, Any]:
    """What the TOML file says."""
    if config is None:
        return {}
    try:
        return dict(TomlConfigSettingsSource(Settings, toml_file=config.resolve(strict=True))())
    except OSError as error:
        raise UnusableSettings(f"config is {str(config)!r}: it can't be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UnusableSettings(f"config is {str(config)!r}: it is no TOML{place_in(error)}") from error


def from_environment() -> dict[str, Any]:
    """What the variables say."""
    try:
        return dict(EnvSettingsSource(Settings)())
    except pydantic_settings.exceptions.SettingsError as error:
        raise UnusableSettings('limits (from LAPWING_LIMITS): expected JSON, such as {"batch_items": 8}') from error


def unknown_variables() -> Iterator[str]:
    """A line for each variable that is meant for us and unknown; its value, whatever it may be, is not shown."""
    known = {variable(name) for name in [*settable(Settings), *Settings.model_fields]}
    for name in sorted(os.environ):
        if name.upper().startswith(PREFIX) and name.upper() not in known | OTHERS | {CONFIG}:
            yield f"{name}: there is no such setting{suggestion(name.upper(), known)}"


def settable(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every setting by dotted name."""
    found: dict[str, FieldInfo] = {}
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found |= settable(info.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = info
    return found


def variable(name: str) -> str:
    """The variable of a setting: limits.batch_items -> LAPWING_LIMITS__BATCH_ITEMS."""
    return PREFIX + name.replace(".", "__").upper()


def flag(name: str) -> str:
    """The flag of a setting: limits.batch_items -> --limits-batch-items."""
    return "--" + name.replace(".", "-").replace("_", "-")


def origin(name: str, source: str) -> str:
    """How to call the place where a setting was given: its flag, its variable, or the file."""
    if source == "--":
        return flag(name)
    if source:
        return source
    given = {key.upper() for key in os.environ}
    return variable(name) if variable(name) in given else variable(name.partition(".")[0])


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"limits.batch_items": 8} -> {"limits": {"batch_items": 8}}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        section, dot, rest = name.partition(".")
        found = merge(found, {section: nested({rest: value}) if dot else value})
    return found


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"limits": {"batch_items": 8}} -> {"limits.batch_items": 8}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def merge(weaker: Mapping[str, Any], stronger: Mapping[str, Any]) -> dict[str, Any]:
    """Both; where both have a value, the stronger one's."""
    merged = dict(weaker)
    for name, value in stronger.items():
        below = merged.get(name)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[name] = merge(below, value)
        else:
            merged[name] = value
    return merged


def told(problem: Any, origins: Mapping[str, str]) -> str:
    """A line for one finding of pydantic."""
    error = problem.get("ctx", {}).get("error")
    if isinstance(error, Contradiction):
        sources = [f"{name} from {origins[name]}" for name in error.names if name in origins]
        return f"{', '.join(error.names)}: {error}" + (f" ({', '.join(sources)})" if sources else "")
    name = ".".join(map(str, problem["loc"]))
    source = f" (from {origins[name]})" if name in origins else ""
    if problem["type"] == "extra_forbidden":
        return f"{name}{source}: there is no such setting{suggestion(name, set(settable(Settings)))}"
    expected = str(error) if error is not None else problem["msg"].removeprefix("Input ")
    return f"{name}{source} is {shown(name, problem['input'])}: {expected}"


def suggestion(name: str, known: set[str]) -> str:
    """The known name that looks most like it."""
    near = get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else "; lapwing serve --help names them all"


def shown(name: str, value: Any) -> str:
    """The value as it may be printed."""
    if name in PATHS_OF_SECRETS and value is not None and not os.path.isfile(str(value)):
        return NOT_SHOWN
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= 200 else text[:199] + "…"


def place_in(error: Exception) -> str:
    """Where in a file something is wrong, without quoting it."""
    found = re.search(r"\(at (line \d+, column \d+|end of document)\)", str(error))
    return f", {found[1]}" if found else ""
