"""Hugging Face Transformers: `AutoModelForCausalLM.from_pretrained(directory)` loads a packed checkpoint.

Importing this module is enough, any number of times. It needs Transformers 5.17 or later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from abq_llm import attention
from abq_llm.checkpoint import (
    QUANT_METHOD,
    QuantizationConfig,
    check_tensors,
    name_attention,
    read_headers,
    replace_linears,
)
from abq_llm.errors import AbqError


class AbqConfig(QuantizationConfigMixin):
    """`checkpoint.QuantizationConfig` in the shape that Transformers wants; takes the keys of config.json.

    Raises:
        AbqError: see `QuantizationConfig.from_dict`.
    """

    def __init__(self, **values: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.parsed = QuantizationConfig.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        return self.parsed.to_dict()

    def __iter__(self) -> Any:
        return iter(self.to_dict().items())


class AbqQuantizer(HfQuantizer):
    """Puts empty `QuantLinear` modules into the model on meta, checks the files, and lets Transformers stream them in."""

    requires_calibration = True
    quantization_config: AbqConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config.parsed
        used = model.config._attn_implementation
        if config.scheme.kv is not None and used != attention.NAME:
            raise AbqError(f"scheme {config.scheme} needs attn_implementation={attention.NAME!r}, not {used!r}")
        replace_linears(model, config)
        if checkpoint_files:
            files = [Path(file) for file in checkpoint_files]
            check_tensors(model, read_headers(files), files[0].parent)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        attention.set_kv_format(model, self.quantization_config.parsed.scheme.kv)
        name_attention(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = AbqConfig
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = AbqQuantizer
attention.register()
