"""The CPU engine: a packed model of the llama family, one native call a token (`kernels/cpu/src/decoder.cpp`).

It computes what the Transformers model computes on backend `cpu`, in another order: fp32 sums differ, and where an
activation lies on the border of two codes, so does a code. KV16 is held in fp16, and so is a head that is not
quantized; KV<r> holds the codes themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from abq_llm.errors import AbqError
from abq_llm.kernels import choose_backend, cpu
from abq_llm.kernels.cpu import native
from abq_llm.linear import QuantLinear
from abq_llm.scheme import IntFormat, Scheme

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # the angles of a position do not depend on the length
LANES = 16  # sizes are multiples of it
LINEARS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def unsupported(model: nn.Module, capacity: int = 1) -> str | None:
    """None if the engine can run `model` on up to `capacity` tokens, else the reason why not."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in MODEL_TYPES:
        return f"model type {getattr(config, 'model_type', None)!r} is none of {', '.join(MODEL_TYPES)}"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act!r} is not 'silu'"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in STATIC_ROPE:
        return f"RoPE of type {rope!r} is none of {', '.join(STATIC_ROPE)}"
    blocks: Any = model.model.layers  # type: ignore[union-attr]
    linears = [block.get_submodule(name) for block in blocks for name in LINEARS]
    if not all(isinstance(linear, QuantLinear) for linear in linears):
        return "its linears are not packed"
    if len({linear.scheme for linear in linears}) > 1:
        return "its linears have several schemes"
    if any(linear.weight_packed.device.type != "cpu" for linear in linears):
        return "it is not on the CPU"
    for linear in linears:
        if choose_backend(linear.backend, linear.weight_packed.device) != "cpu":
            return native.missing() or f"its backend is {linear.backend!r}"
    dimension = blocks[0].self_attn.head_dim
    cache: IntFormat | None = getattr(blocks[0].self_attn, "kv_format", None)
    step = 2 * LANES if cache and cache.bits <= 4 else LANES
    sizes = {"head_dim": (dimension, step), "hidden_size": (config.hidden_size, LANES)}
    sizes["intermediate_size"] = (config.intermediate_size, LANES)
    for name, (size, multiple) in sizes.items():
        if size % multiple:
            return f"{name} {size} is not a multiple of {multiple}"
    most = min(config.max_position_embeddings, getattr(config, "sliding_window", None) or capacity)
    return None if capacity <= most else f"{capacity} tokens are more than its {most} positions"


