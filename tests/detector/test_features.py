"""The features' closed forms, and their eigenvalues against a dense solver."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lapwing_detector.errors import TooShort
from lapwing_detector.features import (
    FEATURES,
    attention_eigenvalues,
    attention_scores,
    laplacian_diagonal,
    laplacian_eigenvalues,
    largest,
    mean_received,
    sink_scores,
)
from lapwing_detector.summary import AttentionSummary
from tests.detector.probes import random_maps, summary_of

Maps = NDArray[np.float64]


def one_map(a: Maps) -> AttentionSummary:
    return summary_of(a[None, None])


def same(found: NDArray[np.float32], expected: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-6)  # float32 sums of at most 50 terms


@pytest.mark.parametrize("tokens", [1, 2, 50])
def test_identity_map(tokens: int) -> None:
    summary = one_map(np.eye(tokens))
    seen = np.arange(tokens, 0, -1)  # T - i
    same(mean_received(summary), 1 / seen)
    same(laplacian_diagonal(summary), 1 / seen - 1)
    same(attention_eigenvalues(summary, tokens), np.ones(tokens))
    assert attention_scores(summary)[0, 0] == 0


@pytest.mark.parametrize("tokens", [1, 2, 50])
def test_uniform_rows(tokens: int) -> None:
    rows = np.arange(1, tokens + 1)
    summary = one_map(np.tril(np.ones((tokens, tokens))) / rows[:, None])
    s = np.array([(1 / rows[i:]).sum() / (tokens - i) for i in range(tokens)])
    same(mean_received(summary), s)
    same(laplacian_diagonal(summary), s - 1 / rows)
    np.testing.assert_allclose(attention_scores(summary)[0, 0], -np.log(rows).mean(), rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 50])
def test_every_row_attends_to_the_first_token(tokens: int) -> None:
    a = np.zeros((tokens, tokens))
    a[:, 0] = 1
    summary = one_map(a)
    same(mean_received(summary), np.eye(tokens)[0])
    same(laplacian_eigenvalues(summary, tokens), np.zeros(tokens))
    # The floor keeps the logarithm of nothing finite.
    np.testing.assert_allclose(attention_scores(summary)[0, 0], (tokens - 1) / tokens * np.log(1e-12), rtol=1e-5)


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_eigenvalues_equal_numpys(tokens: int, seed: int) -> None:
    maps = random_maps(2, 3, tokens, seed)
    summary = summary_of(maps)
    for layer, head in np.ndindex(maps.shape[:2]):
        a = maps[layer, head]
        out_degree = np.diag(a.sum(axis=0) / np.arange(tokens, 0, -1))
        for feature, matrix in ((laplacian_eigenvalues, out_degree - a), (attention_eigenvalues, a)):
            dense = np.sort(np.linalg.eigvals(matrix).real)[::-1]
            np.testing.assert_allclose(feature(summary, tokens)[layer, head], dense, atol=1e-5)


def test_control_unmeaned_degree_has_other_eigenvalues() -> None:
    (a,) = random_maps(1, 1, 20)[0]
    dense = np.sort(np.linalg.eigvals(np.diag(a.sum(axis=0)) - a).real)[::-1]
    assert np.abs(laplacian_eigenvalues(one_map(a), 20)[0, 0] - dense).max() > 0.1


@given(st.integers(1, 60), st.integers(0, 2**31))
def test_bounds(tokens: int, seed: int) -> None:
    summary = summary_of(random_maps(2, 3, tokens, seed))
    np.testing.assert_allclose(summary.received.sum(axis=-1), tokens, rtol=1e-5)
    eigenvalues = laplacian_eigenvalues(summary, tokens)
    assert np.abs(eigenvalues).max() <= 1 + 1e-6
    assert np.abs(laplacian_diagonal(summary)[..., -1]).max() < 1e-6
    assert (sink_scores(summary, tokens) <= 1 + 1e-6).all()


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**31))
def test_largest_equals_a_full_sort(tokens: int, k: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(-4, 4, (2, 3, tokens)).astype(np.float32)  # with ties
    if k > tokens:
        with pytest.raises(TooShort) as caught:
            largest(values, k)
        assert (caught.value.token_count, caught.value.needed) == (tokens, k)
        return
    np.testing.assert_array_equal(largest(values, k), np.sort(values, axis=-1)[..., ::-1][..., :k])


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("k", [1, 5])
def test_every_feature_has_its_declared_shape(name: str, k: int) -> None:
    feature, summary = FEATURES[name], summary_of(random_maps(2, 3, 5, 1))
    values = feature.compute(summary, k)
    assert values.shape == (2, 3, feature.width(k))
    assert values.dtype == np.float32
    assert feature.id == name
    assert feature.needed(k) == feature.width(k)
    assert feature.token_values(summary).shape == (2, 3, 5)
    if feature.ranked:
        np.testing.assert_array_equal(values, largest(feature.token_values(summary), k))
        with pytest.raises(TooShort, match="need at least 6"):
            feature.compute(summary, 6)
    else:
        np.testing.assert_allclose(values[..., 0], feature.token_values(summary).mean(axis=-1), rtol=1e-5)


def test_heads_and_layers_keep_their_places() -> None:
    maps = random_maps(2, 3, 12, 5)
    whole = laplacian_eigenvalues(summary_of(maps), 4)
    for layer, head in np.ndindex(maps.shape[:2]):
        np.testing.assert_array_equal(whole[layer, head], laplacian_eigenvalues(one_map(maps[layer, head]), 4)[0, 0])


def test_nothing_to_look_at() -> None:
    empty = AttentionSummary(np.empty((1, 1, 0), np.float32), np.empty((1, 1, 0), np.float32), layers=(0,))
    with pytest.raises(TooShort):
        attention_scores(empty)
    with pytest.raises(TooShort):
        laplacian_eigenvalues(empty, 1)


@pytest.mark.parametrize("k", [0, -3])
def test_k_must_be_positive(k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}"):
        laplacian_eigenvalues(summary_of(random_maps(2, 3, 5, 1)), k)


def test_summary_refuses_shapes_that_do_not_fit() -> None:
    good = np.zeros((2, 3, 4), np.float32)
    with pytest.raises(ValueError, match=r"\(layers, heads, tokens\)"):
        AttentionSummary(good, good[..., :3], layers=(0, 1))
    with pytest.raises(ValueError, match=r"\(layers, heads, tokens\)"):
        AttentionSummary(good[0], good[0], layers=(0, 1))
    with pytest.raises(ValueError, match="1 layer indices for 2 layers"):
        AttentionSummary(good, good, layers=(0,))
    assert AttentionSummary(good, good, layers=(0, 4)).token_count == 4
