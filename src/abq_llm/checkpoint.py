"""Packed checkpoints: an ordinary Hugging Face directory whose quantized linears hold bit-planes.

    config.json          "quantization_config" as in `QuantizationConfig`, and "attn_implementation": "abq"
    model*.safetensors   <linear>.weight_packed, .weight_scale, .weight_zero_point, .bias (see `linear.QuantLinear`)

An unknown `quant_method` only makes Transformers warn before it fills the model with random weights. An unknown
attention implementation makes it stop: that is why config.json names ours even where the cache is not quantized.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from abq_llm import attention, kernels
from abq_llm.errors import AbqError
from abq_llm.head import HEAD_BITS, head_bits, head_name, head_scheme
from abq_llm.linear import QuantLinear, set_backend
from abq_llm.modules import adapt
from abq_llm.scheme import Scheme

QUANT_METHOD = "abq"
FORMAT_VERSION = 1
SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SAFETENSORS_DTYPES = {
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
PACKED_SUFFIXES = (".weight_packed", ".weight_scale", ".weight_zero_point")
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True)
class QuantizationConfig:
    """What config.json says under "quantization_config".

    Attributes:
        scheme: with its two symmetry flags, which are keys of their own in the file.
        scale_dtype: dtype of every weight_scale.
        modules_to_not_convert: full names of the nn.Linear modules that stay as they are.
        head_bits: of the output head, which has a scheme of its own (`head.py`); 16: not packed, and not in the file.
        provenance: how the checkpoint was made; anything that JSON holds.
    """

    scheme: Scheme
    scale_dtype: torch.dtype = torch.float16
    modules_to_not_convert: tuple[str, ...] = ()
    head_bits: int = 16
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "quantization_config") -> QuantizationConfig:
        """Read the JSON object. `where` starts every message.

        Raises:
            AbqError: another quant_method, another format_version, an unknown key, or a value of the wrong type.
        """
        if values.get("quant_method") != QUANT_METHOD:
            raise AbqError(f"{where}: quant_method is {values.get('quant_method')!r}, expected {QUANT_METHOD!r}")
        version = values.get("format_version")
        if type(version) is not int or version < 1:
            raise AbqError(f"{where}: format_version is {version!r}, expected {FORMAT_VERSION}")
        if version > FORMAT_VERSION:
            raise AbqError(f"{where}: format_version {version} is newer than {FORMAT_VERSION}: update abq-llm")
        defaults = {**cls(Scheme(None, None)).to_dict(), "scheme": None, "head_bits": 16}
        for key in values:
            if key not in defaults:
                near = difflib.get_close_matches(key, defaults, n=1, cutoff=0)[0]
                raise AbqError(f"{where}: unknown key {key!r}, the nearest right one is {near!r}")
        values = {**defaults, **values}
        for key, kind in _KINDS.items():
            if not isinstance(values[key], kind):
                raise AbqError(f"{where}: {key} is {values[key]!r}, expected {kind.__name__}")
        if not all(isinstance(name, str) for name in values["modules_to_not_convert"]):
            raise AbqError(f"{where}: modules_to_not_convert holds something that is not a string")
        scale_dtype = SCALE_DTYPES.get(values["scale_dtype"])
        if scale_dtype is None:
            known = ", ".join(SCALE_DTYPES)
            raise AbqError(f"{where}: scale_dtype is {values['scale_dtype']!r}, expected one of {known}")
        symmetry = {key: values[key] for key in ("weight_symmetric", "activation_symmetric")}
        try:
            scheme = Scheme.parse(values["scheme"], **symmetry)
        except AbqError as error:
            raise AbqError(f"{where}: {error}") from error
        if scheme.weight is None:
            raise AbqError(f"{where}: scheme {values['scheme']!r} has no quantized weights to pack")
        if type(values["head_bits"]) is not int or values["head_bits"] not in HEAD_BITS:
            raise AbqError(f"{where}: head_bits is {values['head_bits']!r}, expected 1..8 or 16")
        names = tuple(values["modules_to_not_convert"])
        return cls(scheme, scale_dtype, names, values["head_bits"], values["provenance"])

    def to_dict(self) -> dict[str, Any]:
        """The JSON object; `from_dict` of it is equal to self."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "scheme": str(self.scheme),
            "weight_symmetric": self.scheme.weight_symmetric,
            "activation_symmetric": self.scheme.activation_symmetric,
            "scale_dtype": str(self.scale_dtype).removeprefix("torch."),
            "modules_to_not_convert": list(self.modules_to_not_convert),
            **({"head_bits": self.head_bits} if self.head_bits != 16 else {}),
            "provenance": self.provenance,
        }


