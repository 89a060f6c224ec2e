"""One file, one paper. A method may rewrite a block's weights in place and return QParams per linear, no more."""

from __future__ import annotations

from typing import ClassVar, Protocol

from abq_llm.calibration.block import BlockTask
from abq_llm.errors import AbqError
from abq_llm.methods.abq import Abq
from abq_llm.methods.affinequant import AffineQuant
from abq_llm.methods.awq import Awq
from abq_llm.methods.gptq import Gptq
from abq_llm.methods.i_llm import ILlm
from abq_llm.methods.omniquant import OmniQuant
from abq_llm.methods.rtn import Rtn
from abq_llm.methods.smoothquant import SmoothQuant
from abq_llm.quantizers import QParams


class Method(Protocol):
    """A frozen dataclass of options with a name."""

    name: ClassVar[str]
    needs_data: ClassVar[bool]

    def quantize_block(self, task: BlockTask) -> dict[str, QParams]:
        """Rewrite the weights of `task.block` in place and return the grid of each of `task.linears`, [N, groups,
        1].
        """


METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Abq, AffineQuant, Awq, Gptq, ILlm, OmniQuant, Rtn, SmoothQuant)
}


def method_by_name(name: str, **options: object) -> Method:
    """A method with options: those it does not have are refused.

    Raises:
        AbqError: no such method or option.
    """
    if name not in METHODS:
        raise AbqError(f"unknown method {name!r}; this version has {', '.join(METHODS)}")
    try:
        return METHODS[name](**options)
    except TypeError as error:
        raise AbqError(f"method {name!r}: {error}") from None
