"""What torch's operations cost: formulas for those that multiply matrices, and a count of all others by the
table.

``matmul_formulas`` repairs what ``torch.utils.flop_counter`` leaves out or counts wrongly (torch 2.13):
attention on the CPU, attention called below ``scaled_dot_product_attention``, matrix-vector and dot products,
grouped convolution's backward pass, grouped and integer products, and the fused inference layers. ditscale's own
operators count by the formulas of their ``cost.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from ditscale import kernels
from ditscale.dit import elementwise as ew
from ditscale.dit import torch_attention

Formula = Callable[..., int]

aten = torch.ops.aten

# Neither products nor in the table of elementwise costs: small, but without a number under the convention
# `all`.
LIGHT = frozenset(
    """
    native_group_norm native_group_norm_backward native_batch_norm native_batch_norm_backward
    _native_batch_norm_legit _batch_norm_with_update _batch_norm_no_update batch_norm_backward
    cudnn_batch_norm cudnn_batch_norm_backward max_pool2d_with_indices max_pool2d_with_indices_backward
    avg_pool2d avg_pool2d_backward avg_pool3d avg_pool3d_backward max_pool3d_with_indices
    max_pool3d_with_indices_backward _adaptive_avg_pool2d _adaptive_avg_pool2d_backward _adaptive_avg_pool3d
    _adaptive_avg_pool3d_backward upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact2d upsample_nearest1d_backward upsample_nearest2d_backward
    upsample_nearest3d_backward upsample_bilinear2d upsample_bilinear2d_backward upsample_bicubic2d
    upsample_bicubic2d_backward upsample_trilinear3d upsample_trilinear3d_backward grid_sampler_2d
    grid_sampler_2d_backward grid_sampler_3d grid_sampler_3d_backward reflection_pad1d reflection_pad2d
    reflection_pad2d_backward replication_pad2d replication_pad2d_backward reflection_pad1d_backward reflection_pad3d
    reflection_pad3d_backward replication_pad1d replication_pad1d_backward replication_pad3d replication_pad3d_backward
    upsample_linear1d upsample_linear1d_backward _upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward
    _upsample_nearest_exact3d_backward _upsample_bilinear2d_aa _upsample_bilinear2d_aa_backward _upsample_bicubic2d_aa
    _upsample_bicubic2d_aa_backward adaptive_max_pool2d adaptive_max_pool2d_backward adaptive_max_pool3d
    adaptive_max_pool3d_backward _prelu_kernel _prelu_kernel_backward polar unfold_backward masked_scatter_backward put
    linalg_cross multinomial huber_loss huber_loss_backward binary_cross_entropy binary_cross_entropy_backward
    binary_cross_entropy_with_logits col2im im2col _fft_c2c _fft_r2c
    _fft_c2r nll_loss_forward nll_loss_backward nll_loss2d_forward nll_loss2d_backward _embedding_bag
    _embedding_bag_backward _embedding_bag_dense_backward
    _linalg_check_errors addr glu glu_backward cummax cummin logcumsumexp kthvalue median mode
    quantile var_mean std std_mean cumprod renorm _weight_norm_interface _weight_norm_interface_backward
    _fused_rms_norm _fused_rms_norm_backward scatter_reduce index_reduce _foreach_norm _pdist_forward
    """.split()  # noqa: SIM905
)


def convolution_flops(batch: int, positions: Sequence[int], weight: Sequence[int]) -> int:
    """A convolution's multiply-adds, twice; ``positions`` are the output's (a transposed one's: the input's).

    ``weight`` is [out, in / groups, *kernel] ([in, out / groups, *kernel] transposed), so groups need no
    mention. The gradient of the input and that of the weight cost the same again each.
    """
    return 2 * batch * prod(positions) * prod(weight)


def _convolution(x: Tensor, weight: Tensor, *rest: Any, out_val: Any = None, **_: Any) -> int:
    transposed = rest[4]
    return convolution_flops(x.shape[0], (x if transposed else out_val).shape[2:], weight.shape)


def _convolution_backward(dout: Tensor, x: Tensor, weight: Tensor, *rest: Any, **_: Any) -> int:
    transposed, mask = rest[4], rest[7]
    once = convolution_flops(x.shape[0], (x if transposed else dout).shape[2:], weight.shape)
    return once * (bool(mask[0]) + bool(mask[1]))


def _product(a: Tensor, b: Tensor) -> int:
    """[.., M, K] times [.., K, N]."""
    return 2 * prod(a.shape) * b.shape[-1]


def _grouped_product(a: Tensor, b: Tensor, *rest: Any, **_: Any) -> int:
    """Rows in groups times a matrix each, or the sum over groups of rows: every row meets one matrix."""
    if a.dim() == 2 and b.dim() == 2:
        return 2 * a.shape[0] * a.shape[1] * b.shape[1]
    return 2 * prod(a.shape) * b.shape[-1]


def _multi_head(q: Tensor, k: Tensor, _v: Tensor, width: int, *_: Any, **__: Any) -> int:
    b, t, s = q.shape[0], q.shape[1], k.shape[1]
    return 2 * b * width * (width * (2 * t + 2 * s) + 2 * t * s)


def _encoder_layer(x: Tensor, width: int, *rest: Any, **_: Any) -> int:
    # Of the matrices after the attention's own two, the first is the feed-forward's: [hidden, width].
    hidden = [w for w in rest if isinstance(w, Tensor) and w.dim() == 2][2].shape[0]
    return _multi_head(x, x, x, width) + 4 * x.shape[0] * x.shape[1] * width * hidden


# name in aten -> formula of (arguments, out_val); raw tensors, not shapes.
_PRODUCTS: dict[str, Formula] = {
    "mm": lambda a, b, *_, **__: _product(a, b),
    "addmm": lambda _, a, b, *__, **___: _product(a, b),
    "bmm": lambda a, b, *_, **__: _product(a, b),
    "baddbmm": lambda _, a, b, *__, **___: _product(a, b),
    "addbmm": lambda _, a, b, *__, **___: _product(a, b),
    "mv": lambda a, b, *_, **__: 2 * prod(a.shape),
    "addmv": lambda _, a, b, *__, **___: 2 * prod(a.shape),
    "dot": lambda a, b, *_, **__: 2 * a.shape[0],
    "vdot": lambda a, b, *_, **__: 2 * a.shape[0],
    "linear": lambda x, w, *_, **__: 2 * prod(x.shape) * w.shape[0],
    "_int_mm": lambda a, b, *_, **__: _product(a, b),
    "_scaled_mm": lambda a, b, *_, **__: _product(a, b),
    "_scaled_mm_v2": lambda a, b, *_, **__: _product(a, b),
    "_addmm_activation": lambda _, a, b, *__, **___: _product(a, b),
    "_grouped_mm": _grouped_product,
    "_scaled_grouped_mm": _grouped_product,
    "_scaled_grouped_mm_v2": _grouped_product,
    "convolution": _convolution,
    "_convolution": _convolution,
    "cudnn_convolution": lambda x, w, *_, out_val, **__: convolution_flops(x.shape[0], out_val.shape[2:], w.shape),
    "convolution_overrideable": _convolution,
    "_slow_conv2d_forward": lambda x, w, *_, out_val, **__: convolution_flops(x.shape[0], out_val.shape[2:], w.shape),
    "convolution_backward": _convolution_backward,
    "_native_multi_head_attention": _multi_head,
    "_transformer_encoder_layer_fwd": _encoder_layer,
}
# Those that write into what they add to: `x.addmm_(a, b)`.
_PRODUCTS |= {f"{name}_": _PRODUCTS[name] for name in ("addmm", "baddbmm", "addbmm", "addmv")}
# Operators of ditscale.kernels by family; each ends in what it does ("_fwd", "_bwd", "_infer").
_OWN_NAMESPACES = ("ditscale", "ditscale_triton", "ditscale_onednn")
_OWN_ATTENTION = ("attention", "attention_qkv")
_OWN_PRODUCTS = ("product",)
_OWN_LIGHT = (
    "layernorm_modulate",
    "gate_residual",
    "gate_residual_layernorm_modulate",
    "bias_gelu",
    "qk_norm_rope",
    "adamw_average",
)


def own_operators() -> dict[Any, str]:
    """Operators of ditscale.kernels that are loaded, to their families."""
    for name in kernels.__all__:  # they register themselves where their functions are loaded
        getattr(kernels, name)
    own = {}
    for packet in flop_registry:
        namespace, _, name = getattr(packet, "_qualified_op_name", "").partition("::")
        if namespace in _OWN_NAMESPACES:
            own[packet] = name.rpartition("_")[0] or name
    return own


def matmul_formulas(*, hardware: bool = False) -> dict[Any, Formula]:
    """Formulas by operator, for ``FlopCounterMode(custom_mapping=...)``.

    Args:
        hardware: attention's backward pass forms the scores again, as fused kernels do. Default: False.
    """
    return _formulas("hardware" if hardware else "matmul")


def _formulas(kind: str) -> dict[Any, Formula]:
    table: dict[Any, Formula] = {}

    def add(namespace: str, name: str, formula: Formula) -> None:
        packet = _operator(namespace, name)
        if packet is not None:
            table[packet] = raw(formula)

    for name, formula in _PRODUCTS.items():
        add("aten", name, formula)
    add("mkldnn", "_linear_pointwise", _PRODUCTS["linear"])
    for namespace, operators in (("aten", torch_attention.ATEN), ("torch_attn", torch_attention.VARLEN)):
        for name, attention in operators.items():
            add(namespace, name, _of_attention(attention, kind))
    for packet, family in own_operators().items():
        if family in _OWN_ATTENTION:
            table[packet] = raw(_of_attention(torch_attention.own(packet), kind))
        elif family in _OWN_PRODUCTS:
            table[packet] = raw(_PRODUCTS["linear"])
        elif family in _OWN_LIGHT:
            table[packet] = raw(flop_registry[packet] if kind == "all" else lambda *_, **__: 0)
    return table


def _of_attention(attention: torch_attention.FusedAttention, kind: str) -> Formula:
    count = {"matmul": attention.products, "hardware": attention.hardware, "all": attention.everything}[kind]
    return lambda *args, **_: count(args)


def all_formulas() -> dict[Any, Formula]:
    """The same under the convention ``all``: attention with its softmax, ditscale's operators as they compute. The
    biases of products, and operations that multiply no matrices, are :func:`all_cost`'s matter.
    """
    return _formulas("all")


def all_cost(
    packet: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, formulas: dict[Any, Formula]
) -> int | None:
    """FLOPs of one operation under the convention ``all``; None where nothing is known of it.

    Args:
        packet: the operation.
        args, kwargs, out: what it was called with and gave.
        formulas: those of ``all_formulas``.
    """
    name = packet.__name__.rstrip("_") if packet.__name__ not in ew.FREE else packet.__name__
    if packet in formulas:
        return formulas[packet](*args, **kwargs, out_val=out) + _bias(name, args, out)
    if name.rstrip("_") in ew.ACCUMULATING and (args[3] if len(args) > 3 else kwargs.get("accumulate", False)):
        return _added(args[0], args[1], args[2])
    if name in ew.FREE:
        return 0
    result = out[0] if isinstance(out, (tuple, list)) else out
    if name in ew.PER_OUTPUT:
        cost = ew.PER_OUTPUT[name]
        if name in ("add", "sub", "rsub") and kwargs.get("alpha", 1) != 1:
            cost += 1  # one of the two is scaled on its way
        if result.is_complex():
            cost *= 6 if name == "mul" else 2
        return cost * int(result.numel())
    if name == "mean":
        return int(args[0].numel()) + int(result.numel())
    if name in ew.PER_INPUT:
        return ew.PER_INPUT[name] * int(args[0].numel())
    if name in ew.PER_SOURCE:
        place = ew.PER_SOURCE[name]
        source: Any = args[place] if len(args) > place else kwargs.get("source", kwargs.get("src"))
        return int(source.numel())
    if name == "native_layer_norm":
        width = int(prod(args[1]))
        rows = int(args[0].numel()) // width
        weights = sum(w is not None for w in args[2:4])
        return ew.layer_norm(rows, width, affine=False)[0] + rows * width * weights
    if name == "native_layer_norm_backward":
        width = int(prod(args[2]))
        rows = int(args[0].numel()) // width
        weight, bias = args[5] is not None, args[6] is not None and args[7][2]
        return ew.layer_norm(rows, width, affine=False)[1] + rows * width * (3 * weight + bias)
    return None


def _added(into: Tensor, indices: Sequence[Tensor | None], values: Tensor) -> int:
    """Elements that ``index_put`` adds: each of ``values``, as often as it is shared."""
    places = [i for i in indices if i is not None]
    if any(
        i.dtype in (torch.bool, torch.uint8) for i in places
    ):  # a mask: how many are chosen, its shape does not tell
        return int(values.numel())
    whole = [n for d, n in enumerate(into.shape) if d >= len(indices) or indices[d] is None]
    return prod(torch.broadcast_shapes(*(i.shape for i in places))) * prod(whole)


def is_light(func: Any) -> bool:
    """Whether an operation that no formula counts is known not to multiply matrices."""
    name = func._overloadpacket.__name__
    namespace = func.namespace
    if namespace == "prims":
        return name in ("convert_element_type", "iota", "broadcast_in_dim", "device_put", "fma")
    if namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
        return True  # communication
    if namespace not in ("aten", "prim"):
        return False
    base = name.rstrip("_") or name
    tags = set(func.tags)
    if torch.Tag.pointwise in tags or torch.Tag.view_copy in tags or func.is_view:
        return True
    if getattr(torch.Tag, "reduction", None) in tags:
        return True
    known = (
        ew.FREE,
        ew.PER_OUTPUT,
        ew.PER_INPUT,
        ew.PER_SOURCE,
        LIGHT,
        ("mean", "native_layer_norm", "native_layer_norm_backward"),
    )
    return any(base in group or name in group for group in known) or base.startswith("_foreach_")


def _bias(name: str, args: Sequence[Any], out: Any) -> int:
    """The additions of a bias that rides on a product, or of its gradient."""
    if name in ("addmm", "baddbmm", "addmv", "addbmm", "_addmm_activation"):
        return int(out.numel())
    if name in ("linear", "product", "convolution", "_convolution") and len(args) > 2 and args[2] is not None:
        return int(out.numel())
    if name == "convolution_backward" and args[-1][2]:
        return int(args[0].numel())
    return 0


def raw(formula: Formula) -> Formula:
    """A copy that FlopCounterMode calls with tensors; by itself it would hand over shapes."""

    def counted(*args: Any, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    counted._get_raw = True  # type: ignore[attr-defined]
    return counted


def _operator(namespace: str, name: str) -> Any:
    """An operator by name, or None where this torch or this installation does not have it."""
    try:
        return getattr(getattr(torch.ops, namespace), name)
    except AttributeError:
        return None