_KINDS = {
    "scheme": str,
    "weight_symmetric": bool,
    "activation_symmetric": bool,
    "scale_dtype": str,
    "modules_to_not_convert": list,
    "provenance": dict,
}


@dataclass(frozen=True)
class PackedSize:
    """How large a packed model is.

    Attributes:
        size_bytes: all tensors, quantized or not; tied ones once.
        bits_per_weight: bits of all buffers of the quantized linears, without biases, for each of their weights.
        linears: how many linears are quantized.
    """

    size_bytes: int
    bits_per_weight: float
    linears: int


class Entry(NamedTuple):
    """One tensor as the header of a safetensors file describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def save(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    provenance: dict[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model with `QuantLinear` modules as a packed checkpoint: all of it, or nothing.

    The files are written to a folder beside `directory`, which is then renamed, or removed after any exception.
    `model.config` gains the quantization config that was written.

    Args:
        provenance: stored in config.json; by default that of the checkpoint from which the model was loaded, if any.

    Raises:
        AbqError: `directory` exists or cannot be written, nothing in the model is quantized, or its schemes are mixed.
        OSError: the disk is full, or the like.
    """
    directory = Path(directory)
    if directory.exists():
        raise AbqError(f"{directory}: already exists")
    _describe(model, provenance)
    partial = directory.parent / f".{directory.name}.{os.getpid()}.tmp"
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        partial.rename(directory)
    except SafetensorError as error:  # how that library reports a full disk
        raise AbqError(f"{directory}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _describe(model: PreTrainedModel, provenance: dict[str, Any] | None) -> None:
    """Put the quantization config of `model` into `model.config`, in plain JSON."""
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    if not quantized:
        raise AbqError("nothing to save as a packed checkpoint: the model has no quantized linear")
    if head_bits(model) != 16:
        del quantized[head_name(model)]
    kinds = {(module.scheme, module.weight_scale.dtype): name for name, module in quantized.items()}
    if len(kinds) > 1:
        listing = ", ".join(f"{name} {scheme} with scales in {dtype}" for (scheme, dtype), name in kinds.items())
        raise AbqError(f"one checkpoint holds one scheme, the model has {len(kinds)}: {listing}")
    if provenance is None:
        known = getattr(model.config, "quantization_config", None)
        provenance = {} if known is None else dict(known)["provenance"]
    ((scheme, scale_dtype),) = kinds
    skipped = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    config = QuantizationConfig(scheme, scale_dtype, skipped, head_bits(model), provenance)
    model.config.quantization_config = config.to_dict()
    name_attention(model)


def name_attention(model: PreTrainedModel) -> None:
    """Have `model.save_pretrained` write "attn_implementation": "abq", which Transformers alone would leave out."""
    model.config.attn_implementation = attention.NAME


def load(
    directory: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | Literal["auto"] = "auto",
    backend: str = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a packed checkpoint for inference; the tokenizer is None if the directory has none.

    Tensors stream from disk into place: the model is never built in floating point.

    Args:
        device: "auto" is the GPU if there is one.
        dtype: of what is not packed (embedding, norms, head); "auto" is the checkpoint's own. Scales keep theirs.
        backend: of the quantized linears, see `linear.set_backend`.

    Raises:
        AbqError: see `validate`; or `backend` is unknown or cannot run on `device`.
    """
    directory = Path(directory)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    kernels.choose_backend(backend, device)
    validate(directory)
    placement: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True, **placement)
    set_backend(model, backend)
    has_tokenizer = any((directory / name).exists() for name in ("tokenizer_config.json", "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True) if has_tokenizer else None
    return model.eval(), tokenizer


def is_packed(path: str | Path) -> bool:
    """Whether `path` is a directory that says it is a checkpoint of ours, good or bad."""
    try:
        config = json.loads((Path(path) / "config.json").read_bytes())
        return bool(config["quantization_config"]["quant_method"] == QUANT_METHOD)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def packed_size(model: nn.Module | str | Path) -> PackedSize:
    """Size of a model with `QuantLinear` modules, on any device (meta too), or of a packed directory."""
    if not isinstance(model, nn.Module):
        model = validate(model)
    quantized = [module for module in model.modules() if isinstance(module, QuantLinear)]
    bits = 8 * sum(tensor.nbytes for module in quantized for tensor in module.packed_weight())
    weights = sum(module.in_features * module.out_features for module in quantized)
    saved = model.state_dict().keys()
    named = (*model.named_parameters(), *model.named_buffers())  # each tied tensor once, under its first name
    size = sum(tensor.nbytes for name, tensor in named if name in saved)
    return PackedSize(size, bits / max(weights, 1), len(quantized))


def validate(directory: str | Path) -> PreTrainedModel:
    """Check a packed checkpoint by config.json and the headers of its safetensors files; no tensor is read.

    Returns:
        The model on the meta device, its quantized linears in place.

    Raises:
        AbqError: not a checkpoint of ours, of a newer version, incomplete or inconsistent; names the file, and the
            tensor and both shapes where there are any.
    """
    directory = Path(directory)
    config = read_config(directory)
    headers = read_headers(_weight_files(directory))
    try:
        model_config = AutoConfig.from_pretrained(directory, local_files_only=True)
        model_config._attn_implementation = None
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise AbqError(f"{directory / 'config.json'}: cannot be built as a causal language model: {reason}") from error
    replace_linears(model, config)
    check_tensors(model, headers, directory)
    return model


def read_config(directory: Path) -> QuantizationConfig:
    """The quantization config of a packed directory."""
    path = directory / "config.json"
    if not directory.is_dir():
        raise AbqError(f"{directory}: {'not a directory' if directory.exists() else 'no such directory'}")
    if not path.is_file():
        raise AbqError(f"{directory}: not a checkpoint, it has no config.json")
    values = _read_json(path)
    if not isinstance(values.get("quantization_config"), dict):
        raise AbqError(f"{path}: not a packed checkpoint, it has no quantization_config")
    return QuantizationConfig.from_dict(values["quantization_config"], f"{path}: quantization_config")


def replace_linears(model: PreTrainedModel, config: QuantizationConfig) -> None:
    """Put an empty `QuantLinear` on the meta device in place of every nn.Linear that `config` does not leave out, once
    the model has the modules of `modules`.

    Raises:
        AbqError: `config` leaves out a module that is not there.
    """
    adapt(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in config.modules_to_not_convert:
        if linears.pop(name, None) is None:
            raise AbqError(f"modules_to_not_convert names {name!r}, which is no linear of {type(model).__name__}")
    head = head_name(model) if config.head_bits != 16 else None
    for name, linear in linears.items():
        has_bias = linear.bias is not None
        quantized = QuantLinear(
            linear.in_features,
            linear.out_features,
            head_scheme(config.head_bits) if name == head else config.scheme,
            bias=has_bias,
            dtype=linear.weight.dtype,
            scale_dtype=config.scale_dtype,
            device="meta",
        )
        model.set_submodule(name, quantized)


def read_headers(files: Iterable[Path]) -> dict[str, Entry]:
    """Name -> `Entry` of every tensor in some safetensors files, whose sizes are checked against their headers."""
    return {name: entry for file in files for name, entry in _read_header(file).items()}


def check_tensors(model: PreTrainedModel, headers: dict[str, Entry], where: Path) -> None:
    """Check that `headers` has every tensor of `model` (on meta) in its shape, and the packed ones in their dtype."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    for name, tensor in revert_weight_conversion(model, tensors).items():
        shape, entry = tuple(tensor.shape), headers.get(name)
        if entry is None:
            raise AbqError(f"{where}: tensor {name!r} is missing, expected {tensor.dtype} {list(shape)}")
        if entry.shape != shape:
            raise AbqError(f"{entry.file}: tensor {name!r} has shape {list(entry.shape)}, expected {list(shape)}")
        dtype = SAFETENSORS_DTYPES.get(tensor.dtype)
        if name.endswith(PACKED_SUFFIXES) and entry.dtype != dtype:
            raise AbqError(f"{entry.file}: tensor {name!r} {list(shape)} has dtype {entry.dtype}, expected {dtype}")


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files that Transformers would read."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise AbqError(f"{directory}: has neither {single.name} nor {index.name}")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise AbqError(f"{index}: has no weight_map from tensors to files")
    shards = [directory / name for name in sorted(set(weight_map.values()))]
    for shard in shards:
        if not shard.is_file():
            raise AbqError(f"{shard}: this shard is missing, {index.name} lists it")
    return shards


def _read_header(file: Path) -> dict[str, Entry]:
    """A safetensors file is 8 bytes with the length of the header, the header (JSON), and the tensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES:
            raise AbqError(f"{file}: not a safetensors file")
        text = stream.read(length)
    if len(text) < length:
        raise AbqError(f"{file}: truncated, its header has {length} bytes and the file {size}")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: Entry(file, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise AbqError(f"{file}: not a safetensors file, its header cannot be read") from error
    if end != size:
        state = "truncated" if size < end else "not a safetensors file"
        raise AbqError(f"{file}: {state}, its header describes {end} bytes and the file has {size}")
    return entries


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:  # bad JSON or bad UTF-8
        raise AbqError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise AbqError(f"{path}: not a JSON object")
    return values
