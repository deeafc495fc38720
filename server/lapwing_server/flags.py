"""The flags of `lapwing serve`: one for every setting, made of the settings themselves, so that none is forgotten."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from lapwing_server.setting_names import flag, settable
from lapwing_server.settings import Settings

SECTIONS: Final = {
    "Listening": ("host", "port", "insecure", "reflection", "grace", "keepalive", "keepalive_timeout"),
    "Model and probes": ("model", "device", "dtype", "probes", "probe"),
    "Who may do what": (
        *("tls_cert", "tls_key", "tls_client_ca", "tokens_file", "open_admin", "requests_per_second", "burst"),
    ),
    "Metrics and log": ("metrics_port", "metrics_host", "metrics_insecure", "log_format", "log_level"),
}
"""Settings under their headings in the help; all others are limits."""

METAVARS: Final = {int: "INTEGER", float: "NUMBER", Path: "PATH", str: "TEXT"}

Verb = TypeVar("Verb", bound=Callable[..., Any])


def with_settings(verb: Verb) -> Verb:
    """Gives a verb a flag for every setting, in place of its `**flags`.

    A flag that is not given is None, so that it overrides nothing. Values stay text, and are checked where those of all
    other sources are.
    """
    signature = inspect.signature(verb, eval_str=True)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    parameters = [*own, *map(parameter, settable(Settings).items())]
    verb.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {one.name: one.annotation for one in parameters}
    return verb


def given(values: dict[str, Any]) -> dict[str, Any]:
    """What the command line gives, by dotted name."""
    names = {argument(name): name for name in settable(Settings)}
    return {names[key]: value for key, value in values.items() if value is not None}


def argument(name: str) -> str:
    """The name of a setting as Python takes it."""
    return name.replace(".", "__")


def parameter(setting: tuple[str, FieldInfo]) -> inspect.Parameter:
    """The flag of one setting."""
    name, info = setting
    kind = kind_of(info.annotation)
    spelling = f"{flag(name)}/--no-{flag(name)[2:]}" if kind is bool else flag(name)
    option = typer.Option(
        spelling,
        help=help_of(info),
        metavar=None if kind is bool else metavar(kind),
        show_default=False,
        rich_help_panel=section(name),
    )
    hint: Any = bool | None if kind is bool else str | None
    return inspect.Parameter(
        argument(name), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[hint, option]
    )


def help_of(info: FieldInfo) -> str:
    """What the setting is for, and its default; typer knows none, since a flag that is not given overrides nothing."""
    text = " ".join((info.description or "").split())
    return text if info.default is None or info.default is False else f"{text} Default: {info.default}."


def kind_of(annotation: Any) -> Any:
    """int of `Annotated[int, ...] | None`, and so on; a Literal is itself."""
    if get_origin(annotation) is Annotated:
        return kind_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return next(kind_of(one) for one in get_args(annotation) if one is not type(None))
    return annotation


def metavar(kind: Any) -> str:
    """What stands for the value in the help."""
    return "|".join(get_args(kind)) if get_origin(kind) is Literal else METAVARS[kind]


def section(name: str) -> str:
    """The heading of a setting."""
    return next((title for title, names in SECTIONS.items() if name in names), "Limits")
