"""What a registry keeps, what is in force, and how one goes back."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from lapwing_detector import registry_lock
from lapwing_detector.errors import ProbeMismatch, RegistryError, UnknownProbe
from lapwing_detector.probe import Probe
from lapwing_detector.registry import Registry
from lapwing_detector.registry_current import MOST_HISTORY, MOST_SHADOWS, Current, current_of
from tests.detector.registries import a_revision, sources, write_probe

REVISIONS = [a_revision(number).revision for number in range(5)]
BETA = a_revision(0, "beta").revision


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return sources(tmp_path_factory.mktemp("saved"), 5)


@pytest.fixture(scope="module")
def beta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources(tmp_path_factory.mktemp("saved"), 1, "beta")[0]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def test_what_is_published_comes_back_byte_for_byte(registry: Registry, saved: list[Path]) -> None:
    done = registry.publish(saved[0])
    assert (done.name, done.revision, done.new) == ("alpha", REVISIONS[0], True)
    place = registry.root / "alpha" / REVISIONS[0]
    assert {path.name: path.read_bytes() for path in place.iterdir()} == {
        path.name: path.read_bytes() for path in saved[0].iterdir()
    }
    assert registry.load("alpha").revision == Probe.from_pretrained(saved[0]).revision
    assert sorted(path.name for path in registry.root.iterdir()) == [".lock", "CURRENT", "alpha"]
    assert place.stat().st_mode & 0o777 == 0o755
    assert (registry.root / "CURRENT").stat().st_mode & 0o777 == 0o644


def test_only_the_files_of_the_probe_are_copied(registry: Registry, saved: list[Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(saved[0], tmp_path / "source"))
    (source / "notes.txt").write_text("mine")
    registry.publish(source)
    assert not (registry.root / "alpha" / REVISIONS[0] / "notes.txt").exists()


def test_the_same_revision_again_changes_nothing(registry: Registry, saved: list[Path], tmp_path: Path) -> None:
    registry.publish(saved[0])
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in registry.root.rglob("*")}
    assert not registry.publish(saved[0]).new
    again = write_probe(tmp_path / "again", replace(a_revision(0), metrics={"auroc": 0.1}))
    assert not registry.publish(again, activate=True).new, "its metrics do not make another revision"
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in registry.root.rglob("*")} == before
    assert registry.load("alpha").metrics == a_revision(0).metrics


def test_the_first_probe_scores_and_the_active_name_changes_only_when_told(
    registry: Registry, saved: list[Path], beta: Path
) -> None:
    assert registry.publish(saved[0]).current.active == "alpha"
    registry.publish(saved[1])
    registry.publish(beta)
    current = registry.current()
    assert current.active == "alpha"
    assert current.revisions == {"alpha": REVISIONS[0], "beta": BETA}
    assert current.newest_first("alpha") == (REVISIONS[1], REVISIONS[0])
    assert registry.publish(saved[2], activate=True).current.revisions["alpha"] == REVISIONS[2]


def test_a_name_that_is_not_active_stands_for_what_was_published_last(
    registry: Registry, saved: list[Path], beta: Path
) -> None:
    registry.publish(beta)
    for number in range(2):
        registry.publish(saved[number])
        assert registry.current().revisions["alpha"] == REVISIONS[number]
    registry.publish(saved[0])
    assert registry.current().revisions["alpha"] == REVISIONS[1], "publishing again is not going back"
    assert registry.current().active == "beta"


def test_rolling_back_goes_step_by_step(registry: Registry, saved: list[Path]) -> None:
    for source in saved[:3]:
        registry.publish(source, activate=True)
    assert registry.rollback().revisions["alpha"] == REVISIONS[1]
    assert registry.rollback("alpha").revisions["alpha"] == REVISIONS[0]
    with pytest.raises(RegistryError, match=r"the first revision it had.*lapwing probes activate alpha@"):
        registry.rollback()
    registry.activate("alpha", REVISIONS[2])
    assert registry.rollback().revisions["alpha"] == REVISIONS[0]


def test_rolling_back_after_another_name_was_activated_brings_the_first_back(
    registry: Registry, saved: list[Path], beta: Path
) -> None:
    registry.publish(saved[0])
    registry.publish(saved[1], activate=True)
    registry.publish(beta, activate=True)
    back = registry.rollback()
    assert (back.active, back.revisions["alpha"]) == ("alpha", REVISIONS[1])
    back = registry.rollback()
    assert (back.active, back.revisions["alpha"]) == ("alpha", REVISIONS[0])


def test_activating_what_is_active_forgets_nothing(registry: Registry, saved: list[Path], beta: Path) -> None:
    registry.publish(saved[0])
    registry.publish(beta, activate=True)
    registry.activate("beta")
    assert registry.rollback().active == "alpha"


def test_a_probe_that_the_caller_refuses_is_not_activated(registry: Registry, saved: list[Path]) -> None:
    registry.publish(saved[0])
    registry.publish(saved[1])

    def refuse(probe: Probe) -> None:
        raise ProbeMismatch(f"{probe.bias} is of another model")

    with pytest.raises(ProbeMismatch, match=r"1\.0 is of another model"):
        registry.activate("alpha", REVISIONS[1], require=refuse)
    assert registry.current().revisions["alpha"] == REVISIONS[0]
    assert registry.activate("alpha", REVISIONS[1], require=lambda probe: None).bias == 1.0


@pytest.mark.parametrize(
    ("name", "revision", "field", "known"),
    [
        ("gamma", None, "name", ("alpha",)),
        ("../registry/alpha", None, "name", ("alpha",)),
        ("alpha", "0" * 12, "revision", (REVISIONS[0],)),
        ("alpha", f"../alpha/{REVISIONS[0]}", "revision", (REVISIONS[0],)),
    ],
)
def test_what_was_not_published_is_not_known(
    registry: Registry, saved: list[Path], name: str, revision: str | None, field: str, known: tuple[str, ...]
) -> None:
    registry.publish(saved[0])
    for ask in (registry.load, registry.activate, registry.shadow):
        with pytest.raises(UnknownProbe, match="known are") as caught:
            ask(name, revision)
        assert (caught.value.field, caught.value.known) == (field, known)


def test_shadows(registry: Registry, saved: list[Path], beta: Path) -> None:
    registry.publish(saved[0])
    registry.publish(saved[1])
    registry.publish(beta)
    registry.shadow("beta")
    current = registry.shadow("alpha", REVISIONS[1])
    assert current.shadow_references == (("beta", BETA), ("alpha", REVISIONS[1]))
    for refused in (("alpha", None), ("alpha", REVISIONS[0])):
        with pytest.raises(RegistryError, match="is the active probe"):
            registry.shadow(*refused)
    registry.activate("alpha", REVISIONS[1])
    assert registry.current().shadows == ("beta",), "it has become the active one"
    registry.shadow("beta", on=False)
    assert registry.current().shadows == ()
    with pytest.raises(UnknownProbe, match="is no shadow; known are none"):
        registry.shadow("beta", on=False)


def test_a_shadow_by_name_follows_its_name(registry: Registry, saved: list[Path], beta: Path) -> None:
    registry.publish(beta)
    registry.publish(saved[0])
    registry.shadow("alpha")
    registry.publish(saved[1])
    assert registry.current().shadow_references == (("alpha", REVISIONS[1]),)


def test_there_are_not_more_shadows_and_steps_back_than_are_kept() -> None:
    current = Current()
    for number in range(MOST_HISTORY + 20):
        current = current.with_published("alpha", f"{number:012x}", "0" * 64, activate=True)
    assert len(current.history["alpha"]) == MOST_HISTORY
    for number in range(MOST_SHADOWS):
        current = current.with_shadow("alpha", f"{number:012x}")
    with pytest.raises(RegistryError, match="the most; end one"):
        current.with_shadow("alpha", f"{50:012x}")
    assert current_of(current.to_bytes()) == current


def test_every_published_revision_is_verified(registry: Registry, saved: list[Path], beta: Path) -> None:
    for source in (*saved[:2], beta):
        registry.publish(source)
    assert [(one.name, one.revision, one.reason) for one in registry.verify()] == [
        ("alpha", REVISIONS[0], ""),
        ("alpha", REVISIONS[1], ""),
        ("beta", BETA, ""),
    ]
    (registry.root / "alpha" / REVISIONS[0] / "README.md").unlink()
    assert [bool(one.reason) for one in registry.verify()] == [True, False, False]


def test_a_revision_whose_publisher_was_killed_at_the_last_moment_is_taken_over(
    registry: Registry, saved: list[Path]
) -> None:
    registry.publish(saved[0])
    place = registry.root / "alpha" / REVISIONS[1]
    shutil.copytree(saved[1], place)
    with pytest.raises(UnknownProbe):
        registry.load("alpha", REVISIONS[1])
    inode = place.stat().st_ino
    assert registry.publish(saved[1]).new
    assert place.stat().st_ino == inode
    assert registry.load("alpha", REVISIONS[1]).bias == 1.0


def test_a_damaged_revision_is_published_again_once_it_was_removed(
    registry: Registry, saved: list[Path], tmp_path: Path
) -> None:
    registry.publish(saved[0])
    shutil.rmtree(registry.root / "alpha" / REVISIONS[0])
    other = write_probe(tmp_path / "other", replace(a_revision(0), metrics={"auroc": 0.1}))
    assert not registry.publish(other).new
    assert registry.load("alpha").metrics == {"auroc": 0.1}


def test_a_lost_CURRENT_is_made_again_of_what_is_there(registry: Registry, saved: list[Path]) -> None:  # noqa: N802
    for source in saved[:2]:
        registry.publish(source)
    (registry.root / "CURRENT").unlink()
    assert registry.current() == Current()
    for source in saved[:2]:
        registry.publish(source)
    assert registry.load("alpha", REVISIONS[1]).bias == 1.0


def test_publishers_in_several_threads_lose_nothing(registry: Registry, saved: list[Path]) -> None:
    threads = [threading.Thread(target=registry.publish, args=(source,)) for source in saved]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(registry.current().published["alpha"]) == set(REVISIONS)
    assert not any(one.reason for one in registry.verify())


def test_who_waits_too_long_for_another_writer_is_told(
    registry: Registry, saved: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.publish(saved[0])
    monkeypatch.setattr(registry_lock, "PATIENCE", 0.0)
    (registry.root / ".tmp-of-the-other").mkdir()
    with (registry.root / ".lock").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RegistryError, match="another process has been changing"):
            registry.publish(saved[1])
        assert (registry.root / ".tmp-of-the-other").exists(), "it is still at work"
        assert registry.load("alpha").bias == 0.0, "reading takes no lock"
    registry.publish(saved[1])
    assert not (registry.root / ".tmp-of-the-other").exists()


def test_a_failure_while_publishing_leaves_nothing(
    registry: Registry, saved: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.publish(saved[0])
    before = sorted(registry.root.rglob("*"))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            registry.publish(saved[1])
    assert sorted(registry.root.rglob("*")) == before
    registry.publish(saved[1])


def test_every_file_is_on_the_disk_before_its_name_is_and_its_name_before_the_next_step(
    registry: Registry, saved: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.publish(saved[0])
    steps: list[tuple[str, str]] = []
    real = {"fsync": os.fsync, "rename": os.rename, "replace": os.replace}

    def shown(path: object) -> str:
        inside = str(Path(os.fspath(path)).relative_to(registry.root))  # type: ignore[call-overload]
        return "/".join("TMP" if part.startswith(".tmp-") else part for part in inside.split("/"))

    def fsync(descriptor: int) -> None:
        steps.append(("fsync", shown(os.readlink(f"/proc/self/fd/{descriptor}"))))
        real["fsync"](descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(
            os,
            name,
            lambda source, target, name=name: (steps.append((name, shown(target))), real[name](source, target)),
        )
    registry.publish(saved[1], activate=True)
    files = [step for step in steps if step[1].startswith("TMP/")]
    place = f"alpha/{REVISIONS[1]}"
    assert sorted(name.removeprefix("TMP/") for _, name in files) == sorted(path.name for path in saved[1].iterdir())
    assert steps[len(files) :] == [
        ("fsync", "TMP"),
        ("fsync", "."),
        ("rename", place),
        ("fsync", "alpha"),
        ("fsync", "TMP"),
        ("replace", "CURRENT"),
        ("fsync", "."),
    ]


def test_a_registry_is_read_without_torch_and_without_drawing(registry: Registry, saved: list[Path]) -> None:
    registry.publish(saved[0])
    program = (
        "import sys; from lapwing_detector.registry import Registry\n"
        f"print(Registry({str(registry.root)!r}).load('alpha').bias)\n"
        f"print(Registry({str(registry.root)!r}).publish({str(saved[1])!r}).new)\n"
        "print(sorted({'torch', 'matplotlib', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["0.0", "True", "[]"]
