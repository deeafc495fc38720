"""Settings: which source wins, what stops the start and what it says, and that no secret shows."""

from __future__ import annotations

import itertools
import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from test_server_lifecycle import start_and_stop

from lapwing_client.cli import main
from lapwing_server import setting_sources
from lapwing_server.addresses import is_loopback
from lapwing_server.limits import Limits
from lapwing_server.setting_names import PREFIX, flag, settable, variable
from lapwing_server.setting_sources import UnusableSettings, read
from lapwing_server.settings import Settings
from lapwing_server.variables import CONFIG

ROOT = Path(__file__).parents[2]
CANARY = "canary-4f1d"
PUBLIC_ADDRESS = "192.0.2.1"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith(PREFIX):
            monkeypatch.delenv(name)


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "lapwing.toml"
    path.write_text(text)
    return path


def a_file(tmp_path: Path, name: str) -> str:
    path = tmp_path / name
    path.write_text("")
    return str(path)


# Which source wins.

LADDER = {
    "port": ("1001", "1002", "1003"),
    "keepalive": ("1.5", "2.5", "3.5"),
    "log_level": ('"debug"', "warning", "error"),
    "reflection": ("true", "false", "true"),
    "limits.batch_items": ("5", "6", "7"),
}
"""Values of a setting in the file, in the environment, on the command line."""


def value_of(settings: Settings, name: str) -> Any:
    return setting_sources.flat(settings.model_dump())[name]


@pytest.mark.parametrize("name", LADDER)
def test_the_strongest_source_wins(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = LADDER[name]
    path = toml(tmp_path, f"{name} = {values[0]}\n")
    kind = type(value_of(Settings(), name))
    for in_file, in_variable, as_flag in itertools.product((False, True), repeat=3):
        monkeypatch.delenv(variable(name), raising=False)
        if in_variable:
            monkeypatch.setenv(variable(name), values[1])
        found = read({name: values[2]} if as_flag else {}, path if in_file else None)
        told = [flag(name)] * as_flag + [variable(name)] * in_variable + [str(path)] * in_file
        given = [values[2]] * as_flag + [values[1]] * in_variable + [values[0].strip('"')] * in_file
        expected = {"true": True, "false": False}.get(given[0], kind(given[0])) if given else value_of(Settings(), name)
        assert value_of(found.settings, name) == expected
        assert found.origins.get(name) == (told[0] if told else None)


def samples(tmp_path: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """A value for each setting that is no default, and what must be said with it."""
    file, tls = a_file(tmp_path, "a.file"), {"tls_cert": a_file(tmp_path, "cert"), "tls_key": a_file(tmp_path, "key")}
    special: dict[str, tuple[str, dict[str, str]]] = {
        "host": ("127.0.0.2", {}),
        "insecure": ("true", {}),
        "reflection": ("true", {}),
        "model": ("some/model", {"probes": str(tmp_path)}),
        "dtype": ("bfloat16", {}),
        "device": ("cuda:1", {}),
        "probes": (str(tmp_path), {}),
        "probe": ("some-probe", {}),
        "tls_cert": (file, {"tls_key": file}),
        "tls_key": (file, {"tls_cert": file}),
        "tls_client_ca": (file, tls),
        "tokens_file": (file, {}),
        "open_admin": ("true", {}),
        "metrics_insecure": ("true", {"metrics_port": "9000"}),
        "burst": ("7", {"requests_per_second": "3"}),
        "metrics_host": ("127.0.0.2", {"metrics_port": "9000"}),
        "limits.queue_items": ("7", {"limits.batch_items": "7"}),
        "limits.queue_items_per_client": ("70", {"tokens_file": file}),
        "limits.attention_total_bytes": ("7", {"limits.attention_bytes": "7"}),
        "limits.attention_bytes_per_client": ("7", {"limits.attention_bytes": "7"}),
        "log_format": ("json", {}),
        "log_level": ("error", {}),
    }
    return {name: special.get(name, ("7", {})) for name in settable(Settings)}


@pytest.mark.parametrize("source", ["flag", "variable", "file"])
def test_every_setting_can_be_given_in_every_way(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (value, others) in samples(tmp_path).items():
        config = None
        with monkeypatch.context() as patch:
            given = dict(others)
            if source == "flag":
                given[name] = value
            elif source == "variable":
                patch.setenv(variable(name), value)
            else:
                bare = re.fullmatch(r"[0-9.]+|true", value) and name not in ("host", "metrics_host")
                config = toml(tmp_path, f"{name} = {value}\n" if bare else f'{name} = "{value}"\n')
            found = read(given, config)
        assert value_of(found.settings, name) != value_of(Settings(), name), name
        assert str(value_of(found.settings, name)).lower().removesuffix(".0") == value.lower()


def test_the_config_may_be_named_by_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG, str(toml(tmp_path, "port = 1234")))
    assert read({}).settings.port == 1234
    other = tmp_path / "other.toml"
    other.write_text("port = 4321")
    assert read({}, other).settings.port == 4321


def test_limits_may_be_a_section_and_an_empty_variable_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable("port"), "")
    monkeypatch.setenv(f"{PREFIX}LIMITS", '{"batch_items": 3}')
    found = read({"limits.messages": "9"}, toml(tmp_path, "port = 7\n[limits]\nqueue_items = 4\nbatch_items = 5"))
    limits = found.settings.limits
    assert (found.settings.port, limits.batch_items, limits.queue_items, limits.messages) == (7, 3, 4, 9)
    assert found.origins["limits.batch_items"] == f"{PREFIX}LIMITS"
    assert found.origins["limits.messages"] == "--limits-messages"


def test_verbose_is_told_as_such_and_gives_way_to_a_level() -> None:
    found = read({}, verbose=True)
    assert (found.settings.log_level, found.origins) == ("debug", {"log_level": "--verbose"})
    found = read({"log_level": "error"}, verbose=True)
    assert (found.settings.log_level, found.origins) == ("error", {"log_level": "--log-level"})


def test_made_directly_settings_look_at_nothing_but_their_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable("port"), "1")
    assert Settings().port == 50051
    assert Settings(port=0, limits=Limits(batch_items=3)).limits.batch_items == 3
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 3  # type: ignore[misc]


