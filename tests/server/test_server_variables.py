"""Variables of the environment: which are settings, which are meant for others, and what Kubernetes puts there."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from lapwing_server.setting_names import PREFIX, settable, variable
from lapwing_server.setting_sources import UnusableSettings, read
from lapwing_server.settings import Settings
from lapwing_server.variables import CONFIG, OTHERS

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith(PREFIX):
            monkeypatch.delenv(name)


def test_every_variable_in_this_repository_is_known() -> None:
    """Else a server started beside it would be stopped by it."""
    known = {variable(name) for name in settable(Settings)} | {variable("limits")} | OTHERS | {CONFIG}
    files = [
        path
        for room in ("client", "detector", "training", "server", "tests", "benchmarks")
        for path in ROOT.glob(f"{room}/**/*.py")
    ]
    found = {
        name
        for path in [*files, ROOT / "Makefile"]
        for name in re.findall(r"\bLAPWING_[A-Z_]*[A-Z]\b", path.read_text())
    }
    unheard_of = {f"{PREFIX}PROT", f"{PREFIX}LIMITS__BATCHES"}  # of the tests of settings
    assert found - known == unheard_of


@pytest.mark.parametrize("name", ["REGISTRY", "SOAK", "TOKEN"])
def test_variables_of_others_are_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + name, "something")
    assert read({}).settings == Settings()


def test_what_a_variable_of_all_limits_breaks_does_not_hide_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}LIMITS", "3,")
    monkeypatch.setenv(variable("limits.messages"), "none")
    monkeypatch.setenv(variable("port"), "many")
    monkeypatch.setenv(f"{PREFIX}NONSENSE", "1")
    with pytest.raises(UnusableSettings) as caught:
        read({"grace": "-1"})
    assert [line.split()[0].strip(":") for line in str(caught.value).splitlines()] == [
        f"{PREFIX}NONSENSE",
        "limits",
        "port",
        "grace",
        "limits.messages",
    ]


# Kubernetes.


def service_links(service: str, port: int) -> dict[str, str]:
    """What a pod finds in its environment of a Service, for one port with a name."""
    own = f"{service}_PORT_{port}_TCP"
    return {
        f"{service}_SERVICE_HOST": "10.0.0.1",
        f"{service}_SERVICE_PORT": str(port),
        f"{service}_SERVICE_PORT_GRPC_TLS": str(port),
        f"{service}_PORT": f"tcp://10.0.0.1:{port}",
        own: f"tcp://10.0.0.1:{port}",
        f"{own}_PROTO": "tcp",
        f"{own}_PORT": str(port),
        f"{own}_ADDR": "10.0.0.1",
    }


@pytest.mark.parametrize("service", ["", "METRICS_", "SERVER_", "A_B_"])
def test_a_service_of_our_name_stops_no_start(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    links = service_links((PREFIX + service).rstrip("_"), 50051)
    for name, value in links.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(variable("grace"), "7")
    found = read({})
    assert found.settings == Settings(grace=7)
    assert set(found.ignored) == set(links)
    said = list(found.lines())
    assert [name for name in links if name not in said[-1]] == []
    assert "enableServiceLinks" in said[-1]
    assert read({"port": "1", "metrics_port": "2"}).origins == {
        "grace": variable("grace"),
        "port": "--port",
        "metrics_port": "--metrics-port",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [("PORT", "tcp"), ("METRICS_PORT", "10.0.0.1:7"), ("SERVICE", "x"), ("PORT_50051", "x"), ("TARGET", "tcp://x")],
)
def test_control_what_kubernetes_does_not_say_stops_it(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(UnusableSettings):
        read({})


def test_without_a_service_the_log_says_nothing_of_one() -> None:
    assert "Kubernetes" not in "".join(read({}).lines())
