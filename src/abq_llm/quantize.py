"""`quantize(model, scheme, method, calibration)`: the main path on one screen."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from abq_llm import attention
from abq_llm.architectures import Architecture, architecture_of
from abq_llm.calibration.blockwise import Calibration, Progress, quantize_blocks
from abq_llm.checkpoint import packed_size
from abq_llm.data import TokenSet
from abq_llm.devices import pick_device
from abq_llm.errors import AbqError
from abq_llm.head import HEAD_BITS, quantize_head
from abq_llm.linear import QuantLinear
from abq_llm.methods import Method, method_by_name
from abq_llm.modules import adapt
from abq_llm.scheme import Scheme
from abq_llm.version import __version__


@dataclass(frozen=True)
class Report:
    """What a quantization did and cost. `block_losses` are held-out losses, None where a method measures none."""

    scheme: str
    method: str
    seconds: float
    peak_memory_bytes: int
    bits_per_weight: float
    block_losses: list[float | None]
    provenance: dict[str, Any] = field(repr=False)


def quantize(
    model: PreTrainedModel,
    scheme: Scheme | str,
    method: Method | str = "abq",
    calibration: TokenSet | None = None,
    *,
    device: str | torch.device = "auto",
    seed: int = 0,
    batch_size: int = 1,
    epochs: int | None = None,
    autocast: torch.dtype | None = None,
    offload: bool | None = None,
    head_bits: int = 16,
    work_dir: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Quantize a Transformers model in place: the linears of its decoder blocks become `QuantLinear`.

    Args:
        model: a causal language model of a supported architecture, fp32, fp16 or bf16, on any device.
        scheme: "W4A8g128" or a `Scheme`.
        method: a name in `methods.METHODS`, with options after colons if any ("abq:akl=False"), or a method.
        calibration: tokens, from `data.calibration_tokens`; a method that learns nothing needs none.
        device: where one block at a time is calibrated; "auto" is the first GPU or else the CPU.
        epochs: shorthand for the method's option of that name.
        autocast: torch.bfloat16 for mixed precision, None for fp32.
        offload: whether the calibration streams stay in host memory; None: if the GPU has little to spare.
        head_bits: of the output head: 1..8, rounded to nearest (`head.py`), or 16, left as it is.
        work_dir: where finished blocks are kept; complete ones found there are reused.
        progress: called with (block, blocks, loss or None, message).

    Raises:
        AbqError: an unsupported architecture, an impossible scheme, a weight that is not finite, missing
        calibration, or partial
            results of another run in `work_dir`.
    """
    started = time.monotonic()
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    if isinstance(method, str):
        method = method_by_name(method)
    if epochs is not None and hasattr(method, "epochs"):
        method = replace(method, epochs=epochs)  # type: ignore[type-var]
    architecture = check_model(model, scheme)
    if head_bits not in HEAD_BITS:
        raise AbqError(f"{head_bits} bits of the head are not in 1..8 or 16")
    if method.needs_data and calibration is None:
        raise AbqError(f"method {method.name!r} learns from data: give it calibration tokens")
    tokens = calibration.tokens if method.needs_data and calibration else None
    if tokens is not None and (len(tokens) == 0 or int(tokens.max()) >= model.config.vocab_size):
        raise AbqError(
            f"calibration tokens {list(tokens.shape)} up to id {int(tokens.max()) if len(tokens) else None} are not "
            f"samples of a vocabulary of {model.config.vocab_size}"
        )
    place = pick_device(device)
    settings = Calibration(device=place, seed=seed, batch_size=batch_size, autocast=autocast, offload=offload)
    provenance = {
        "method": method.name,
        "options": asdict(method),  # type: ignore[call-overload]
        "calibration": calibration
        and {"name": calibration.name, "shape": list(calibration.tokens.shape), "sha256": calibration.sha256},
        "seed": seed,
        "batch_size": batch_size,
        "autocast": str(autocast).removeprefix("torch.") if autocast else None,
        "device": place.type,
        "versions": {"abq_llm": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    if work_dir is not None:
        inputs = {"config": model.config.to_json_string(), "weights": hash_weights(model), **provenance}
        _claim(work_dir, {"scheme": asdict(scheme), **inputs})
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
    attention.register()
    adapt(model)
    model.set_attn_implementation(attention.NAME)
    losses = list(
        quantize_blocks(model, architecture, scheme, method, tokens, settings, work_dir, progress or (lambda *_: None))
    )
    attention.set_kv_format(model, scheme.kv)
    quantize_head(model, head_bits, settings.scale_dtype)
    return Report(
        scheme=str(scheme),
        method=method.name,
        seconds=time.monotonic() - started,
        peak_memory_bytes=_peak_memory(place),
        bits_per_weight=packed_size(model).bits_per_weight,
        block_losses=losses,
        provenance=provenance,
    )


def check_model(model: PreTrainedModel, scheme: Scheme) -> Architecture:
    """The table of `model`'s architecture, if `model` can be quantized to `scheme`.

    Raises:
        AbqError: it cannot: nothing to pack, an unsupported architecture, already quantized, or values not finite.
    """
    if scheme.weight is None:
        raise AbqError(f"scheme {scheme}: W16 leaves nothing to pack; choose W1..W8")
    architecture = architecture_of(model.config)
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise AbqError("the model is quantized already; quantize the original")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            bad = parameter[~parameter.isfinite()]
            raise AbqError(f"{name} holds {bad.numel()} values that are not finite, the first is {bad[0].item()}")
    return architecture


def hash_weights(model: nn.Module) -> str:
    """Hex SHA-256 of the bytes of all parameters: models of one config are not one model."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _claim(work_dir: Path, inputs: dict[str, Any]) -> None:
    """Mark `work_dir` as the run's that `inputs` decide, or make sure that it already is."""
    run = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
    mark = work_dir / "run.json"
    work_dir.mkdir(parents=True, exist_ok=True)
    if all(path.suffix == ".tmp" for path in work_dir.iterdir()):  # nothing, or half-written
        aside = mark.with_suffix(".tmp")
        aside.write_text(json.dumps({"fingerprint": run}))
        aside.replace(mark)
        return
    try:
        owner = json.loads(mark.read_text())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise AbqError(
            f"{work_dir} is not empty and was not left by a stopped run: it has no readable run.json"
        ) from None
    if owner != run:
        raise AbqError(
            f"{work_dir} holds partial results of another model, scheme, method, calibration or seed; "
            "delete it to start anew"
        )


def _peak_memory(device: torch.device) -> int:
    """Peak bytes: of the device for a GPU, of this process's resident memory for a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
