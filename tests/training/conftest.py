from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from threadpoolctl import threadpool_limits
from train_fakes import FAST, NESTED, rows_of_the_store
from training_fakes import save_tiny_model, write_store

from lapwing_detector import probe_files
from lapwing_detector.language_model import LanguageModel
from lapwing_training.evaluation import baselines
from lapwing_training.probe import train as train_module


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are tiny: on a busy machine threads that wait for each other take far longer than the work."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> LanguageModel:
    return LanguageModel.load(str(tiny_model))


@pytest.fixture(scope="module")
def few_draws() -> Iterator[None]:
    """Each is a fit of its own; how often controls are drawn is of no matter to most tests."""
    with drawing_twice():
        yield


@contextmanager
def drawing_twice() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SHUFFLES", "RANDOM_DRAWS", "NESTED_DRAWS"):
            patch.setattr(baselines, name, 2)
        yield


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than fitting, for tests that look at numbers only."""
    monkeypatch.setattr(train_module, "html_report", lambda probe: "")
    monkeypatch.setattr(probe_files, "card_pictures", lambda probe: {})


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("stores") / "store", rows_of_the_store())


@pytest.fixture(scope="session")
def trained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Judged on a fixed split."""
    return probe_of(store, tmp_path_factory.mktemp("probes") / "My Probe", FAST)


@pytest.fixture(scope="session")
def nested(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Judged by nested cross-validation, with a guarantee."""
    return probe_of(store, tmp_path_factory.mktemp("probes") / "nested", replace(NESTED, guarantee=True))


def probe_of(store: Path, out: Path, options: train_module.TrainOptions) -> Path:
    with drawing_twice():
        train_module.train_probe(store, out, options)
    return out