def test_the_log_says_each_setting_and_where_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable("limits.batch_items"), "8")
    lines = list(read({"port": "0"}).lines())
    assert lines[:2] == [
        "setting limits.batch_items is 8 (from LAPWING_LIMITS__BATCH_ITEMS)",
        "setting port is 0 (from --port)",
    ]
    said = " ".join(lines)
    assert [name for name in settable(Settings) if name not in said] == []


# What stops the start.

UNUSABLE = [
    ({"LAPWING_PROT": "1"}, [], "", ["LAPWING_PROT: there is no such setting; did you mean LAPWING_PORT?"]),
    ({"LAPWING_LIMITS__BATCHES": "1"}, [], "", ["LAPWING_LIMITS__BATCHES: there is no such setting"]),
    ({}, [], "prot = 1", ["prot (from ", "lapwing.toml): there is no such setting; did you mean port?"]),
    ({}, [], "[limits]\nbatch_item = 1", ["limits.batch_item (from ", "did you mean limits.batch_items?"]),
    ({}, ["--port", "many"], "", ["port (from --port) is 'many': should be a valid integer"]),
    ({"LAPWING_PORT": "70000"}, [], "", ["port (from LAPWING_PORT) is '70000': should be less than or equal to 65535"]),
    ({}, [], "port = true", ["port (from ", "is True: "]),
    ({}, [], "limits.batch_items = true", ["limits.batch_items (from ", "is True: should be a number"]),
    ({}, [], "limits = 3", ["limits (from ", "is 3: should be"]),
    ({"LAPWING_LIMITS": "3,"}, [], "", ["limits (from LAPWING_LIMITS): expected JSON"]),
    (
        {"LAPWING_INSECURE": "perhaps"},
        [],
        "",
        ["insecure (from LAPWING_INSECURE) is 'perhaps': should be a valid bool"],
    ),
    ({}, ["--keepalive", "nan"], "", ["keepalive (from --keepalive) is 'nan': should be "]),
    ({}, ["--dtype", "int8"], "", ["dtype (from --dtype) is 'int8': should be 'float32', 'bfloat16' or 'float16'"]),
    ({}, ["--probes", "/no/such"], "", ["probes (from --probes) is '/no/such': there is no such file or directory"]),
    ({}, ["--config", "/no/such"], None, ["config is '/no/such': it can't be read (No such file"]),
    ({}, [], "port = = 3", ["lapwing.toml': it is no TOML, line 1, column "]),
    ({}, ["--tls-cert", "FILE"], "", ["tls_cert, tls_key: tls_cert needs tls_key", "(tls_cert from --tls-cert)"]),
    ({}, ["--tls-key", "FILE"], "", ["tls_key, tls_cert: tls_key needs tls_cert"]),
    ({}, ["--tls-client-ca", "FILE"], "", ["tls_client_ca, tls_cert: tls_client_ca needs tls_cert and tls_key"]),
    ({}, ["--insecure", "--tls-cert", "FILE", "--tls-key", "FILE"], "", ["insecure, tls_cert: ", "drop one"]),
    ({}, ["--host", PUBLIC_ADDRESS], "", [f"host: others can reach '{PUBLIC_ADDRESS}'", "--insecure"]),
    (
        {"LAPWING_TOKENS_FILE": "FILE"},
        ["--host", PUBLIC_ADDRESS, "--insecure"],
        "",
        ["tokens_file, host: tokens would travel readable", "(tokens_file from LAPWING_TOKENS_FILE, host from --host)"],
    ),
    ({}, ["--model", "some/model"], "", ["model, probes: --model needs --probes"]),
    ({}, ["--burst", "3"], "", ["burst, requests_per_second: burst needs requests_per_second"]),
    ({}, ["--metrics-host", "127.0.0.2"], "", ["metrics_host, metrics_port: metrics_host needs metrics_port"]),
    ({}, ["--metrics-port", "7", "--port", "7"], "", ["metrics_port, port: metrics_port and port are both 7"]),
    (
        {},
        ["--metrics-port", "7", "--metrics-host", PUBLIC_ADDRESS],
        "",
        [f"metrics_host: others can reach '{PUBLIC_ADDRESS}'", "--metrics-insecure"],
    ),
    ({}, ["--open-admin", "--tokens-file", "FILE"], "", ["open_admin, tokens_file: the file says who may change"]),
    (
        {"LAPWING_OPEN_ADMIN": "1"},
        ["--tls-cert", "FILE", "--tls-key", "FILE", "--tls-client-ca", "FILE"],
        "",
        ["open_admin, tls_client_ca: name the certificates"],
    ),
    ({}, ["--open-admin", "--host", PUBLIC_ADDRESS, "--insecure"], "", ["open_admin, host: whoever reaches"]),
    ({}, ["--host", PUBLIC_ADDRESS], "", ["keep 127.0.0.1 behind a proxy that has it, with --tokens-file"]),
    ({}, ["--keepalive", "3000000"], "", ["keepalive (from --keepalive) is '3000000': should be less than or equal"]),
    ({}, ["--keepalive", "0.0001"], "", ["should be greater than or equal to 0.001"]),
    ({}, ["--keepalive-timeout", "0.0001"], "", ["should be greater than or equal to 0.001"]),
    ({}, ["--metrics-insecure"], "", ["metrics_insecure, metrics_port: metrics_insecure needs metrics_port"]),
    (
        {"LAPWING_LIMITS__QUEUE_ITEMS": "8"},
        [],
        "limits.batch_items = 9",
        [
            "limits.queue_items, limits.batch_items: a batch of 9 items would never fit into a queue of 8",
            "(limits.queue_items from LAPWING_LIMITS__QUEUE_ITEMS, limits.batch_items from ",
        ],
    ),
    (
        {},
        ["--limits-queue-items", "100", "--tokens-file", "FILE"],
        "",
        ["limits.queue_items, limits.batch_items: a batch of 64 items would never be let in, since 50 of one client"],
    ),
    (
        {},
        ["--limits-queue-items-per-client", "9", "--tokens-file", "FILE"],
        "",
        ["limits.queue_items_per_client, limits.batch_items: a batch of 64 items would never be let in, since 9"],
    ),
    ({}, ["--limits-queue-items-per-client", "90"], "", ["limits.queue_items_per_client: it needs tokens_file or"]),
    (
        {},
        ["--limits-queue-items-per-client", "600", "--tokens-file", "FILE"],
        "",
        ["limits.queue_items_per_client, limits.queue_items: queue_items_per_client is 600, and queue_items, of all"],
    ),
    (
        {},
        ["--limits-streams-per-client", "25"],
        "",
        ["limits.streams_per_client, limits.generate_streams, limits.attention_streams: 25 streams of one client are"],
    ),
    (
        {},
        ["--limits-public-streams", "9", "--limits-public-streams-per-client", "10"],
        "",
        ["limits.public_streams_per_client, limits.public_streams: public_streams_per_client is 10, and public_"],
    ),
    (
        {},
        ["--limits-attention-bytes", str(2**31)],
        "",
        ["limits.attention_bytes, limits.attention_total_bytes: attention_bytes is 2147483648, and"],
    ),
    (
        {},
        ["--limits-attention-bytes-per-client", str(2**31)],
        "",
        ["limits.attention_bytes_per_client, limits.attention_total_bytes: attention_bytes_per_client is 2147483648"],
    ),
    (
        {},
        ["--limits-attention-bytes-per-client", "9"],
        "",
        ["limits.attention_bytes, limits.attention_bytes_per_client: attention_bytes is 536870912, and attention_byt"],
    ),
    ({}, [], "a = " + "[" * 50_000, ["lapwing.toml': it is nested too deeply"]),
]


