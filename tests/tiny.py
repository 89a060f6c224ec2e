"""Tiny random models and tokenizers that every test can build in milliseconds."""

from __future__ import annotations

import string
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB = 128
BOS, EOS = 1, 2

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
SEQUENTIAL = {"multi_query": False, "parallel_attn": False}
SOFTCAPS = {
    "attn_logit_softcapping": 4.0,
    "final_logit_softcapping": 8.0,
    "attn_implementation": "eager",  # the default of old Transformers is SDPA, which has no caps
}
EVERY_SECOND_FULL = {"sliding_window_pattern": 2}

# What a method or a backend has to get right, as (model_type, overrides): pytest.mark.parametrize over its items.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-gqa-tied": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama3": ("llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": 8}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 32}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.1}),
    "falcon": ("falcon", {"ffn_hidden_size": 96, "bias": True}),
    "falcon-new": ("falcon", {"ffn_hidden_size": 96, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-rw": ("falcon", {"ffn_hidden_size": 96, "bias": True, "alibi": True} | SEQUENTIAL),
    "gemma2": ("gemma2", {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 8} | SOFTCAPS),
    "gemma3": ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 8} | EVERY_SECOND_FULL),
    "phi3": ("phi3", {"num_key_value_heads": 2, "pad_token_id": 0, "rope_parameters": PARTIAL_ROPE}),
    "mixtral": ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 4}),
}


def tiny_config(model_type: str = "llama", **overrides: Any) -> PreTrainedConfig:
    """Hidden 64, 2 layers, 4 heads of 16, vocabulary 128."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return AutoConfig.for_model(model_type, **(sizes | overrides))


def tiny_model(model_type: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 decoder in evaluation mode, of `tiny_config`.

    Two input channels of each norm and of each linear are scaled up, and biases are not zero, so that activations and
    weights have outliers to quantize. The same arguments give the same weights.
    """
    config = tiny_config(model_type, **overrides)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        head = model.get_output_embeddings()
        for module in model.modules():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if weight is None or module is head or isinstance(module, torch.nn.Embedding):
                continue
            outliers = torch.randperm(weight.shape[-1])[:2]
            if weight.any():
                weight[..., outliers] *= 6
            else:  # a norm that multiplies by 1 + weight
                weight.normal_(std=0.1)[outliers] += 5
            if bias is not None:
                bias.normal_(std=0.1)
        for parameter in model.parameters():
            if parameter.dim() == 3:  # all experts of a block
                parameter[..., torch.randperm(parameter.shape[-1])[:2]] *= 6
    return model.eval()


def tiny_tokenizer(vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    """One token per printable ASCII character or newline, so that text and tokens are each other's mirror.

    Ids 0, 1, 2 are <unk>, <s>, </s>; ids after the characters are tokens that no text contains. No BOS is added.
    """
    characters = ["\n", *string.digits, *string.ascii_letters, *string.punctuation, " "]
    names = ["<unk>", "<s>", "</s>", *characters]
    names += [f"<unused{n}>" for n in range(vocab_size - len(names))]
    tokenizer = Tokenizer(WordLevel({name: n for n, name in enumerate(names[:vocab_size])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )
