from __future__ import annotations

import pytest

from lapwing_detector import strips


@pytest.fixture(autouse=True)
def planned_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are kept from layer to layer, but tests change the sizes that they are made from."""
    monkeypatch.setattr(strips, "_alike", strips._alike.__wrapped__)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small strips, so that short texts straddle them: 300 columns of 2 heads make 7 rows."""
    monkeypatch.setattr(strips, "STRIP_BYTES", 4 * 2 * 300 * 7)
