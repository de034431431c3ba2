"""Other libraries' attention behind our arguments: PyTorch's own, FlashAttention 2, 3 and 4, and xFormers.

Each takes what ``shapes.py`` describes and returns [B, H, T, K]; autograd is the library's own, as a rule without second
derivatives. None of them is imported before it is asked for, and each says in one line why it cannot serve: here at all
(``missing``), or a call (BackendUnavailable).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ditscale.errors import BackendUnavailable
from ditscale.kernels.attn.reference import same_sequence

# FlashAttention's modules by version, in the order in which they are tried on a GPU of this generation: the newest kernel
# written for it first. Version 4 knows Hopper and Blackwell, version 3 Hopper alone.
_FLASH: Final = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}
_FLASH_ORDER: Final = {9: (3, 4, 2), 10: (4, 2), 11: (4, 2)}
GREATEST_BIAS: Final = 2e38  # times log2(e) it is a float32 number still, with room for a score


@functools.cache
def missing(name: str, device_type: str) -> str | None:
    """Why the library cannot run here; None where it can."""
    if name == "sdpa":
        return None
    if device_type != "cuda":
        return f"it serves CUDA tensors, not {device_type}"
    if name == "xformers":
        return _import_error("xformers.ops")
    found = [(v, _import_error(_FLASH[v])) for v in _flash_order()]
    if any(reason is None for _, reason in found):
        return None
    return "; ".join(f"version {v}: {reason}" for v, reason in found)


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module} does not import ({' '.join(str(error).split())})"
    return None


def _flash_order() -> tuple[int, ...]:
    return _FLASH_ORDER.get(torch.cuda.get_device_capability()[0], (2,))


@functools.cache
def _flash() -> tuple[int, Any]:
    for version in _flash_order():
        if _import_error(_FLASH[version]) is None:
            return version, importlib.import_module(_FLASH[version])
    raise BackendUnavailable(f"backend 'flash_attn' cannot run attention here: {missing('flash_attn', 'cuda')}")


def _refuse(name: str, why: str) -> BackendUnavailable:
    return BackendUnavailable(f"backend {name!r} cannot serve this call of attention: {why}")


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``; what it has no argument for becomes a mask."""
    # Autocast, which q, k and v have been through, would round the mask as well (torch knows no autocast of the meta device).
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):
            return sdpa(q, k, v, key_bias, lengths, cu_q, cu_k, max_q, max_k, scale)
    grouped = True if k.shape[1] != q.shape[1] else False  # noqa: SIM210 (bool() of symbols stays a symbol in a trace)
    T, S = q.shape[2], k.shape[2]
    allowed: Tensor | None = None  # what may be attended to, broadcasting to [B, H, T, S]
    if lengths is not None:
        allowed = torch.arange(S, device=q.device) < lengths.view(-1, 1, 1, 1)
    elif cu_q is not None and cu_k is not None:
        allowed = same_sequence(cu_q, cu_k, T, S)
    if allowed is not None:
        counts = allowed.any(-2).unsqueeze(-1)  # a key that counts for nobody may be NaN, and zero times NaN is NaN
        k, v = torch.where(counts, k, 0.0), torch.where(counts, v, 0.0)
    if key_bias is not None:
        bias = (key_bias if _takes_wide_masks(q.device) else _narrow(key_bias, q.dtype)).unsqueeze(2)
        weighs = bias != float("-inf")
        allowed = weighs if allowed is None else allowed & weighs
    if allowed is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    # Rows without a key would be NaN: they look at every key and are set to zero afterwards.
    nothing = ~allowed.any(-1, keepdim=True)
    q = torch.where(nothing, 0.0, q)  # which may be NaN
    mask = allowed | nothing
    if key_bias is not None:
        mask = torch.where(allowed, bias, torch.where(nothing, 0.0, float("-inf")).to(bias.dtype))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return torch.where(nothing, 0.0, out)


def _takes_wide_masks(device: torch.device) -> bool:
    """PyTorch's kernels for GPUs take a mask in the dtype of q alone."""
    return device.type == "cpu"


