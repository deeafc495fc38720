"""Rows that stay where they are: whatever is taken of them equals NumPy's own indexing, and memory stays bounded."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_fakes import LAPLACIAN, SCORE, make_table, write_store

from lapwing_training.errors import InvalidOption
from lapwing_training.store import feature_rows
from lapwing_training.store.feature_rows import FeatureRows
from lapwing_training.store.prefix import response_cut
from lapwing_training.store.store import read_store
from lapwing_training.store.table import Table

BOTH = (SCORE, LAPLACIAN)


@pytest.fixture(scope="module")
def made() -> Table:
    return make_table(rows=130, stages=(0.25, 0.75))


@pytest.fixture(scope="module")
def stored(made: Table, tmp_path_factory: pytest.TempPathFactory) -> Table:
    """The same in files of 30 rows each."""
    return read_store(write_store(tmp_path_factory.mktemp("stores") / "store", made, shard_rows=30)).table


@pytest.fixture(params=["in memory", "in files"])
def table(request: pytest.FixtureRequest, made: Table, stored: Table) -> Table:
    return made if request.param == "in memory" else stored


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(feature_rows, "BLOCK", 5000)
        yield


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_what_is_taken_equals_numpys_indexing(made: Table, stored: Table, data: st.DataObject) -> None:
    rows = np.array(data.draw(st.lists(st.integers(0, 129), min_size=1, max_size=60)))
    again = np.array(data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))))
    heads = np.array(data.draw(st.lists(st.integers(0, 15), max_size=16)), dtype=np.int64)
    k = data.draw(st.integers(1, 4))
    whole = np.concatenate([made.features[SCORE], made.features[LAPLACIAN][..., :k]], axis=-1)[rows][again]
    for table in (made, stored):
        taken = table.take(rows).take(again)
        assert taken.ids.tolist() == made.ids[rows][again].tolist()
        np.testing.assert_array_equal(taken.stacked(BOTH, k), whole)
        flat = whole.reshape(len(whole), 16, k + 1)
        np.testing.assert_array_equal(taken.of_heads(BOTH, k, heads), flat[:, heads])
        means = np.stack([whole[..., 0], whole[..., 1:].mean(axis=-1, dtype=np.float64)], axis=1)
        np.testing.assert_allclose(taken.scalars(BOTH, k), means, rtol=1e-12)


def test_features_are_copies_and_others_are_refused(table: Table) -> None:
    values = table.feature(LAPLACIAN, 4)
    values[:] = 7.0
    assert table.feature(LAPLACIAN, 4).max() < 7.0
    assert table.feature_names == BOTH
    assert table.shape == table.take(np.arange(3)).shape == (4, 4)
    for read in (table.stacked, table.scalars):
        with pytest.raises(InvalidOption, match=r"feature is `sink_scores.v1`; the store holds attention_score"):
            read(("sink_scores.v1",), 4)
        with pytest.raises(InvalidOption, match="k is 5; the store holds 1 to 4"):
            read((LAPLACIAN,), 5)


def test_no_rows_are_no_rows(table: Table) -> None:
    none = table.take(np.zeros(len(table), dtype=bool))
    assert len(none) == 0
    assert none.stacked(BOTH, 4).shape == (0, 4, 4, 5)
    assert none.scalars(BOTH, 4).shape == (0, 2, 4, 4)
    assert len(none.at_stage(0.25)[0]) == 0


def test_a_stage_holds_the_rows_that_are_long_enough(table: Table, made: Table) -> None:
    assert table.stages == (0.25, 0.75)
    cut, rows = table.at_stage(0.25)
    left = np.array([response_cut(0.25, tokens) for tokens in made.response_tokens.tolist()])
    np.testing.assert_array_equal(cut.response_tokens, left[rows])
    np.testing.assert_array_equal(cut.token_counts, (made.token_counts - made.response_tokens + left)[rows])
    assert cut.ids.tolist() == made.ids[rows].tolist()
    assert cut.labels.tolist() == made.labels[rows].tolist()
    assert np.isnan(cut.log_probabilities).all()  # of a response that is not written yet
    assert cut.stages == ()
    assert 0 < len(rows) < len(made)
    assert set(np.flatnonzero(made.token_counts - made.response_tokens + left >= 12)) == set(rows)
    with pytest.raises(InvalidOption, match=r"stage is 0.5; the store holds 0.25, 0.75; lapwing extract --stages 0.5"):
        table.at_stage(0.5)


def test_a_stage_follows_the_rows_that_are_taken(table: Table) -> None:
    cut, rows = table.at_stage(0.75)
    by_id = dict(zip(cut.ids.tolist(), cut.feature(LAPLACIAN, 4), strict=True))
    order = np.random.default_rng(0).integers(0, len(table), 300)  # with repetitions, as in a bootstrap
    drawn = table.take(order)
    again, places = drawn.at_stage(0.75)
    assert len(places) == np.isin(order, rows).sum()
    assert again.ids.tolist() == drawn.ids[places].tolist()
    for id, values in zip(again.ids.tolist(), again.feature(LAPLACIAN, 4), strict=True):
        np.testing.assert_array_equal(values, by_id[id])


@given(fraction=st.integers(1, 99).map(lambda number: number / 100), tokens=st.integers(0, 3000))
def test_a_cut_is_the_decimal_fraction_rounded_up(fraction: float, tokens: int) -> None:
    assert response_cut(fraction, tokens) == -(-round(fraction * 100) * tokens // 100)


def test_control_floats_would_cut_elsewhere() -> None:
    assert np.ceil(0.7 * 10) == 7
    assert np.ceil(0.07 * 100) == 8 != response_cut(0.07, 100)


def peak(work: Callable[[], object]) -> int:
    """Bytes that were allocated at once; mapped files are none."""
    tracemalloc.start()
    work()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def test_reading_never_holds_the_whole_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_rows, "BLOCK", 1 << 17)
    table = make_table(rows=1500, layers=4, heads=16, k=20)
    table = replace(table, labels=(np.arange(1500) % 2).astype(np.int8))
    size = table.features[LAPLACIAN].nbytes  # 7.7 MB
    store = write_store(tmp_path / "store", table, shard_rows=100)

    def work() -> None:
        read = read_store(store).table.labelled()
        rows = read.take(np.random.default_rng(0).permutation(1500))
        rows.scalars((LAPLACIAN,), 20)
        rows.of_heads((LAPLACIAN,), 20, np.array([3, 17]))

    results = 1500 * 64 * 8 + 1500 * 2 * 20 * 4
    assert peak(work) < results + 0.3 * size
    assert peak(lambda: np.asarray(read_store(store).table.features[LAPLACIAN])) > size  # control


def test_no_file_is_held_open(stored: Table) -> None:
    def opened() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = opened()
    kept = [stored.take(np.arange(start, 130)) for start in range(100)]
    assert isinstance(kept[0].features[LAPLACIAN], FeatureRows)
    for table in kept:
        table.scalars((LAPLACIAN,), 2)
    assert opened() == before
