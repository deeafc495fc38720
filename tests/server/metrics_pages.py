"""The page of the metrics as a reader gets it, and what tests ask of it."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from typing import Any

from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from service_fakes import WAIT, Running

from lapwing.v1 import detector_pb2
from lapwing_server.metrics import Metrics

SCORE, BATCH = "lapwing.v1.Detector/Score", "lapwing.v1.Detector/ScoreBatch"
GENERATE, INFO = "lapwing.v1.Detector/Generate", "lapwing.v1.Detector/GetServerInfo"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def page_of(port: int | None) -> str:
    """The page as a reader gets it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=WAIT) as page:
        assert page.headers["Content-Type"].startswith("text/plain")
        return str(page.read(), "utf-8")


def samples_of(text: str) -> Samples:
    """Every sample by name and labels; fails if one is there twice."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


class Page:
    """The samples of a page, asked for by labels."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __call__(self, name: str, /, **labels: str) -> float:
        """The sum over all samples of the name that have the labels."""
        return sum(value for _, value in self.named(name, **labels))

    def named(self, name: str, /, **labels: str) -> Iterator[tuple[dict[str, str], float]]:
        for (found, pairs), value in self.samples.items():
            if found == f"lapwing_{name}" and labels.items() <= dict(pairs).items():
                yield dict(pairs), value


def page(server: Running) -> Page:
    return Page(samples_of(page_of(server.server.metrics_port)))


def registry_page(metrics: Metrics) -> Page:
    return Page(samples_of(generate_latest(metrics.registry).decode()))


def score(prompt: str, response: str, **more: Any) -> Any:
    return detector_pb2.ScoreRequest(prompt={"text": prompt}, response={"text": response}, **more)
