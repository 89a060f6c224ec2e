"""Hugging Face Transformers: `AutoModelForCausalLM.from_pretrained(directory)` loads a packed checkpoint.

Importing this module is enough, any number of times. It needs Transformers 5.17 or later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from abq_llm import attention
from abq_llm.architectures import TABLES
from abq_llm.checkpoint import (
    QUANT_METHOD,
    QuantizationConfig,
    check_tensors,
    name_attention,
    read_headers,
    replace_linears,
)
from abq_llm.errors import AbqError
from abq_llm.modules import LinearExperts


class AbqConfig(QuantizationConfigMixin):
    """`checkpoint.QuantizationConfig` in the shape that Transformers wants; takes the keys of config.json.

    Raises:
        AbqError: see `QuantizationConfig.from_dict`.
    """

    def __init__(self, **values: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.parsed = QuantizationConfig.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        return self.parsed.to_dict()

    def __iter__(self) -> Any:
        return iter(self.to_dict().items())


class AbqQuantizer(HfQuantizer):
    """Puts empty `QuantLinear` modules into a model on meta and checks the files that Transformers is about to read."""

    requires_calibration = True
    separate_experts = False
    quantization_config: AbqConfig

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Leave attention alone where "abq" would break it: models with their own, or beyond SDPA. What the models
        with a table do beyond it, "abq" does too.
        """
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        able = model_class is None or (
            model_class._can_set_attn_implementation() and (model_class._supports_sdpa or config.model_type in TABLES)
        )
        if config._attn_implementation == attention.NAME and not able:
            config._attn_implementation = None
        return config

    update_tp_plan = update_attn_implementation  # the one hook of Transformers 5.17 that is given the config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config.parsed
        replace_linears(model, config)
        self.separate_experts = any(isinstance(module, LinearExperts) for module in model.modules())
        used = model.config._attn_implementation
        if config.scheme.kv is not None and used != attention.NAME:
            raise AbqError(f"scheme {config.scheme} needs attn_implementation={attention.NAME!r}, not {used!r}")
        if checkpoint_files:
            files = [Path(file) for file in checkpoint_files]
            check_tensors(model, read_headers(files), files[0].parent)

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """Read experts as they are stored, one by one: Transformers would fuse them, and before 5.23 even try it on
        packed tensors.
        """
        kept = [
            conversion
            for conversion in weight_conversions
            if not (self.separate_experts and any(".experts." in name for name in conversion.source_patterns))
        ]
        return super().update_weight_conversions(kept, *args)

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
