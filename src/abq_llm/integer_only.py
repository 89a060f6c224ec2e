"""Integer-only inference of a packed model (I-LLM, arXiv:2405.17849): its blocks compute on integers alone.

    with integer_only(model):
        model(tokens, use_cache=False)

Floats are left where the model is not quantized: the embedding, whose rows become integers as they enter the first
block, the table of cosines, which depends on positions only, and the head, for which the last norm's integers become
floats again. docs/methods/i_llm.md has the bits of everything in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from abq_llm.architectures import Architecture, LinearPair, NormPair, ValueOutputPair, architecture_of
from abq_llm.errors import AbqError
from abq_llm.kernels import integer
from abq_llm.kernels.integer import Dyadic, Fixed, quantize
from abq_llm.linear import QuantLinear
from abq_llm.packing import unpack_planes
from abq_llm.scheme import IntFormat

ACTIVATIONS = {"llama": "silu", "mistral": "silu", "qwen2": "silu", "qwen3": "silu", "opt": "relu"}
WIDE = IntFormat(16)  # the residual stream, and what waits to be multiplied by constants
CONSTANT_BITS = 24  # of the largest: all numbers of a norm, a bias, a weight's scales ... share an exponent
MAX_SMOOTHING = 32.0
ROWS = 128  # of scores at a time: bounds the memory that they take


@contextmanager
def integer_only(model: PreTrainedModel, *, bits: int = 8, smooth: bool = True) -> Iterator[None]:
    """Within, the blocks of a packed model on the CPU compute on integers, without a KV cache.

    Linears see what the scheme says. Queries, scores, probabilities, gates, and keys and values that the scheme leaves
    alone, have `bits` bits (8 in the paper). `smooth`: the non-linear act-smooth, see `smoothing`.

    Raises:
        AbqError: another device or family, another activation function, a linear that is not packed, or a scheme whose
            activations stay floating point.
    """
    architecture = _check(model)
    parent = model.get_submodule(architecture.blocks.rpartition(".")[0])
    blocks = model.get_submodule(architecture.blocks).children()
    patches: dict[nn.Module, Callable[..., Any]] = {
        block: _Block(block, architecture, IntFormat(bits), smooth) for block in blocks
    }
    for name, child in parent.named_children():
        if name in ("norm", "final_layer_norm"):
            patches[child] = _FinalNorm(child)
        elif name == "rotary_emb":
            patches[child] = _Rotary(child)
    for module, forward in patches.items():
        module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in patches:
            del module.forward


def _check(model: PreTrainedModel) -> Architecture:
    kind = model.config.model_type
    if kind not in ACTIVATIONS:
        raise AbqError(f"integer-only inference of {kind!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    activation = getattr(model.config, "hidden_act", getattr(model.config, "activation_function", None))
    if activation != ACTIVATIONS[kind]:
        raise AbqError(f"integer-only inference of {kind!r} has {ACTIVATIONS[kind]!r}, not {activation!r}")
    if model.device.type != "cpu":
        raise AbqError(f"integer-only inference runs on a CPU, the model is on {model.device}")
    architecture = architecture_of(model.config)
    for block in model.get_submodule(architecture.blocks).children():
        for name in architecture.linears:
            layer = block.get_submodule(name)
            if not isinstance(layer, QuantLinear):
                raise AbqError(f"integer-only inference needs a packed model, {name} is a {type(layer).__name__}")
            if layer.scheme.activation is None:
                raise AbqError(f"integer-only inference needs quantized activations, the scheme is {layer.scheme}")
    return architecture


def fixed(x: Tensor | float) -> Fixed:
    """Floats to integers of `CONSTANT_BITS` bits and a sign, all on one power of two."""
    x = torch.as_tensor(x, dtype=torch.float64)
    k = CONSTANT_BITS - torch.frexp(x.abs().max()).exponent.long()
    return Fixed(torch.ldexp(x, k).round().long(), k)


def from_float(x: Tensor) -> Dyadic:
    """x [..., H] -> 16 bits, each row on its own scale."""
    x = x.double()
    k = 32 - torch.frexp(x.abs().amax(-1, keepdim=True)).exponent.long()
    return quantize(Dyadic(torch.ldexp(x, k).round().long(), torch.ones_like(k), k), WIDE)


def to_float(x: Dyadic) -> Tensor:
    """fp64, of the shape of x."""
    return torch.ldexp((x.codes * x.m).double(), -x.k)


def smoothing(gate: nn.Module, up: nn.Module) -> Tensor:
    """s [N] for which the rows of `gate` times s and those of `up` over s are equally long, but for a common factor.

    What a norm puts out is about alike in all channels, so that the length of a row says how large its output gets.
    """
    gate_log, up_log = (layer.dequantize().norm(dim=1).clamp_min(1e-20).log() for layer in (gate, up))  # type: ignore[operator]
    log_s = (up_log - gate_log) / 2
    return (log_s - log_s.mean()).exp().clamp(1 / MAX_SMOOTHING, MAX_SMOOTHING)


class _Linear:
    """The integers of a `QuantLinear` whose output is multiplied by `factor` [N]."""

    def __init__(self, layer: nn.Module, factor: Tensor | float = 1.0) -> None:
        assert isinstance(layer, QuantLinear) and layer.scheme.weight and layer.scheme.activation
        self.scheme, self.activation = layer.scheme, layer.scheme.activation
        zero_point = layer.weight_zero_point
        if zero_point is None:
            zero_point = torch.full_like(layer.weight_scale, layer.scheme.weight.fixed_zero_point or 0)
        group = torch.arange(layer.in_features) // (layer.scheme.group_size or layer.in_features)
        self.weight = unpack_planes(layer.weight_packed, layer.in_features).short() - zero_point.short()[:, group]
        factor = torch.as_tensor(factor).expand(layer.out_features)
        self.scale = fixed(layer.weight_scale * factor[:, None])
        self.bias = None if layer.bias is None else fixed(layer.bias * factor)

    def __call__(self, x: Dyadic) -> Dyadic:
        """x [..., K], quantized as in the scheme -> wide sums [..., N]."""
        return integer.matmul(x, self.weight.long(), self.scale, self.scheme.group_size, self.bias)


class _Norm:
    """The integers of an RMSNorm or a LayerNorm: 16 bits -> wide products."""

    def __init__(self, norm: Any) -> None:
        eps = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon
        size = norm.weight.numel()
        self.weight, self.eps = fixed(norm.weight.detach().double() * size**0.5), fixed((size * eps) ** 0.5)
        self.bias = fixed(norm.bias.detach()) if isinstance(norm, nn.LayerNorm) else None

    def __call__(self, x: Dyadic) -> Dyadic:
        if self.bias is None:
            return integer.rms_norm(x, self.weight, self.eps)
        return integer.layer_norm(x, self.weight, self.bias, self.eps)


class _FinalNorm:
    """The norm before the head, and back to floats."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm, self.dtype = _Norm(norm), next(norm.parameters()).dtype

    def __call__(self, x: Dyadic) -> Tensor:
        return to_float(self.norm(x)).to(self.dtype)


