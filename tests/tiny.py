"""Tiny random models and tokenizers that every test can build in milliseconds."""

from __future__ import annotations

import string
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 128
BOS, EOS = 1, 2

# What a method or a backend has to get right, as (model_type, overrides): pytest.mark.parametrize over its items.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-gqa-tied": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"num_key_value_heads": 2}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 32}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.1}),
}


def tiny_model(model_type: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 decoder in evaluation mode: hidden 64, 2 layers, 4 heads of 16, vocabulary 128.

    Two input channels of each norm and of each linear are scaled up, and biases are not zero, so that activations and
    weights have outliers to quantize. The same arguments give the same weights.
    """
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
    config = AutoConfig.for_model(model_type, **(sizes | overrides))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        head = model.get_output_embeddings()
        for module in model.modules():
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if weight is None or module is head or isinstance(module, torch.nn.Embedding):
                continue
            weight[..., torch.randperm(weight.shape[-1])[:2]] *= 6
            if bias is not None:
                bias.normal_(std=0.1)
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
