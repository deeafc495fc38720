"""What the environment says of the settings, and what of it is meant for others."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import pydantic_settings
from pydantic_settings import EnvSettingsSource

from lapwing_server.setting_names import PREFIX, settable, suggestion, variable
from lapwing_server.settings import Settings

CONFIG: Final = "LAPWING_CONFIG"
"""Names the TOML file where no flag does."""

OTHERS: Final = frozenset(
    {"LAPWING_REGISTRY", "LAPWING_SERVER", "LAPWING_TOKEN", "LAPWING_SOAK", "LAPWING_IMAGE"}
    | {"LAPWING_WRITE_ARCHITECTURES", "LAPWING_PYTHONS"}
)
"""Variables that other commands and the tests read; in the environment of a server they mean nothing."""

SERVICE_LINK: Final = re.compile(
    r"LAPWING_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
"""What Kubernetes sets in every pod for a Service that is called lapwing, or lapwing-metrics."""

SERVICE_ADDRESS: Final = re.compile(r"(tcp|udp|sctp)://.*")
"""What it sets LAPWING_PORT to, which is a setting of ours, too."""


@dataclass(frozen=True)
class Variables:
    """What was found in the environment."""

    values: Mapping[str, Any]
    """Settings, nested."""

    problems: tuple[str, ...] = ()
    """A line for each variable that can't be used."""

    ignored: tuple[str, ...] = ()
    """Variables that look like ours and that Kubernetes set."""


def variables() -> Variables:
    """The environment's word on the settings."""
    source = EnvSettingsSource(Settings)
    ignored = tuple(sorted(name for name, value in os.environ.items() if is_service_link(name, value)))
    dropped = {name.lower() for name in ignored}
    source.env_vars = {name: value for name, value in source.env_vars.items() if name.lower() not in dropped}
    unknown = tuple(unknown_variables())
    try:
        return Variables(source(), unknown, ignored)
    except pydantic_settings.exceptions.SettingsError:  # of all settings this one alone is read as JSON
        whole = variable("limits")
        source.env_vars = {name: value for name, value in source.env_vars.items() if name.upper() != whole}
        problem = f'limits (from {whole}): expected JSON, such as {{"batch_items": 8}}'
        return Variables(source(), (*unknown, problem), ignored)


def source_of(name: str) -> str:
    """The variable that gave a setting; of a limit it may be that of all of them."""
    given = {key.upper() for key in os.environ}
    return variable(name) if variable(name) in given else variable(name.partition(".")[0])


def unknown_variables() -> Iterator[str]:
    """A line for each variable that is meant for us and unknown; its value, whatever it may be, is not shown."""
    known = {variable(name) for name in [*settable(Settings), *Settings.model_fields]}
    for name, value in sorted(os.environ.items()):
        ours = name.upper().startswith(PREFIX) and not is_service_link(name, value)
        if ours and name.upper() not in known | OTHERS | {CONFIG}:
            yield f"{name}: there is no such setting{suggestion(name.upper(), known)}"


def is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes set the variable, as it does for every Service of the namespace."""
    if SERVICE_LINK.fullmatch(name):
        return True
    return name.startswith(PREFIX) and name.endswith("_PORT") and SERVICE_ADDRESS.fullmatch(value) is not None