class _Rotary:
    """Cosines and sines as integers [2, B, T, d]."""

    def __init__(self, rotary: nn.Module) -> None:
        self.table = rotary.forward

    def __call__(self, x: Tensor, position_ids: Tensor) -> Fixed:
        return fixed(torch.stack(self.table(x, position_ids)))


class _Block:
    """A decoder block, [B, T, H] -> [B, T, H]; 16 bits between the blocks."""

    def __init__(self, block: nn.Module, architecture: Architecture, between: IntFormat, smooth: bool) -> None:
        (norm_1, qkv), (norm_2, into) = ((p.norm, p.linears) for p in architecture.pairs if isinstance(p, NormPair))
        (output,) = (pair.output for pair in architecture.pairs if isinstance(pair, ValueOutputPair))
        (down,) = (pair.consumer for pair in architecture.pairs if isinstance(pair, LinearPair))
        self.norm_1, self.norm_2 = _Norm(block.get_submodule(norm_1)), _Norm(block.get_submodule(norm_2))
        linears = [block.get_submodule(name) for name in (*qkv, output)]
        self.attention = _Attention(block.get_submodule(architecture.attention), linears, between)
        self.mlp = _Mlp([block.get_submodule(name) for name in (*into, down)], between, smooth)
        self.activation = self.mlp.down.activation

    def __call__(
        self,
        hidden: Tensor | Dyadic,
        attention_mask: Tensor | None = None,
        position_embeddings: Fixed | None = None,
        past_key_values: object = None,
        **_: object,
    ) -> Dyadic:
        """attention_mask: bool [B, 1, T, T], None for a causal one; position_embeddings: of `_Rotary`."""
        if past_key_values is not None:
            raise AbqError("integer-only inference has no KV cache: call the model with use_cache=False")
        x = from_float(hidden) if isinstance(hidden, Tensor) else hidden
        y = self.attention(quantize(self.norm_1(x), self.activation), attention_mask, position_embeddings)
        x = quantize(integer.add(x, y), WIDE)
        y = self.mlp(quantize(self.norm_2(x), self.activation))
        return quantize(integer.add(x, y), WIDE)