@pytest.mark.parametrize(("variables", "arguments", "config", "words"), UNUSABLE, ids=lambda value: str(value)[:40])
def test_what_can_not_be_used_stops_the_start_by_name(
    variables: dict[str, str],
    arguments: list[str],
    config: str | None,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = a_file(tmp_path, "a.file")
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("FILE", file))
    given = [file if argument == "FILE" else argument for argument in arguments]
    from_file = ["--config", str(toml(tmp_path, config))] if config is not None else []
    assert main(["serve", *from_file, *given]) == 2
    said = capsys.readouterr()
    assert said.out == "", "it never listened"
    assert said.err.startswith("lapwing serve: the settings can't be used\n")
    assert [word for word in words if word not in said.err] == []
    assert "Traceback" not in said.err


def test_all_that_is_wrong_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}NONSENSE", "1")
    with pytest.raises(UnusableSettings) as caught:
        read({"port": "many", "grace": "-1"})
    assert [line.split()[0].strip(":") for line in str(caught.value).splitlines()] == [
        f"{PREFIX}NONSENSE",
        "port",
        "grace",
    ]


def test_a_file_that_can_not_be_read_hides_no_unknown_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}NONSENSE", "1")
    with pytest.raises(UnusableSettings, match=rf"{PREFIX}NONSENSE: (?s:.*)config is '/no/such': it can't be read"):
        read({}, Path("/no/such"))