class CpuEngine:
    """A model with its keys and values. Call it with the next tokens; it remembers those before.

    Args:
        model: packed, on a CPU. The engine lays its weights out anew; norms and biases are used where they lie.
        capacity: how many tokens fit; at most what the model's positions and its sliding window allow.
        use_up: take each packed weight out of the model once it is laid out, so that memory holds it once. The model is
            of no other use then.

    Raises:
        AbqError: see `unsupported`.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, *, use_up: bool = False) -> None:
        if reason := unsupported(model, capacity):
            raise AbqError(f"the CPU engine cannot run this model: {reason}")
        config: Any = model.config
        self.capacity, self.vocabulary = capacity, config.vocab_size
        self._use_up = use_up
        self._embedding = _halved(model.get_input_embeddings().weight)  # type: ignore[union-attr,arg-type]
        self._kept: list[Tensor] = []  # what the decoder points to
        blocks: Any = model.model.layers
        first = blocks[0].self_attn
        scheme: Scheme = first.q_proj.scheme
        cache: IntFormat | None = getattr(first, "kv_format", None)
        cosine, sine = self._angles(model, capacity)
        head_rows, head_weight, head_bits = self._head(model)
        self._decoder = native.module().Decoder(
            level=native.level(),
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            dimension=first.head_dim,
            vocabulary=self.vocabulary,
            capacity=capacity,
            epsilon=config.rms_norm_eps,
            activation_bits=scheme.activation.bits if scheme.activation else 16,
            cache_bits=cache.bits if cache else 16,
            symmetric=scheme.activation_symmetric,
            blocks=[self._block(block) for block in blocks],
            cosine=cosine,
            sine=sine,
            norm=self._address(model.model.norm.weight),
            head_rows=head_rows,
            head_weight=head_weight,
            head_bits=head_bits,
        )

    def __call__(self, tokens: Tensor, *, every: bool = False) -> Tensor:
        """tokens int64 [T], T >= 1 -> fp32 logits [vocabulary] behind the last, or behind `every` one: [T, vocabulary].

        Raises:
            AbqError: they do not fit.
        """
        count = len(tokens)
        if not 1 <= count <= self.capacity - self.length:
            raise AbqError(f"{count} tokens after {self.length}: the engine was made for {self.capacity}")
        embeddings = self._embedding[tokens].float().contiguous()
        logits = torch.empty(count if every else 1, self.vocabulary)
        self._decoder.step(embeddings.data_ptr(), count, logits.data_ptr(), every, torch.get_num_threads())
        return logits if every else logits[0]

    @property
    def length(self) -> int:
        """How many tokens it remembers."""
        length: int = self._decoder.length
        return length

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise AbqError(f"cannot go back to {length} tokens: there are {self.length}")
        self._decoder.truncate(length)

    def generate(
        self,
        tokens: Tensor,
        limit: int,
        *,
        stop: Collection[int] = (),
        write: Callable[[int], None] = lambda token: None,
    ) -> list[int]:
        """Continue int64 [T] greedily by up to `limit` tokens, the first of `stop` included; `write` gets each one."""
        found: list[int] = []
        logits = self(tokens)
        while True:
            token = int(logits.argmax())
            found.append(token)
            write(token)
            if len(found) == limit or token in stop:
                return found
            logits = self(torch.tensor([token]))

    def _address(self, tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int:
        """Of `tensor` in that dtype, contiguous and kept alive; 0 for none."""
        if tensor is None:
            return 0
        self._kept.append(tensor.detach().to(dtype).contiguous())
        return self._kept[-1].data_ptr()

    def _prepared(self, linear: QuantLinear) -> int:
        prepared, _ = cpu.prepare(linear.packed_weight(), linear.scheme, linear.in_features)
        if self._use_up:
            linear.weight_packed = linear.weight_packed.new_empty(0)
        return self._address(prepared, torch.uint8)

    def _block(self, block: Any) -> list[int]:
        attention = block.self_attn
        norms = [block.input_layernorm, block.post_attention_layernorm]
        norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        addresses = [self._address(norm and norm.weight) for norm in norms]
        for linear in map(block.get_submodule, LINEARS):
            addresses += [self._prepared(linear), self._address(linear.bias)]
        return addresses

    def _angles(self, model: Any, capacity: int) -> tuple[int, int]:
        """Addresses of cosine and sine, [capacity, dimension / 2]."""
        table = model.model.rotary_emb(torch.zeros(1), torch.arange(capacity)[None])
        cosine, sine = (self._address(part[0, :, : part.shape[-1] // 2]) for part in table)
        return cosine, sine

    def _head(self, model: Any) -> tuple[int, int, int]:
        """(fp16 rows, packed weight, bits of its input): one of the first two is 0."""
        head = model.lm_head
        if isinstance(head, QuantLinear):
            return 0, self._prepared(head), head.scheme.activation.bits if head.scheme.activation else 16
        tied = head.weight is model.get_input_embeddings().weight and self._embedding.dtype == torch.float16
        return self._address(self._embedding if tied else head.weight, torch.float16), 0, 16


def _halved(weight: Tensor) -> Tensor:
    """In fp16 where that loses nothing, as with a checkpoint in fp16 that was loaded in fp32."""
    half = weight.detach().half()
    return half if torch.equal(half.to(weight.dtype), weight) else weight.detach()
