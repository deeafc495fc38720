"""ReloadProbes: what is sound takes over; what is not leaves what served before, and says why."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from probe_registries import Caller, a_registry, a_revision, calling, damaged, foreign, publish, scored_by
from service_fakes import Gate, Running, a_shelf, refused, wait_until

from lapwing.v1 import detector_pb2, probes_pb2
from lapwing_detector.errors import ProbeCorrupt, RegistryError
from lapwing_detector.probe import Probe
from lapwing_detector.registry import Registry
from lapwing_server.shelving import shelve
from tests.detector.registries import resign, write_probe

ALPHA = [a_revision(number) for number in range(4)]
BETA = [a_revision(number, "beta") for number in range(2)]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """One revision of alpha, which is active, and one of beta."""
    return a_registry(tmp_path / "registry", ALPHA[0], BETA[0])


@pytest.fixture
def caller(registry: Registry) -> Iterator[Caller]:
    with calling(registry.root) as caller:
        yield caller


# What a registry says.


def test_a_server_shows_what_its_registry_says(registry: Registry, caller: Caller) -> None:
    assert caller.scores() == caller.scores("alpha") == scored_by(ALPHA[0])
    assert caller.scores("beta") == scored_by(BETA[0])
    publish(registry, ALPHA[1], BETA[1])
    registry.shadow("beta")
    assert list(caller.get("alpha").revisions) == [ALPHA[0].revision], "only a reload looks again"
    shown = caller.reload()
    assert {name: (probe.state, probe.revision, list(probe.revisions)) for name, probe in shown.items()} == {
        "alpha": (probes_pb2.PROBE_STATE_ACTIVE, ALPHA[0].revision, [ALPHA[1].revision, ALPHA[0].revision]),
        "beta": (probes_pb2.PROBE_STATE_SHADOW, BETA[1].revision, [BETA[1].revision, BETA[0].revision]),
    }
    assert caller.get() == shown["alpha"]
    assert list(caller.probes.ListProbes(probes_pb2.ListProbesRequest()).probes) == list(shown.values())


def test_a_reload_takes_over_what_the_registry_says(registry: Registry, caller: Caller) -> None:
    publish(registry, ALPHA[1], activate=True)
    assert caller.scores() == scored_by(ALPHA[0])
    assert caller.reload()["alpha"].revision == ALPHA[1].revision
    assert caller.scores() == scored_by(ALPHA[1])
    registry.activate("beta")
    caller.reload()
    assert caller.scores() == scored_by(BETA[0])
    registry.rollback()
    registry.rollback()
    caller.reload()
    assert caller.scores() == scored_by(ALPHA[0])
    info = caller.detector.GetServerInfo(detector_pb2.GetServerInfoRequest())
    assert (info.probe_name, info.probe_revision) == scored_by(ALPHA[0])[:2]


def test_a_heatmap_names_the_revision_that_it_shows(registry: Registry, caller: Caller) -> None:
    publish(registry, ALPHA[1], activate=True)
    caller.reload()
    shown = caller.probes.GetHeatmap(probes_pb2.GetHeatmapRequest(statistic="STATISTIC_WEIGHT"))
    assert (shown.probe_name, shown.probe_revision) == (ALPHA[1].name, ALPHA[1].revision)


def test_a_shadow_revision_of_the_active_name_scores_unseen(registry: Registry, caller: Caller) -> None:
    publish(registry, ALPHA[1])
    registry.shadow("alpha", ALPHA[1].revision)
    assert caller.reload()["alpha"].state == probes_pb2.PROBE_STATE_ACTIVE
    [shadow] = caller.server.server.readiness.loaded.shelf.shadows
    assert shadow.revision == ALPHA[1].revision
    assert caller.scores() == scored_by(ALPHA[0])
    counted = caller.server.server.metrics.registry.get_sample_value
    wait_until(lambda: counted("lapwing_score_probability_count", {"role": "shadow", "probe": "alpha"}) == 1.0)
    caller.activate(ALPHA[1])
    assert caller.server.server.readiness.loaded.shelf.shadows == ()


# What fails its checks.


def too_new(registry: Registry, probe: Probe) -> None:
    resign(registry.root / probe.name / probe.revision, schema_version=99)


def missing(registry: Registry, probe: Probe) -> None:
    shutil.rmtree(registry.root / probe.name / probe.revision)


def led_out(registry: Registry, probe: Probe) -> None:
    place = registry.root / probe.name / probe.revision
    outside = registry.root.parent / "outside"
    shutil.move(place, outside)
    place.symlink_to(outside)


BREAK: list[tuple[Callable[[Registry, Probe], None], str]] = [
    (damaged, "sha256 differs"),
    (too_new, "not what was published"),
    (missing, "is missing"),
    (led_out, "leads elsewhere"),
]


@pytest.mark.parametrize(("spoil", "said"), BREAK, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_revision_never_serves_and_the_previous_one_stays(
    registry: Registry, caller: Caller, spoil: Callable[[Registry, Probe], None], said: str
) -> None:
    publish(registry, ALPHA[1], activate=True)
    spoil(registry, ALPHA[1])
    shown = caller.reload()["alpha"]
    assert (shown.state, shown.revision) == (probes_pb2.PROBE_STATE_ACTIVE, ALPHA[0].revision)
    [rejected] = shown.rejected_revisions
    assert rejected.revision == ALPHA[1].revision
    assert said in rejected.message
    assert caller.get("alpha") == shown
    assert caller.scores() == caller.scores("alpha") == scored_by(ALPHA[0])
    assert caller.rejections == 1
    # Control: the same revision, whole again, serves.
    shutil.rmtree(registry.root / "alpha" / ALPHA[1].revision, ignore_errors=True)
    if (registry.root / "alpha" / ALPHA[1].revision).is_symlink():
        (registry.root / "alpha" / ALPHA[1].revision).unlink()
    publish(registry, ALPHA[1])
    shown = caller.reload()["alpha"]
    assert (shown.revision, list(shown.rejected_revisions)) == (ALPHA[1].revision, [])
    assert caller.scores() == scored_by(ALPHA[1])


def test_a_probe_of_another_model_never_serves(registry: Registry, caller: Caller) -> None:
    publish(registry, foreign(1), activate=True)
    shown = caller.reload()["alpha"]
    assert shown.revision == ALPHA[0].revision
    assert "was fitted on other-model with tokenizer" in shown.rejected_revisions[0].message
    assert caller.scores() == scored_by(ALPHA[0])
    error = caller.refused("alpha", foreign(1).revision)
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PROBE_MISMATCH")
    assert "lapwing extract" in error.message


def test_where_another_name_should_take_over_and_is_broken_the_active_one_stays(
    registry: Registry, caller: Caller
) -> None:
    publish(registry, BETA[1], activate=True)
    damaged(registry, BETA[1])
    shown = caller.reload()
    assert (shown["alpha"].state, shown["beta"].state) == (
        probes_pb2.PROBE_STATE_ACTIVE,
        probes_pb2.PROBE_STATE_LOADED,
    )
    assert shown["beta"].revision == BETA[0].revision, "it was loaded before"
    assert caller.scores() == scored_by(ALPHA[0])
    assert caller.scores("beta") == scored_by(BETA[0])


def test_the_active_probe_that_stays_keeps_its_revision_and_is_no_shadow_of_itself(
    registry: Registry, caller: Caller
) -> None:
    registry.activate("beta")
    registry.shadow("alpha", ALPHA[0].revision)
    publish(registry, ALPHA[1])
    missing(registry, BETA[0])
    shown = caller.reload()
    assert registry.current().revisions["alpha"] == ALPHA[1].revision
    assert shown["alpha"].revision == ALPHA[0].revision
    assert caller.scores() == caller.scores("alpha") == scored_by(ALPHA[0])
    assert caller.server.server.readiness.loaded.shelf.shadows == ()
    publish(registry, BETA[0])
    caller.reload()
    assert caller.scores("alpha") == scored_by(ALPHA[1])
    [shadow] = caller.server.server.readiness.loaded.shelf.shadows
    assert shadow.revision == ALPHA[0].revision


def test_a_broken_name_that_was_never_loaded_is_rejected_and_says_why(registry: Registry, caller: Caller) -> None:
    gamma = a_revision(0, "gamma")
    publish(registry, gamma)
    damaged(registry, gamma)
    shown = caller.reload()["gamma"]
    assert shown.state == probes_pb2.PROBE_STATE_REJECTED
    assert "sha256 differs" in shown.state_message
    assert [one.revision for one in shown.rejected_revisions] == list(shown.revisions) == [gamma.revision]
    request = detector_pb2.ScoreRequest(probe="gamma")
    request.prompt.text, request.response.text = "hello", "world"
    error = refused(caller.detector.Score, request)
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PROBE_REJECTED")


def test_a_broken_shadow_ceases_and_says_why(registry: Registry, caller: Caller) -> None:
    publish(registry, ALPHA[1])
    registry.shadow("alpha", ALPHA[1].revision)
    caller.reload()
    damaged(registry, ALPHA[1])
    shown = caller.reload()["alpha"]
    assert (shown.revision, shown.rejected_revisions[0].revision) == (ALPHA[0].revision, ALPHA[1].revision)
    assert caller.server.server.readiness.loaded.shelf.shadows == ()


def test_what_was_never_published_is_rejected_and_says_what_to_do(registry: Registry, caller: Caller) -> None:
    assert not caller.reload()["alpha"].rejected_revisions, "control"
    orphan = write_probe(registry.root / "alpha" / ALPHA[1].revision, ALPHA[1])
    shutil.copytree(orphan, registry.root / "gamma" / ALPHA[2].revision)
    shown = caller.reload()
    assert (shown["alpha"].state, shown["alpha"].revision) == (probes_pb2.PROBE_STATE_ACTIVE, ALPHA[0].revision)
    assert list(shown["alpha"].revisions) == [ALPHA[0].revision]
    [rejected] = caller.get("alpha").rejected_revisions
    assert rejected.revision == ALPHA[1].revision
    assert f"finish it: lapwing probes publish {orphan}" in rejected.message
    assert shown["gamma"].state == probes_pb2.PROBE_STATE_REJECTED
    assert f"it holds alpha@{ALPHA[1].revision}, which belongs elsewhere" in shown["gamma"].state_message
    assert caller.refused("gamma").reason == "UNKNOWN_PROBE"
    registry.publish(orphan)
    assert not caller.reload()["alpha"].rejected_revisions


def test_a_folder_that_can_not_be_listed_stops_nobody(
    registry: Registry, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of somebody else's, in the registry; root may list every one, so that the refusal is played."""
    publish(registry, ALPHA[1], activate=True)
    asked, there = [], Path.iterdir

    def listing(path: Path) -> Iterator[Path]:
        if path == registry.root / "beta":
            asked.append(path)
            raise PermissionError
        return there(path)

    monkeypatch.setattr(Path, "iterdir", listing)
    assert caller.reload()["alpha"].revision == ALPHA[1].revision
    assert asked, "control: it was looked into"
    assert caller.scores("beta") == scored_by(BETA[0])


