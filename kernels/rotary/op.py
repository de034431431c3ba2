"""The public ``qk_norm_rope``: checks and choice of a backend."""

from __future__ import annotations

from torch import Tensor

from ditscale.errors import InputError
from ditscale.kernels import dispatch
from ditscale.kernels.dispatch import Backend
from ditscale.kernels.rotary import reference


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    interleaved: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """RMS norm of queries and keys over the width of a head, then rotary position embedding.

    Args:
        q, k: [B, H, T, K], strided views welcome.
        q_weight, k_weight: [K], the norm's weight. Default: none.
        cos, sin: [T, K / 2] or [B, T, K / 2], given together: the angles' cosines and sines. Default: no rotation.
        eps: added to the mean square. Default: 1e-6.
        interleaved: rotate the pairs (0, 1), (2, 3), ...; False pairs i with i + K / 2. Default: False.
        backend: "auto" or "reference". Default: "auto".

    Returns:
        (q, k), the shapes and dtypes of the inputs.

    Raises:
        InputError: a shape is not as above.
        BackendUnavailable: the backend was named and cannot run here (says why).

    Numerics: float32 inside (float64 for float64), one rounding.
    Source: QK-norm arXiv:2010.04245, arXiv:2302.05442; RoPE arXiv:2104.09864.
    """
    for name, t in (("q", q), ("k", k)):
        dispatch.check_float(name, t)
        if t.dim() != 4:
            raise InputError(f"{name}: expected [B, H, T, K], got shape {list(t.shape)}")
    K = q.shape[-1]
    for name, w in (("q_weight", q_weight), ("k_weight", k_weight)):
        if w is not None and w.shape != (K,):
            raise InputError(f"{name}: expected [{K}], got {list(w.shape)}")
    if (cos is None) != (sin is None):
        raise InputError("cos, sin: expected both or neither, got one")
    if cos is not None and sin is not None:
        if K % 2:
            raise InputError(f"q: expected an even head width K for a rotation, got {K}")
        for name, t in (("cos", cos), ("sin", sin)):
            if t.shape not in ((q.shape[2], K // 2), (q.shape[0], q.shape[2], K // 2)):
                raise InputError(f"{name}: expected [T, K / 2] = [{q.shape[2]}, {K // 2}] or [B, T, K / 2], got {list(t.shape)}")
    dispatch.choose("qk_norm_rope", backend, q)
    return reference.qk_norm_rope_ref(q, k, q_weight, k_weight, cos, sin, eps=eps, interleaved=interleaved)
