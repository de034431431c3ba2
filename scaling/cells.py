"""One cell of a hyper-parameter study: a size and an amount of data, trained with several learning rates and batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ditscale.scaling.engine import Array

# "Near-optimal" in DeepSeek LLM (arXiv:2401.02954) and Step Law (arXiv:2503.04715).
NEAR_OPTIMAL = 0.0025


@dataclass(frozen=True)
class Cell:
    """The best learning rate and batch of one (N, D).

    Attributes:
        params, data: of the cell.
        lr, batch: at the minimum; batch None where it was not varied.
        loss: at the minimum.
        covariance: of (log lr, log batch) at the minimum, from the scatter of the runs.
        band: factor on the learning rate, down and up, that costs ``NEAR_OPTIMAL`` more loss at the best
            batch.
        batch_band: the same for the batch, or None.
        flops: compute of its runs (their geometric mean), None where it is not known.
        inside: whether the minimum lies within the runs' grid and the surface bends upwards all round.
        runs: how many.
    """

    params: float
    data: float
    lr: float
    batch: float | None
    loss: float
    covariance: tuple[tuple[float, ...], ...]
    band: tuple[float, float]
    batch_band: tuple[float, float] | None
    inside: bool
    runs: int
    flops: float | None = None


def fit_cell(n: Array, d: Array, rates: Array, batches: Array | None, loss: Array) -> Cell | None:
    """A quadratic of log loss in (log lr, log batch), its minimum, and how well the runs place it."""
    x = np.log(rates)[:, None] if batches is None else np.column_stack([np.log(rates), np.log(batches)])
    dims = x.shape[1]
    if dims == 2 and len(np.unique(x[:, 1])) < 3:
        return None
    centre = x.mean(0)
    z = x - centre
    columns = [np.ones(len(z)), *z.T, *(z.T**2)]
    if dims == 2:
        columns.append(z[:, 0] * z[:, 1])
    design = np.column_stack(columns)
    if len(loss) < design.shape[1] or np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    y = np.log(loss)
    solver = np.linalg.pinv(design)
    c = solver @ y
    left = y - design @ c
    dof = len(y) - design.shape[1]

    def place(c: Array) -> tuple[Array, Array]:
        hessian = np.zeros((dims, dims))
        np.fill_diagonal(hessian, 2.0 * c[1 + dims : 1 + 2 * dims])
        if dims == 2:
            hessian[0, 1] = hessian[1, 0] = c[5]
        return np.asarray(-np.linalg.solve(hessian, c[1 : 1 + dims]), dtype=float), hessian

    try:
        best, hessian = place(c)
    except np.linalg.LinAlgError:
        return None
    bends = bool(np.all(np.linalg.eigvalsh(hessian) > 0))
    inside = bends and bool(np.all((best > z.min(0)) & (best < z.max(0))))
    variance = float(left @ left) / dof if dof > 0 else float("nan")
    gradient = np.column_stack([(place(c + h)[0] - place(c - h)[0]) / 2e-6 for h in 1e-6 * np.eye(len(c))])
    covariance = variance * gradient @ (solver @ solver.T) @ gradient.T

    def band(i: int) -> tuple[float, float]:
        half = float(np.sqrt(2.0 * np.log1p(NEAR_OPTIMAL) / hessian[i, i])) if hessian[i, i] > 0 else float("inf")
        return float(np.exp(-half)), float(np.exp(half))

    value = float(c[0] + c[1 : 1 + dims] @ best + 0.5 * best @ hessian @ best)
    with np.errstate(over="ignore"):
        at = np.exp(best + centre)
    return Cell(
        params=float(np.exp(np.log(n).mean())),
        data=float(np.exp(np.log(d).mean())),
        lr=float(at[0]),
        batch=float(at[1]) if dims == 2 else None,
        loss=float(np.exp(value)),
        covariance=tuple(tuple(float(v) for v in row) for row in covariance),
        band=band(0),
        batch_band=band(1) if dims == 2 else None,
        inside=inside,
        runs=len(loss),
    )