def test_a_name_that_the_registry_forgot_does_not_serve(registry: Registry, caller: Caller) -> None:
    assert caller.scores("beta") == scored_by(BETA[0])
    (registry.root / "CURRENT").unlink()
    registry.publish(registry.root / "alpha" / ALPHA[0].revision)
    shown = caller.reload()["beta"]
    assert shown.state == probes_pb2.PROBE_STATE_REJECTED
    assert "so it never scores" in shown.state_message


def test_a_registry_that_can_not_be_read_changes_nothing(registry: Registry, caller: Caller) -> None:
    publish(registry, ALPHA[1], activate=True)
    whole = (registry.root / "CURRENT").read_bytes()
    (registry.root / "CURRENT").write_bytes(whole[:-40])
    error = refused(caller.probes.ReloadProbes, probes_pb2.ReloadProbesRequest())
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "REGISTRY_FAILED")
    assert "is damaged" in error.message
    assert caller.refused("alpha").reason == "REGISTRY_FAILED"
    assert caller.scores() == scored_by(ALPHA[0])
    (registry.root / "CURRENT").write_bytes(whole)
    caller.reload()
    assert caller.scores() == scored_by(ALPHA[1])


def test_at_the_start_a_foreign_probe_is_left_out_and_a_foreign_active_one_stops_the_loading(tmp_path: Path) -> None:
    registry = a_registry(tmp_path / "registry", ALPHA[0], foreign(0, "beta"))
    with calling(registry.root) as caller:
        shown = caller.get("beta")
        assert shown.state == probes_pb2.PROBE_STATE_REJECTED
        assert "was fitted on other-model" in shown.state_message
        assert caller.scores() == scored_by(ALPHA[0])
        assert caller.rejections == 1
    registry.activate("beta")
    with calling(registry.root) as caller:
        info = caller.detector.GetServerInfo(detector_pb2.GetServerInfoRequest())
        assert info.state == detector_pb2.SERVER_STATE_FAILED
        assert "was fitted on other-model" in info.message
        assert "lapwing probes rollback" in info.message
    registry.rollback()
    with calling(registry.root) as caller:
        assert caller.scores() == scored_by(ALPHA[0]), "control"