def _narrow(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to ``dtype``, where what is finite stays so, in the kernels' units of log 2 too: of a row whose every key has the
    least float32 number they would make NaN, as of one whose every key is at -infinity. Each bias keeps its gradient."""
    most = min(torch.finfo(dtype).max, GREATEST_BIAS)
    held = bias.detach().clamp(-most, most) + (bias - bias.detach())
    return torch.where(bias.isinf(), bias, held).to(dtype)


def flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
) -> Tensor:
    """FlashAttention, the version for this GPU. Keys that ``lengths`` leaves out are cut away, which copies k and v."""
    version, module = _flash()
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise _refuse("flash_attn", f"it takes bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}")
    if key_bias is not None:
        raise _refuse("flash_attn", "it has no bias or mask of keys; use lengths or cu_seqlens where they say the same")
    options: dict[str, Any] = {"softmax_scale": scale}
    if torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, T, H, K]
    if lengths is None and cu_q is None:
        return _first(module.flash_attn_func(q, k, v, **options)).transpose(1, 2)
    B, T, H, K = q.shape
    if lengths is not None:
        max_q, max_k = T, k.shape[1]
        counts = torch.arange(k.shape[1], device=k.device) < lengths[:, None]
        k, v = k[counts], v[counts]
        cu_q = torch.arange(0, B * T + 1, T, device=q.device, dtype=torch.int32)
        cu_k = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        q = q.reshape(B * T, H, K)
    else:
        q, k, v = q[0], k[0], v[0]
    out = _first(
        module.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k, **options
        )
    ).reshape(B, T, H, K)
    if lengths is None and cu_q is not None:
        # Rows behind the last sequence are the library's to leave as they are; ours are zero.
        out = torch.where((torch.arange(T, device=q.device) < cu_q[-1]).view(1, T, 1, 1), out, 0.0)
    return out.transpose(1, 2)


def _first(result: Any) -> Tensor:
    """Versions 3 and 4 have returned (out, log-sum-exp) as well as out."""
    return result[0] if isinstance(result, tuple) else result


def xformers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
) -> Tensor:
    """``xformers.ops.memory_efficient_attention``; ``lengths`` become a bias of -infinity."""
    ops = importlib.import_module("xformers.ops")
    B, H, T, K = q.shape
    S = k.shape[2]
    bias: Any = None
    if cu_q is not None and cu_k is not None:
        if key_bias is not None:
            raise _refuse("xformers", "it has no bias of keys beside packed sequences")
        ends = [cu.tolist() for cu in (cu_q, cu_k)]
        if ends[0][-1] != T or ends[1][-1] != S:
            raise _refuse("xformers", "it needs every token in a sequence; the last ends before the sample does")
        lengths_of = [[b - a for a, b in zip(e, e[1:], strict=False)] for e in ends]
        bias = ops.fmha.BlockDiagonalMask.from_seqlens(*lengths_of)
    elif lengths is not None or key_bias is not None:
        rows = torch.zeros(B, H, S, device=q.device) if key_bias is None else key_bias
        if lengths is not None:
            counts = torch.arange(S, device=q.device) < lengths.view(-1, 1, 1)
            rows = torch.where(counts, rows, float("-inf"))
        nothing = (rows == float("-inf")).all(-1)[..., None, None]
        rows = torch.where(nothing[..., 0], 0.0, rows)
        # Its kernels read rows whose memory is a whole number of 8 wide.
        bias = F.pad(_narrow(rows, q.dtype), (0, -S % 8))[:, :, None, :S].expand(B, H, T, S)
        if lengths is not None:
            k, v = (torch.where(counts.unsqueeze(-1), t, 0.0) for t in (k, v))
    # Grouped queries are a dimension of their own there, which does not go with a bias of every head.
    if k.shape[1] != H:
        k, v = (t.repeat_interleave(H // k.shape[1], dim=1) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out: Tensor = ops.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale).transpose(1, 2)
    return torch.where(nothing, 0.0, out) if isinstance(bias, Tensor) else out


CALLS: Final[dict[str, Callable[..., Tensor]]] = {"sdpa": sdpa, "flash_attn": flash_attn, "xformers": xformers}
