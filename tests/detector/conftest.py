from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from lapwing_detector import strips
from lapwing_detector.native import build, library
from tests.detector.native_cases import BUILDS


@pytest.fixture(autouse=True)
def planned_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are kept from layer to layer, but tests change the sizes that they are made from."""
    monkeypatch.setattr(strips, "_alike", strips._alike.__wrapped__)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small strips, so that short texts straddle them: 300 columns of 2 heads make 7 rows."""
    monkeypatch.setattr(strips, "STRIP_BYTES", 4 * 2 * 300 * 7)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Of torch; where tests run side by side it has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=BUILDS)
def any_build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], object]:
    """What gives attention in C, of the widths of every kind of CPU."""
    options = BUILDS[request.param]
    if options is None:
        return library.installed
    loaded = library.load(build.build(options, tmp_path_factory.mktemp("built") / "library.so"), options)
    return lambda: loaded
