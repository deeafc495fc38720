from __future__ import annotations

from collections.abc import Iterator

import pytest
from judge_fakes import KEY
from judge_server import JudgeServer, judge_server


@pytest.fixture
def judge_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server() as running:
        yield running
