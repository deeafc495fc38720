from __future__ import annotations

import pytest

from lapwing_detector import attention


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that short texts straddle them: 300 columns of 4 heads make 7 rows, 16 make 131."""
    monkeypatch.setattr(attention, "BLOCK_BYTES", 4 * 4 * 300 * 7)
