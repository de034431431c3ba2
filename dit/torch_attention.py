"""What fused attention operators cost, told from their arguments: torch's own, those for packed sequences, ditscale's.

Every query meets every key of its sequence: masks, windows and causality spare nothing here, as in torch's counter. Torch
2.13 counts nothing for attention on the CPU, takes heads for tokens in ``_flash_attention_forward`` and its like, and
charges backward passes for the scores that are formed again, whatever they run on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ditscale.errors import InputError
from ditscale.kernels.attn import cost

Arguments = Sequence[Any]


@dataclass(frozen=True)
class FusedAttention:
    """One operator.

    Attributes:
        backward: it computes gradients.
        scores: from its arguments, how many scores there are, over samples and heads.
        widths: from its arguments, the width of a key and of a value.
    """

    backward: bool
    scores: Callable[[Arguments], int]
    widths: Callable[[Arguments], tuple[int, int]]

    def products(self, args: Arguments) -> int:
        """The two products, or their four gradients."""
        flops = cost.attention_flops_backward if self.backward else cost.attention_flops_forward
        return flops(1, 1, 1, self.scores(args), sum(self.widths(args))) // 2

    def hardware(self, args: Arguments) -> int:
        """The same; a backward pass forms the scores again instead of having kept them."""
        if not self.backward:
            return self.products(args)
        sizes = (1, 1, 1, self.scores(args), self.widths(args)[0])
        again = cost.attention_flops_backward_hardware(*sizes) - cost.attention_flops_backward(*sizes)
        return self.products(args) + again

    def everything(self, args: Arguments) -> int:
        """The products, and the softmax between them."""
        softmax = cost.attention_softmax_flops_backward if self.backward else cost.attention_softmax_flops_forward
        return self.products(args) + softmax(1, 1, 1, self.scores(args))


def _widths(first: int) -> Callable[[Arguments], tuple[int, int]]:
    """Query and value at places ``first`` and ``first + 2``."""
    return lambda args: (args[first].shape[-1], args[first + 2].shape[-1])


def _dense(first: int, *, backward: bool) -> FusedAttention:
    """Query, key, value [batch, heads, tokens, width] from the argument ``first`` on."""

    def scores(args: Arguments) -> int:
        b, h, t, _ = args[first].shape
        return int(b * h * t * args[first + 1].shape[2])

    return FusedAttention(backward, scores, _widths(first))


def _tokens_first(first: int, starts: int, *, backward: bool) -> FusedAttention:
    """[batch, tokens, heads, width]; with offsets at ``starts`` (and the keys' behind them) [.., all tokens, heads, width]."""

    def scores(args: Arguments) -> int:
        q, k, heads = args[first], args[first + 1], args[first].shape[-2]
        if args[starts] is None:
            return int(q.shape[0] * heads * q.shape[1] * k.shape[1])
        return int(heads * _pairs(args[starts], args[starts + 1]))

    return FusedAttention(backward, scores, _widths(first))


def _pairs(starts: Tensor, key_starts: Tensor | None) -> int:
    """Queries times keys, summed over packed sequences, from the offsets where each begins."""
    if starts.is_meta or isinstance(starts, FakeTensor):
        raise InputError(
            "model: expected attention whose cost its shapes tell, got packed sequences of unknown lengths"
        )
    lengths = starts.diff().tolist()
    key_lengths = lengths if key_starts is None else key_starts.diff().tolist()
    return sum(t * s for t, s in zip(lengths, key_lengths, strict=True))


ATEN: Final[dict[str, FusedAttention]] = {
    "_scaled_dot_product_attention_math_for_mps": _dense(0, backward=False),
    "_flash_attention_forward": _tokens_first(0, 3, backward=False),
    "_flash_attention_backward": _tokens_first(1, 6, backward=True),
    "_efficient_attention_forward": _tokens_first(0, 4, backward=False),
    "_efficient_attention_backward": _tokens_first(1, 6, backward=True),
}
for _kind in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"):
    ATEN[f"_scaled_dot_product_{_kind}"] = _dense(0, backward=False)
    ATEN[f"_scaled_dot_product_{_kind}_backward"] = _dense(1, backward=True)
ATEN["_scaled_dot_product_fused_attention_overrideable"] = _dense(0, backward=False)
ATEN["_scaled_dot_product_fused_attention_overrideable_backward"] = _dense(1, backward=True)

# torch.nn.attention.varlen; its namespace fills when that is imported.
VARLEN: Final[dict[str, FusedAttention]] = {
    "_varlen_attn": _tokens_first(0, 3, backward=False),
    "_varlen_attn_out": _tokens_first(1, 4, backward=False),
    "_varlen_attn_backward": _tokens_first(1, 6, backward=True),
}


def own(packet: Any) -> FusedAttention:
    """One of ditscale's: q, k, v [B, H, T, K] or qkv [B, T, 3, H, K], found by their names in its schema."""
    places = {argument.name: i for i, argument in enumerate(packet.default._schema.arguments)}

    def given(args: Arguments, *names: str) -> Iterator[Any]:
        """Arguments by name; None where the operator has none such, or the call gave none."""
        for name in names:
            place = places.get(name, len(args))
            yield args[place] if place < len(args) else None

    def scores(args: Arguments) -> int:
        q, k, qkv, starts, key_starts, both = given(args, "q", "k", "qkv", "cu_q", "cu_k", "cu")
        if qkv is not None:
            b, t, _three, h, _ = qkv.shape
            return int(b * h * t * t if both is None else h * _pairs(both, None))
        b, h, t, _ = q.shape
        return int(b * h * t * k.shape[2] if starts is None else h * _pairs(starts, key_starts))

    def widths(args: Arguments) -> tuple[int, int]:
        head = next(x for x in given(args, "q", "qkv") if x is not None)
        return head.shape[-1], head.shape[-1]

    return FusedAttention("dout" in places, scores, widths)
