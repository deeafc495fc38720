"""Where settings come from: flags before LAPWING_ variables before a TOML file before defaults."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from lapwing_server.contradictions import Contradiction, Contradictions
from lapwing_server.setting_names import flag, settable, suggestion
from lapwing_server.settings import PATHS_OF_SECRETS, Settings
from lapwing_server.toml_text import NoToml, parsed
from lapwing_server.variables import CONFIG, source_of, variables

NOT_SHOWN: Final = "(not shown: it may be the secret itself)"

Layer = tuple[Mapping[str, Any], Callable[[str], str]]
"""Settings, nested, and what to call the source of each by its dotted name."""


class UnusableSettings(ValueError):
    """Some settings can't be used; the text names each, with its value, its source and what was expected."""


@dataclass(frozen=True)
class Found:
    """Settings, and where those that were given came from."""

    settings: Settings
    origins: Mapping[str, str]
    """Source by name, such as {"port": "LAPWING_PORT"}, of all that were given; the rest are defaults."""

    ignored: tuple[str, ...] = ()
    """Variables that look like settings and that Kubernetes set."""

    def lines(self) -> Iterator[str]:
        """What the log says of them at start."""
        values = flat(self.settings.model_dump())
        for name, origin in sorted(self.origins.items()):
            yield f"setting {name} is {shown(name, values[name])} (from {origin})"
        rest = ", ".join(f"{name} {shown(name, value)}" for name, value in values.items() if name not in self.origins)
        yield f"all other settings have their defaults: {rest}"
        if self.ignored:
            yield (
                f"no settings of ours, but Kubernetes' word on a Service: {', '.join(self.ignored)} are ignored "
                "(enableServiceLinks: false keeps them away)"
            )


def read(flags: Mapping[str, Any], config: Path | None = None, *, verbose: bool = False) -> Found:
    """The settings of a server.

    Args:
        flags: what the command line gives, by dotted name, such as {"limits.batch_items": "8"}.
        config: the TOML file; the one that LAPWING_CONFIG names without it.
        verbose: whether the log level is debug where no flag says another.

    Raises:
        UnusableSettings: one is unknown or has an unusable value, or some exclude each other.
    """
    config = config or (Path(named) if (named := os.environ.get(CONFIG)) else None)
    environment = variables()
    problems = list(environment.problems)
    try:
        in_file = from_file(config)
    except UnusableSettings as error:  # the rest is not judged without what it says
        raise UnusableSettings("\n".join([*problems, str(error)])) from error
    layers: list[Layer] = [
        (in_file, lambda name: str(config)),
        (environment.values, source_of),
        ({"log_level": "debug"} if verbose else {}, lambda name: "--verbose"),
        (nested(flags), flag),
    ]
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for values, source in layers:
        merged = merge(merged, values)
        origins |= {name: source(name) for name in flat(values)}
    try:
        settings = Settings(**merged)
    except ValidationError as error:
        problems += told(error, merged, origins)
    if problems:
        raise UnusableSettings("\n".join(problems))
    return Found(settings, origins, environment.ignored)


def from_file(config: Path | None) -> dict[str, Any]:
    """What the TOML file says."""
    if config is None:
        return {}
    try:
        return parsed(config.read_bytes())
    except OSError as error:
        raise UnusableSettings(f"config is {str(config)!r}: it can't be read ({error.strerror})") from error
    except NoToml as error:
        raise UnusableSettings(f"config is {str(config)!r}: it {error}") from error


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


def told(error: ValidationError, values: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    """A line for each thing that is wrong with the values, by name."""
    findings = error.errors(include_url=False)
    unusable = {".".join(map(str, finding["loc"])) for finding in findings} - {""}
    lines = [told_of_one(finding, origins) for finding in findings if finding["loc"]]
    return lines + [told_of_several(one, origins) for one in contradictions_beside(error, values, unusable)]


def contradictions_beside(
    error: ValidationError, values: Mapping[str, Any], unusable: set[str]
) -> Iterator[Contradiction]:
    """Those between the values that are usable each by itself, which pydantic looks at only when all are."""
    if unusable:
        try:
            Settings(**nested({name: value for name, value in flat(values).items() if name not in unusable}))
        except ValidationError as without:
            error = without
    for finding in error.errors(include_url=False):
        found = finding.get("ctx", {}).get("error")
        for one in found.all if isinstance(found, Contradictions) else ():
            # What an unusable value was meant to say is not known.
            if not any(f"{name}.".startswith(f"{bad}.") for name in (*one.names, *one.without) for bad in unusable):
                yield one


def told_of_several(error: Contradiction, origins: Mapping[str, str]) -> str:
    """A line for one contradiction."""
    sources = [f"{name} from {origins[name]}" for name in error.names if name in origins]
    return f"{', '.join(error.names)}: {error}" + (f" ({', '.join(sources)})" if sources else "")


def told_of_one(problem: Any, origins: Mapping[str, str]) -> str:
    """A line for one value."""
    error = problem.get("ctx", {}).get("error")
    name = ".".join(map(str, problem["loc"]))
    source = f" (from {origins[name]})" if name in origins else ""
    if problem["type"] == "extra_forbidden":
        return f"{name}{source}: there is no such setting{suggestion(name, set(settable(Settings)))}"
    expected = str(error) if error is not None else problem["msg"].removeprefix("Input ")
    return f"{name}{source} is {shown(name, problem['input'])}: {expected}"


def shown(name: str, value: Any) -> str:
    """The value as it may be printed."""
    if name in PATHS_OF_SECRETS and value is not None and not os.path.isfile(str(value)):
        return NOT_SHOWN
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= 200 else text[:199] + "…"
