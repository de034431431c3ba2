"""Distances between sets of features: closed forms, invariances, and a direct count of neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from ditscale.dit.evaluation.metrics import Moments, frechet_distance, precision_recall
from ditscale.errors import InputError


def features(count, width, seed=0):
    return np.random.default_rng(seed).normal(size=(count, width))


def test_independent_features_have_a_closed_form():
    """For diagonal covariances it is a sum of (m - m')^2 + (s - s')^2."""
    rng = np.random.default_rng(1)
    m, n, s, t = rng.normal(size=(2, 6)).tolist() + rng.uniform(0.1, 2, size=(2, 6)).tolist()
    a = Moments(9, np.array(m), np.diag(np.square(s)))
    b = Moments(7, np.array(n), np.diag(np.square(t)))
    exact = np.square(np.subtract(m, n)).sum() + np.square(np.subtract(s, t)).sum()
    assert frechet_distance(a, b) == pytest.approx(exact, rel=1e-12)


def test_the_matrix_root_is_scipy_s():
    a, b = features(50, 8) @ np.diag(np.arange(1, 9)), features(60, 8, 1) + 0.3
    first, second = Moments.of(a), Moments.of(b)
    root = scipy.linalg.sqrtm(first.covariance @ second.covariance).real
    gap = first.mean - second.mean
    direct = gap @ gap + np.trace(first.covariance + second.covariance - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(direct, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(direct, rel=1e-9)


def test_a_set_is_at_no_distance_from_itself_and_at_a_shift_s_square():
    few = Moments.of(features(5, 20))  # a covariance of rank 4 of 20
    assert frechet_distance(few, few) < 1e-7
    x = features(40, 7)
    assert frechet_distance(Moments.of(x), Moments.of(x + 2.0)) == pytest.approx(4 * 7, rel=1e-9)
    turn = scipy.linalg.qr(features(7, 7, 3))[0]
    y = features(30, 7, 5)
    plain = frechet_distance(Moments.of(x), Moments.of(y))
    assert frechet_distance(Moments.of(x @ turn), Moments.of(y @ turn)) == pytest.approx(plain, rel=1e-9)


def test_moments_are_the_unbiased_ones():
    x = features(31, 3)
    found = Moments.of(x.astype(np.float32))
    assert np.allclose(found.mean, x.mean(0), atol=1e-6) and found.count == 31
    centred = x - x.mean(0)
    assert np.allclose(found.covariance, centred.T @ centred / 30, atol=1e-6)


def counted(points, by, k):
    """One point after the other."""
    inside = 0
    for point in points:
        for centre in by:
            radius = sorted(np.linalg.norm(by - centre, axis=1))[k]
            if np.linalg.norm(point - centre) <= radius:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_counts(k):
    real, drawn = features(60, 4), 0.6 * features(45, 4, 1) + 0.5
    assert precision_recall(real, drawn, neighbours=k) == (counted(drawn, real, k), counted(real, drawn, k))


def test_a_collapsed_model_is_precise_and_forgets():
    real, drawn = features(300, 3), 0.05 * features(300, 3, 1)
    precision, recall = precision_recall(real, drawn)
    assert precision > 0.95 and recall < 0.2
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    assert precision_recall(real, real) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Moments.of(features(1, 3)), "n >= 2"),
        (lambda: Moments.of(np.full((3, 2), np.nan)), "finite"),
        (lambda: frechet_distance(Moments.of(features(5, 3)), Moments.of(features(5, 2))), "3 and 2"),
        (lambda: precision_recall(features(3, 2), features(9, 2)), "neighbours"),
    ],
)
def test_bad_values_are_named(make, named):
    with pytest.raises(InputError, match=named):
        make()