class _Attention:
    """[B, T, H], quantized as in the scheme -> 16 bits [B, T, H]."""

    def __init__(self, attention: Any, linears: list[nn.Module], between: IntFormat) -> None:
        self.q, self.k, self.v, self.o = (_Linear(layer) for layer in linears)
        self.norms = [_Norm(getattr(attention, name)) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
        self.head_dim, self.scaling = attention.head_dim, fixed(attention.scaling)
        self.between, self.kv = between, self.o.scheme.kv or between

    def __call__(self, x: Dyadic, mask: Tensor | None, rotary: Fixed | None) -> Dyadic:
        q, k, v = (self.heads(linear(x)) for linear in (self.q, self.k, self.v))
        q, k = quantize(q, WIDE), quantize(k, WIDE)
        if self.norms:
            q, k = (quantize(norm(part), WIDE) for norm, part in zip(self.norms, (q, k), strict=True))
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        y = self.mix(quantize(q, self.between), quantize(k, self.kv), quantize(v, self.kv), mask)
        codes, exponent = integer.on_one_scale(y, 1)  # of all heads of a token
        y = Dyadic(codes.transpose(1, 2).flatten(2), torch.ones_like(exponent[:, 0]), exponent[:, 0])
        return quantize(self.o(quantize(y, self.o.activation)), WIDE)

    def heads(self, x: Dyadic) -> Dyadic:
        """[B, T, heads * d] -> [B, heads, T, d], with scales [B, 1, T, 1]."""
        return Dyadic(x.codes.unflatten(-1, (-1, self.head_dim)).transpose(1, 2), x.m[:, None], x.k[:, None])

    def mix(self, q: Dyadic, k: Dyadic, v: Dyadic, mask: Tensor | None) -> Dyadic:
        """q [B, heads, T, d], k and v [B, kv_heads, T, d] -> 16 bits [B, heads, T, d].

        Scores are compared, and values added up, over the tokens: these get one scale.
        """
        shared = q.codes.shape[1] // k.codes.shape[1]
        keys, key_k = (part.repeat_interleave(shared, 1) for part in integer.on_one_scale(k, 2))
        values, value_k = (part.repeat_interleave(shared, 1) for part in integer.on_one_scale(v, 2))
        if mask is None:
            mask = torch.ones(q.codes.shape[2], keys.shape[2], dtype=torch.bool).tril()
        queries = zip(*(part.split(ROWS, 2) for part in q), mask.split(ROWS, -2), strict=True)
        mixed = []
        for codes, m, exponent, rows in queries:
            scores = Dyadic(codes @ keys.transpose(2, 3), m * self.scaling.codes, exponent + key_k + self.scaling.k)
            p = integer.clipped_softmax(scores, rows, self.between)
            mixed.append(quantize(Dyadic(p.codes @ values, p.m, p.k + value_k), WIDE))
        return Dyadic(*(torch.cat(parts, 2) for parts in zip(*mixed, strict=True)))


class _Mlp:
    """[B, T, H], quantized as in the scheme -> 16 bits [B, T, H]. Its linears: gate, up and down, or up and down."""

    def __init__(self, linears: list[nn.Module], between: IntFormat, smooth: bool) -> None:
        *gates, up, down = linears
        s = smoothing(gates[0], up) if smooth and gates else torch.ones(1)
        self.gate = _Linear(gates[0], s) if gates else None
        self.up, self.down = _Linear(up, 1 / s), _Linear(down)
        self.smooth, self.between = fixed(1 / s), between

    def __call__(self, x: Dyadic) -> Dyadic:
        up = self.up(x)
        if self.gate is None:
            y = up._replace(codes=up.codes.clamp_min(0))
        else:
            y = integer.swiglu(quantize(self.gate(x), self.between), quantize(up, self.between), self.smooth)
        return quantize(self.down(quantize(y, self.down.activation)), WIDE)


def rotate(x: Dyadic, rotary: Fixed) -> Dyadic:
    """RoPE of x [B, heads, T, d]."""
    cos, sin = rotary.codes[:, :, None]
    a, b = x.codes.chunk(2, -1)
    return Dyadic(x.codes * cos + torch.cat([-b, a], -1) * sin, x.m, x.k + rotary.k)
