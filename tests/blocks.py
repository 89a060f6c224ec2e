"""What tests of calibration share: tokens, one block as a task, and a way to look at a block while it is quantized."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from abq_llm import attention
from abq_llm.architectures import Rows, architecture_of
from abq_llm.calibration.block import BlockTask
from abq_llm.calibration.blockwise import Calibration, capture
from abq_llm.calibration.learned import LearnedWeights, Vectors
from abq_llm.data import TokenSet
from abq_llm.methods import Method
from abq_llm.modules import adapt
from abq_llm.quantizers import QParams
from abq_llm.scheme import Scheme
from tests.tiny import VOCAB


def random_tokens(samples: int = 16, seqlen: int = 32, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (samples, seqlen), generator=torch.Generator().manual_seed(seed))


def calibration(samples: int = 16, seqlen: int = 32, seed: int = 1) -> TokenSet:
    return TokenSet("random", random_tokens(samples, seqlen, seed))


def first_block(model: PreTrainedModel, scheme: str = "W4A8", samples: int = 4, **changes: Any) -> BlockTask:
    """The first block of an fp32 model on the CPU, as the driver would hand it to a method."""
    attention.register()
    adapt(model)
    model.set_attn_implementation(attention.NAME)
    architecture = architecture_of(model.config)
    blocks = model.get_submodule(architecture.blocks)
    device = torch.device("cpu")
    stream, calls = capture(model, blocks, random_tokens(samples), Calibration(device))
    fields: dict[str, Any] = {
        "block": blocks[0],
        "index": 0,
        "count": len(blocks),
        "architecture": architecture,
        "scheme": Scheme.parse(scheme),
        "fp_stream": stream,
        "quantized_stream": stream.clone(),
        "call": calls[0],
        "device": device,
        "storage_dtype": torch.float32,
        "scale_dtype": torch.float16,
        "seed": 0,
        "batch_size": 4,
        "autocast": None,
        "report": lambda message, loss: None,
    }
    return BlockTask(**(fields | changes))


def name_of(part: str | Rows) -> str:
    """The module of a part."""
    return part.linear if isinstance(part, Rows) else part


def rows_of(block: nn.Module, part: str | Rows) -> list[int]:
    """Which rows of its module a part is."""
    rows = range(len(block.get_submodule(name_of(part)).weight))
    return [row for row in rows if part.start <= row % part.period < part.stop] if isinstance(part, Rows) else [*rows]


def folded(task: BlockTask, method: Method) -> Vectors:
    """The vectors that a method has learned by the time it folds them into the block."""
    seen, fold = [], LearnedWeights.fold

    def look(self: LearnedWeights, vectors: Vectors) -> dict[str, QParams]:
        seen.append(copy.deepcopy(vectors))
        return fold(self, vectors)

    with patch.object(LearnedWeights, "fold", look):
        method.quantize_block(task)
    return seen[0]


@dataclass(frozen=True)
class Watched:
    """A method, with a function that is shown each block once the method has rewritten it, and its grids."""

    name: ClassVar[str] = "watched"
    needs_data: ClassVar[bool] = True

    method: Method
    look: Callable[[BlockTask, dict[str, QParams]], None]

    def quantize_block(self, task: BlockTask) -> dict[str, QParams]:
        assert task.fp_output.isfinite().all()  # asked for while the block is still the original
        grids = self.method.quantize_block(task)
        self.look(task, grids)
        return grids
