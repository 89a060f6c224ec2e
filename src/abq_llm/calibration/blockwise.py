"""The driver: capture what enters the blocks, then quantize block after block along both streams.

After each block its packed result is written to `work_dir`. A later run over the same inputs reuses these files and
recomputes the streams through them, so an interrupted run ends in the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from abq_llm.architectures import Architecture
from abq_llm.calibration.block import BlockTask
from abq_llm.calibration.experts import rare_experts_shown_all
from abq_llm.errors import AbqError
from abq_llm.linear import QuantLinear, buffer_layout
from abq_llm.methods import Method
from abq_llm.scheme import Scheme

Progress = Callable[[int, int, float | None, str], None]
BYTES_OF_A_WEIGHT = 60  # of the block that learns it: 56 were measured, of LLaMA-7B's with `abq`


@dataclass(frozen=True)
class Calibration:
    """How to calibrate. `autocast`: None for fp32 arithmetic, or torch.bfloat16. `offload`: keep the streams in host
    memory; None does so when they would take more than a quarter of the GPU's free memory, less what the block needs.
    """

    device: torch.device
    seed: int = 0
    batch_size: int = 1
    autocast: torch.dtype | None = None
    offload: bool | None = None
    scale_dtype: torch.dtype = torch.float16


def quantize_blocks(
    model: nn.Module,
    architecture: Architecture,
    scheme: Scheme,
    method: Method,
    tokens: Tensor | None,
    settings: Calibration,
    work_dir: Path | None,
    progress: Progress,
) -> Iterator[float | None]:
    """Replace the linears of every block by `QuantLinear`, in place; yields each block's held-out loss (None if not
    measured).

    tokens: int64 [samples, seqlen], or None for a method that needs no data. One block at a time is fp32 on the
    device; the model stays where it is, the streams on the device or in host memory (`Calibration.offload`).
    """
    blocks = model.get_submodule(architecture.blocks)
    assert isinstance(blocks, nn.ModuleList)
    fp_stream, calls = capture(model, blocks, tokens, settings)
    quantized_stream = fp_stream.clone()
    for index, block in enumerate(blocks):
        storage_dtype, home = next(block.parameters()).dtype, next(block.parameters()).device
        block.to(settings.device, torch.float32)

        def report(message: str, loss: float | None, index: int = index) -> None:
            progress(index, len(blocks), loss, message)

        task = BlockTask(
            block=block,
            index=index,
            count=len(blocks),
            architecture=architecture,
            scheme=scheme,
            fp_stream=fp_stream,
            quantized_stream=quantized_stream,
            call=_to(calls[index], settings.device),
            device=settings.device,
            storage_dtype=storage_dtype,
            scale_dtype=settings.scale_dtype,
            seed=settings.seed,
            batch_size=settings.batch_size,
            autocast=settings.autocast,
            report=report,
        )
        fp_output = task.fp_output  # of the block as it still is
        file = work_dir / f"block_{index:04d}.safetensors" if work_dir else None
        if file and file.exists():
            packed = _read_result(file, task)
            report("resumed", task.block_loss)
        else:
            with rare_experts_shown_all(task):
                packed = _pack(task, method.quantize_block(task))
            if file:
                _write_result(file, task, packed)
        _install(task, packed)
        fp_stream, quantized_stream = fp_output, task.forward_stream(quantized_stream, quantized=True)
        for name, linear in packed.items():
            block.set_submodule(name, linear)
        block.to(home, storage_dtype)
        report("done", task.block_loss)
        yield task.block_loss


@torch.no_grad()
def capture(
    model: nn.Module, blocks: nn.ModuleList, tokens: Tensor | None, settings: Calibration
) -> tuple[Tensor, list[dict[str, Any]]]:
    """What enters the blocks: hidden states of the first, fp32 [samples, seqlen, hidden], and for each block the other
    arguments of its forward. These differ where layers have sliding windows or RoPE of their own.

    All samples have the same length and no padding, so one sample's masks and positions serve for all. Without tokens,
    the stream has no samples, and every pass over it does nothing.
    """
    calls: list[dict[str, Any]] = [{} for _ in blocks]
    if tokens is None:
        return torch.empty(0, 1, 1), calls

    class Captured(Exception):
        pass

    hidden: list[Tensor] = []
    outputs: list[Any] = []

    def before(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if index == 0:
                hidden.append((args[0] if args else kwargs["hidden_states"]).float())
            if len(hidden) == 1:
                calls[index] = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            if len(hidden) > 1 or index == len(blocks) - 1:
                raise Captured

        return see

    handles = [block.register_forward_pre_hook(before(i), with_kwargs=True) for i, block in enumerate(blocks)]
    handles.append(blocks[0].register_forward_hook(lambda module, args, output: outputs.append(output)))
    own_forwards = [vars(block).get("forward") for block in blocks[1:]]  # Accelerate's, if it moves blocks around
    for block in blocks[1:]:  # only their arguments are wanted: what they put out need only look right
        block.forward = lambda *args, **kwargs: outputs[0]
    home = next(model.parameters()).device
    try:
        for sample in tokens:
            with suppress(Captured):
                model(sample[None].to(home), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for block, own in zip(blocks[1:], own_forwards, strict=True):
            del block.forward
            if own is not None:
                block.forward = own
    place, offload = settings.device, settings.offload
    if offload is None and place.type == "cuda":
        size = sum(h.numel() for h in hidden) * 4  # of one of four streams; the teacher's queries and keys are another
        weights = sum(parameter.numel() for parameter in blocks[0].parameters())
        offload = size > (torch.cuda.mem_get_info(place)[0] - BYTES_OF_A_WEIGHT * weights) / 16
    return torch.cat(hidden).to("cpu" if offload else place), calls


def _pack(task: BlockTask, grids: dict[str, Any]) -> dict[str, QuantLinear]:
    linears = task.linears
    for name, linear in linears.items():
        if not linear.weight.isfinite().all() or not grids[name].scale.isfinite().all():
            raise AbqError(f"block {task.index}: {name} has NaN or infinite values after quantization")
    packed = {
        name: QuantLinear.from_linear(linear, grids[name], task.scheme, task.scale_dtype)
        for name, linear in linears.items()
    }
    return {name: linear.to(task.storage_dtype) for name, linear in packed.items()}


def _install(task: BlockTask, packed: dict[str, QuantLinear]) -> None:
    """Make the fp32 block compute what will be stored: packed weights, and everything else rounded to the storage
    dtype.
    """
    for parameter in task.block.parameters():
        parameter.data = parameter.data.to(task.storage_dtype).float()
    for name, linear in task.linears.items():
        linear.weight.data = packed[name].dequantize()
        if (bias := packed[name].bias) is not None:
            linear.bias.data = bias.float()


def _write_result(file: Path, task: BlockTask, packed: dict[str, QuantLinear]) -> None:
    tensors = {f"{name}.{key}": value for name, linear in packed.items() for key, value in linear.state_dict().items()}
    tensors |= {name: value for name, value in task.block.state_dict().items() if name.rpartition(".")[0] not in packed}
    aside = file.with_suffix(".tmp")
    try:
        save_file(tensors, aside, {"loss": json.dumps(task.block_loss)})
        aside.replace(file)
    except SafetensorError as error:  # safetensors wraps a full disk into its own error
        raise OSError(f"cannot write {aside}: {error}") from None
    finally:
        aside.unlink(missing_ok=True)


def _read_result(file: Path, task: BlockTask) -> dict[str, QuantLinear]:
    """Load a block's stored result: its linears are returned, the rest is written into the block."""
    packed = {}
    try:
        tensors = load_file(file, device=str(task.device))
        with safe_open(file, "pt") as handle:
            task.block_loss = json.loads((handle.metadata() or {})["loss"])
        for name, linear in task.linears.items():
            n, k = linear.weight.shape
            packed[name] = QuantLinear(
                k,
                n,
                task.scheme,
                bias=linear.bias is not None,
                dtype=task.storage_dtype,
                scale_dtype=task.scale_dtype,
                device="meta",
            )
            keys = [*buffer_layout(k, n, task.scheme, task.scale_dtype), *(["bias"] if linear.bias is not None else [])]
            packed[name].load_state_dict({key: tensors.pop(f"{name}.{key}") for key in keys}, assign=True)
        linears = {f"{name}.{key}": value for name in packed for key, value in task.linears[name].state_dict().items()}
        task.block.load_state_dict({**tensors, **linears})
    except (SafetensorError, KeyError, RuntimeError) as error:  # RuntimeError: other names or shapes
        reason = " ".join(str(error).split())
        raise AbqError(f"partial result {file} is damaged ({reason}); delete it and resume again") from None
    return packed


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value
