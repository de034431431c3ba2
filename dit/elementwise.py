"""What elementwise arithmetic costs: one table, used by the ledger's convention ``all`` and by the tracer
alike.

A FLOP is one addition, subtraction, multiplication, division, comparison, or one call of a special function
(square root, exponential, logarithm, sine, cosine, tanh). Moving, selecting, casting and filling cost
nothing; a sum of n numbers costs n. Complex numbers: a product is 6, a sum 2. No torch here; the keys are
names of aten operations.
"""

from __future__ import annotations

from typing import Final

# Per element of the result.
PER_OUTPUT: Final[dict[str, int]] = {
    **dict.fromkeys(("add", "sub", "rsub", "mul", "div", "neg", "abs", "reciprocal", "pow", "square"), 1),
    **dict.fromkeys(("sqrt", "rsqrt", "exp", "expm1", "log", "log1p", "sin", "cos", "tanh", "erf"), 1),
    **dict.fromkeys(("maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge", "floor_divide", "remainder"), 1),
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "relu", "threshold_backward", "hardtanh", "sign"), 1),
    **dict.fromkeys(("logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not"), 0),
    "sigmoid": 3,  # exp, add, divide
    "sigmoid_backward": 3,
    "tanh_backward": 3,
    "silu": 4,  # sigmoid, times x
    "silu_backward": 8,
    "gelu": 8,  # polynomial 4, sigmoid 3, times x
    "gelu_backward": 16,  # polynomial 4, sigmoid 3, slope 8, times the gradient
    "lerp": 3,
    "addcmul": 3,
    "addcdiv": 3,
    "mse_loss": 3,
    "mse_loss_backward": 3,
    "native_dropout": 2,
    "native_dropout_backward": 2,
    "_softmax": 5,  # maximum, subtract, exp, sum, divide
    "_safe_softmax": 5,
    "_log_softmax": 5,
    "_softmax_backward_data": 4,  # product, sum, subtract, product
    "_log_softmax_backward_data": 4,
}

# Per element of the first argument: what is reduced, ranked or added up.
PER_INPUT: Final[dict[str, int]] = {
    **dict.fromkeys(("sum", "prod", "amax", "amin", "max", "min", "argmax", "argmin", "all", "any", "cumsum"), 1),
    **dict.fromkeys(("topk", "sort", "embedding_dense_backward"), 1),
    "linalg_vector_norm": 2,
    "logsumexp": 4,
    "var": 4,
}

# Per element that is added into another tensor: the position of that argument.
PER_SOURCE: Final[dict[str, int]] = {"index_add": 3, "scatter_add": 3}

# Adds one number for every element where it is told to accumulate, as the gradient of `x[index]` does; else it moves them.
ACCUMULATING: Final = frozenset(("index_put", "_unsafe_index_put", "_index_put_impl"))

# Operations that move, select, make or describe tensors.
FREE: Final[frozenset[str]] = frozenset(
    """
    alias arange as_strided_copy bernoulli bernoulli_ cat clone _conj constant_pad_nd contiguous copy copy_
    detach_copy embedding empty empty_like empty_permuted empty_strided expand_copy exponential_ eye fill
    fill_ flip full full_like gather index _unsafe_index _unsafe_index_put index_copy index_fill index_put
    index_select isinf isnan is_nonzero item _local_scalar_dense _has_compatible_shallow_copy_type linspace
    masked_fill masked_scatter masked_select new_empty new_empty_strided new_full new_ones new_zeros nonzero
    normal_ one_hot ones ones_like permute_copy rand rand_like randint randn randn_like randperm repeat
    repeat_interleave resize_ roll scalar_tensor scatter select_backward select_scatter set_ slice_backward
    slice_scatter split_copy stack tril triu _to_copy tile to_copy unbind_copy uniform_ _unsafe_view where
    zero zero_ zeros zeros_like lift_fresh lift_fresh_copy _efficientzerotensor
    value_selecting_reduction_backward bucketize _reshape_copy _reshape_alias_copy diagonal_backward
    as_strided_scatter diagonal_scatter view_as_real_copy view_as_complex_copy _assert_async _assert_scalar
    sym_size sym_numel sym_stride squeeze_ swapaxes_ swapdims_ t_ transpose_ unsafe_chunk unsafe_split
    unsafe_split_with_sizes unsqueeze_ sym_storage_offset ceil floor round trunc bincount histc searchsorted unique
    _unique2 unique_dim unique_consecutive _has_same_storage_numel is_same_size _new_zeros_with_same_feature_meta
    pixel_shuffle pixel_unshuffle channel_shuffle block_diag take rot90 complex
    """.split()  # noqa: SIM905
)


def layer_norm(rows: int, width: int, *, affine: bool) -> tuple[int, int]:
    """LayerNorm forward and backward. Per element: mean 1, centring 1, square and sum 2, normalise 1; 4 a
    row.

    Backward: normalised 2, two sums 3, dx 5; 2 a row. A weight and a bias: 2 forward; backward 3 and 1.
    """
    return rows * ((5 + 2 * affine) * width + 4), rows * ((10 + 4 * affine) * width + 2)


def rms_norm(rows: int, width: int, *, weighted: bool) -> tuple[int, int]:
    """RMS norm forward and backward. Per element: square 1, sum 1, normalise 1, weight 1; 3 a row.

    Backward as autograd writes it: the weight 3, the normalised value 2 and a sum, the mean 1, the square 3,
    and 1 where the two gradients meet; 3 a row. A sum over one number is no work.
    """
    backward = 7 + (width > 1) + 3 * weighted
    return rows * ((3 + weighted) * width + 3), rows * (backward * width + 3)


def gelu(elements: int) -> tuple[int, int]:
    """GELU without its bias, forward and backward."""
    return PER_OUTPUT["gelu"] * elements, PER_OUTPUT["gelu_backward"] * elements


def silu(elements: int) -> tuple[int, int]:
    """SiLU, forward and backward."""
    return PER_OUTPUT["silu"] * elements, PER_OUTPUT["silu_backward"] * elements


def swiglu(elements: int) -> tuple[int, int]:
    """``silu(a) * b`` for ``elements`` pairs, forward and backward."""
    return (PER_OUTPUT["silu"] + 1) * elements, (PER_OUTPUT["silu_backward"] + 2) * elements


def softmax(elements: int) -> tuple[int, int]:
    """Softmax, forward and backward."""
    return PER_OUTPUT["_softmax"] * elements, PER_OUTPUT["_softmax_backward_data"] * elements


def rotate(elements: int) -> tuple[int, int]:
    """Rotary embedding of ``elements`` numbers: a complex product (6) for every two, each way."""
    return 3 * elements, 3 * elements