@pytest.mark.parametrize("milliseconds", [1, 2**31 - 1 - 647])
def test_grpc_takes_every_keepalive_that_is_allowed(milliseconds: int) -> None:
    settings = Settings(port=0, keepalive=milliseconds / 1000, keepalive_timeout=milliseconds / 1000)
    assert dict(settings.options)["grpc.keepalive_time_ms"] == milliseconds
    assert start_and_stop(settings)


@pytest.mark.parametrize(
    ("metrics_host", "host", "allowed"),
    [
        ("127.0.0.1", "127.0.0.1", False),
        ("127.0.0.1", "localhost", False),
        ("127.0.0.1", "0.0.0.0", False),  # noqa: S104
        ("::1", "::", False),
        ("127.0.0.2", "127.0.0.1", True),
        ("127.0.0.1", PUBLIC_ADDRESS, True),
    ],
)
def test_one_port_may_serve_two_addresses(metrics_host: str, host: str, allowed: bool) -> None:
    """Both may be 0 always."""
    given = {"host": host, "metrics_host": metrics_host, "insecure": not is_loopback(host)}
    assert Settings(port=0, metrics_port=0, **given)
    with nullcontext() if allowed else pytest.raises(ValidationError, match="are both 7: give two"):
        Settings(port=7, metrics_port=7, **given)


@pytest.mark.parametrize("word", ["metrics_insecure", "insecure"])
def test_others_may_reach_the_metrics_if_that_is_said(word: str) -> None:
    assert Settings(metrics_port=0, metrics_host=PUBLIC_ADDRESS, **{word: True})


def test_an_unknown_flag_is_told_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--prot", "1"]) == 2
    assert "--prot" in capsys.readouterr().err


# Secrets.

PEM = f"-----BEGIN PRIVATE KEY-----\n{CANARY}\n-----END PRIVATE KEY-----"
LEAKS = [
    ({"LAPWING_TLS_KEY": PEM}, ""),
    ({"LAPWING_TLS_CERT": PEM}, ""),
    ({"LAPWING_TLS_CLIENT_CA": PEM}, ""),
    ({"LAPWING_TOKENS_FILE": CANARY}, ""),
    ({f"{PREFIX}PASSWORD": CANARY}, ""),
    ({}, f'api_token = "{CANARY}"'),
    ({}, f'[limits]\nbatch_items = 3\nsecret = "{CANARY}"'),
    ({}, f'tls_key = """{PEM}"""'),
    ({}, f'tokens_file = "{CANARY * 300}"'),
    ({}, f"port = 1\ntokens_file = {CANARY}"),
]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["serve", *arguments]) == 2
    said = capsys.readouterr()
    return said.out + said.err


@pytest.mark.parametrize(("variables", "config"), LEAKS, ids=str)
def test_a_refusal_shows_no_secret(
    variables: dict[str, str],
    config: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert CANARY not in refusal(["--config", str(toml(tmp_path, config))], capsys)


def test_control_what_is_no_secret_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert CANARY in refusal(["--host", CANARY], capsys)
