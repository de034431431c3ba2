"""Starting points by variable projection: a grid over exponents, the rest by non-negative least squares."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ditscale.errors import InputError
from ditscale.scaling.engine import Array

if TYPE_CHECKING:
    from ditscale.scaling.laws import TermLaw

_MOST_POINTS = 2000


def projected_starts(law: TermLaw, logs: Mapping[str, Array], target: Array, weights: Array, count: int) -> Array:
    """Variable projection (Golub & Pereyra 1973): for given exponents the rest is a small linear problem.

    The linear problem is weighted by 1/y², so that its residuals are the relative ones of a fit in log space. Of a
    long table some points suffice, spread evenly over the losses.
    """
    if len(target) > _MOST_POINTS:
        some = np.argsort(target, kind="stable")[np.linspace(0, len(target) - 1, _MOST_POINTS).astype(np.int64)]
        logs = {name: values[some] for name, values in logs.items()}
        target, weights = target[some], weights[some]
    k = len(law.exponent_names)
    if k:
        side = {1: 64, 2: 26, 3: 10}.get(k, 6)
        positive = np.geomspace(0.02, 2.5, side)
        values = positive if law.sign < 0 else np.concatenate([-positive[::-1], positive])
        steps = np.array(list(itertools.product(range(len(values)), repeat=k)))
        exponents = values[steps]
    else:
        steps, exponents = np.zeros((1, 0), dtype=int), np.zeros((1, 0))
    outers = (0.25, 0.4, 0.7, 1.0) if law.outer else (1.0,)
    floors = (0.0, 0.4, 0.7, 0.9) if law.outer and isinstance(law.floor, str) else (0.0,)

    found_theta: list[Array] = []
    found_score: list[Array] = []
    found_cell: list[NDArray[np.int64]] = []
    for outer, share in itertools.product(outers, floors):
        fixed = share * float(target.min()) if law.outer else float(law.floor) if isinstance(law.floor, float) else 0.0
        if not np.all(target > fixed):
            raise InputError(f"floor: expected a value below every measured one ({target.min():.6g}), got {fixed:g}")
        goal = (target - fixed) ** (1.0 / outer)
        w = weights * (1.0 / goal * (target - fixed) * outer / target) ** 2
        columns = []
        position = {name: i for i, name in enumerate(law.exponent_names)}
        for term in law.terms:
            z: Any = 0.0
            for x, e in term.exponents.items():
                value = exponents[:, position[e], None] if isinstance(e, str) else np.full((len(exponents), 1), e)
                z = z + law.sign * value * logs[x]
            columns.append(np.exp(np.clip(np.broadcast_to(z, (len(exponents), len(target))), -300, 300)))
        floated = isinstance(law.floor, str) and not law.outer
        if floated:
            columns.append(np.ones_like(columns[0]))
        coefficient, score = _non_negative(np.stack(columns, axis=1), goal, w)
        theta = np.empty((len(exponents), len(law.names)))
        terms = len(law.terms)
        floor_log = np.log(np.abs(goal).max()) - 30.0
        with np.errstate(divide="ignore"):
            theta[:, :terms] = outer * np.maximum(np.log(coefficient[:, :terms]), floor_log)
        theta[:, terms : terms + k] = outer * exponents
        if isinstance(law.floor, str):
            theta[:, law.names.index(law.floor)] = coefficient[:, terms] if floated else fixed
        if law.outer:
            theta[:, law.names.index(law.outer)] = outer
        found_theta.append(theta)
        found_score.append(score)
        found_cell.append(np.column_stack([steps, np.full(len(steps), 2 * len(found_cell))]))
    return _spread(np.concatenate(found_theta), np.concatenate(found_score), np.concatenate(found_cell), count)


def _non_negative(columns: Array, goal: Array, weights: Array) -> tuple[Array, Array]:
    """Weighted least squares with coefficients >= 0 for S small designs [S, K, n]: the best feasible support wins."""
    s, k, _ = columns.shape
    weighted = columns * weights
    gram = np.matmul(weighted, columns.transpose(0, 2, 1))
    right = np.matmul(weighted, goal)
    total = float((weights * goal * goal).sum())
    root = np.sqrt(np.maximum(np.einsum("skk->sk", gram), 1e-300))
    gram = gram / root[:, :, None] / root[:, None, :]
    right = right / root
    best = np.full(s, np.inf)
    answer = np.zeros((s, k))
    for size in range(1, k + 1):
        for support in itertools.combinations(range(k), size):
            pick = np.array(support)
            sub = gram[:, pick[:, None], pick[None, :]] + 1e-13 * np.eye(size)
            try:
                c = np.linalg.solve(sub, right[:, pick][:, :, None])[:, :, 0]
            except np.linalg.LinAlgError:
                continue
            score = total - (c * right[:, pick]).sum(1)
            wins = (c > 0).all(1) & (score < best)
            best[wins] = score[wins]
            answer[wins] = 0.0
            answer[np.ix_(wins, pick)] = c[wins]
    return answer / root, best


def _spread(theta: Array, score: Array, cell: NDArray[np.int64], count: int) -> Array:
    """The best starts, the first ones at least two grid steps apart so that they probe different basins."""
    order = np.argsort(score, kind="stable")
    order = order[np.isfinite(score[order])]
    chosen: list[int] = []
    if count <= 32:
        for i in order[:4000]:
            if all(np.abs(cell[i] - cell[j]).max() >= 2 for j in chosen):
                chosen.append(int(i))
                if len(chosen) == count:
                    break
    else:
        chosen = [int(i) for i in order[:count]]
    return theta[chosen]