def test_what_a_registry_does_not_say_stops_the_loading(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="says itself that alpha scores; leave --probe beta out"):
        shelve(registry.root, "beta")
    assert shelve(registry.root, "alpha").active.revision == ALPHA[0].revision
    damaged(registry, ALPHA[0])
    with pytest.raises(ProbeCorrupt, match=r"no sound probe named 'alpha'.*lapwing probes rollback"):
        shelve(registry.root)
    (registry.root / "CURRENT").unlink()
    with pytest.raises(RegistryError, match="is an empty registry; publish a probe"):
        shelve(registry.root)


# Without a registry.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for probe in (ALPHA[0], BETA[0]):
        write_probe(tmp_path / "probes" / probe.name, probe)
    return tmp_path / "probes"


def test_in_a_directory_of_probes_what_is_activated_is_kept_in_memory(folder: Path) -> None:
    with calling(folder) as caller:
        assert list(caller.get("alpha").revisions) == [ALPHA[0].revision]
        done = caller.activate(BETA[0])
        assert (done.previous_name, done.previous_revision) == scored_by(ALPHA[0])[:2]
        assert caller.reload()["beta"].state == probes_pb2.PROBE_STATE_ACTIVE
        assert caller.scores() == scored_by(BETA[0])
        error = caller.refused("alpha", "0" * 12)
        assert (error.reason, error.field) == ("UNKNOWN_REVISION", "revision")
        assert caller.refused("gamma").reason == "UNKNOWN_PROBE"
    with calling(folder) as restarted:
        assert restarted.scores() == scored_by(ALPHA[0]), "control"


