"""Round to nearest: min-max grids, nothing learned. What every other method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from abq_llm.calibration.block import BlockTask
from abq_llm.quantizers import QParams, choose_qparams, to_groups


@dataclass(frozen=True)
class Rtn:
    """No options."""

    name: ClassVar[str] = "rtn"
    needs_data: ClassVar[bool] = False

    def quantize_block(self, task: BlockTask) -> dict[str, QParams]:
        assert task.scheme.weight is not None
        return {
            name: choose_qparams(
                to_groups(linear.weight.detach(), task.scheme.group_size),
                task.scheme.weight,
                scale_dtype=task.scale_dtype,
            )
            for name, linear in task.linears.items()
        }
