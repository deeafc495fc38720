"""Settings that exclude each other: all are told at once, and none because of what can't be used."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from test_server_settings import PUBLIC_ADDRESS, a_file, toml
from test_server_settings import bare_environment as bare_environment

from lapwing_server.limits import Limits
from lapwing_server.setting_names import PREFIX
from lapwing_server.setting_sources import UnusableSettings, read
from lapwing_server.settings import Settings


def told_of(flags: dict[str, str], config: Path | None = None) -> list[str]:
    """What each line is about."""
    with pytest.raises(UnusableSettings) as caught:
        read(flags, config)
    return [line.split(": ")[0].split(" ")[0].strip(",") for line in str(caught.value).splitlines()]


def test_all_contradictions_are_told_at_once_beside_all_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}NONSENSE", "1")
    config = toml(tmp_path, 'prot = 1\nmodel = "m"\n[limits]\nqueue_items = 8\nbatch_item = 3')
    flags = {"grace": "-1", "burst": "3", "host": PUBLIC_ADDRESS}
    contradictory = ["host", "model", "burst", "limits.queue_items"]
    assert told_of(flags, config) == [
        f"{PREFIX}NONSENSE", "grace", "limits.batch_item", "prot", *contradictory
    ]  # fmt: skip
    with pytest.raises(ValidationError) as caught:
        Settings(host=PUBLIC_ADDRESS, model="m", burst=3, limits=Limits(queue_items=8))
    said = ("others can reach", "--model needs", "burst needs", "a batch of 64 items")
    assert [word for word in said if word not in str(caught.value)] == []


UNUSABLE_MENDS = [
    ({"host": PUBLIC_ADDRESS}, "insecure", "perhaps", "host"),
    ({"host": PUBLIC_ADDRESS, "tls_key": "FILE"}, "tls_cert", "/no/such", "host"),
    ({"metrics_port": "50051"}, "port", "many", "metrics_port"),
    ({"model": "m"}, "probes", "/no/such", "model"),
    ({"limits.batch_items": "600"}, "limits.queue_items", "many", "limits.queue_items"),
    ({"limits.queue_items_per_client": "90"}, "tokens_file", "/no/such", "limits.queue_items_per_client"),
]


@pytest.mark.parametrize(("flags", "unusable", "value", "told"), UNUSABLE_MENDS, ids=lambda one: str(one)[:30])
def test_nothing_is_said_to_contradict_what_can_not_be_used(
    flags: dict[str, str], unusable: str, value: str, told: str, tmp_path: Path
) -> None:
    """Its default would contradict, but nobody gave that. Control: without it, the default does."""
    flags = {name: a_file(tmp_path, "file") if given == "FILE" else given for name, given in flags.items()}
    assert told_of(flags | {unusable: value}) == [unusable]
    assert told in told_of(flags)


def test_a_smaller_bound_for_all_needs_no_smaller_one_for_each() -> None:
    limits = read({"limits.generate_streams": "1", "limits.public_streams": "9"}).settings.limits
    assert (limits.for_many().streams_of_one, limits.public_streams_per_client) == (1, 100)
