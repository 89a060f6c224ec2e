"""A mode in which every tensor must be an integer or a boolean."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class IntegersOnly(TorchDispatchMode):
    """Within, an operation that is given or returns a floating-point tensor is an AssertionError."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()), func
        return result
