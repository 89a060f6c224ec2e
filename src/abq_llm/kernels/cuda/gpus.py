"""What the choice of a kernel may depend on of a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Gpu:
    capability: int  # 10 * major + minor
    sms: int
    shared_limit: int  # bytes of shared memory that a block may have

    @property
    def has_binary(self) -> bool:
        """Whether binary products are instructions and not emulated."""
        return self.capability < 100

    @property
    def has_copy_engine(self) -> bool:
        """Whether bulk copies fill shared memory."""
        return self.capability >= 90

    @property
    def has_wgmma(self) -> bool:
        return self.capability == 90


@lru_cache
def gpu(index: int) -> Gpu:
    facts = torch.cuda.get_device_properties(index)
    limit = facts.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Gpu(10 * facts.major + facts.minor, facts.multi_processor_count, limit)