def test_in_a_directory_of_probes_a_reload_finds_what_came_changed_and_went(folder: Path) -> None:
    with calling(folder) as caller:
        write_probe(folder / "alpha", ALPHA[1])
        write_probe(folder / "gamma", a_revision(0, "gamma"))
        shutil.rmtree(folder / "beta")
        assert sorted(caller.reload()) == ["alpha", "gamma"]
        assert caller.scores() == scored_by(ALPHA[1])
        (folder / "alpha" / "README.md").write_text("not what was saved")
        shown = caller.reload()["alpha"]
        assert (shown.state, shown.revision) == (probes_pb2.PROBE_STATE_ACTIVE, ALPHA[1].revision)
        assert "README.md is not the file" in shown.rejected_revisions[0].message
        shutil.rmtree(folder / "alpha")
        shown = caller.reload()["alpha"]
        assert (shown.state, shown.revision) == (probes_pb2.PROBE_STATE_ACTIVE, ALPHA[1].revision)
        assert "does not hold it any more" in shown.rejected_revisions[0].message
        write_probe(folder / "beta", foreign(0, "beta"))
        assert caller.reload()["beta"].state == probes_pb2.PROBE_STATE_REJECTED
        assert caller.refused("beta").reason == "PROBE_CORRUPT"
        assert len(caller.get("beta").rejected_revisions) == 1
        assert caller.scores() == scored_by(ALPHA[1])


def test_probes_that_came_from_nowhere_stay_as_they_are() -> None:
    with Running(shelf=a_shelf("alpha", "beta")) as server, grpc.insecure_channel(server.target) as channel:
        caller = Caller(server, channel)
        assert sorted(caller.reload()) == ["alpha", "beta"]
        assert server.server.readiness.loaded.shelf.active.name == "alpha"


def test_nothing_is_changed_before_anything_was_loaded(registry: Registry) -> None:
    gate = Gate()

    def load() -> Any:
        gate()
        raise ProbeCorrupt("it is none")

    with Running(load=load, ready=False) as server, grpc.insecure_channel(server.target) as channel:
        caller = Caller(server, channel)
        error = refused(caller.probes.ReloadProbes, probes_pb2.ReloadProbesRequest())
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_LOADING")
        assert caller.refused("alpha").reason == "SERVER_LOADING"
        gate.open()
