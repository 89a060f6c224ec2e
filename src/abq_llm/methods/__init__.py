"""One file, one paper. A method may rewrite a block's weights in place and return QParams per linear, no more."""

from __future__ import annotations

import ast
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


def method_by_name(label: str, **options: object) -> Method:
    """A method by its name, with options as keywords or after colons, as in "abq:rounding=False:epochs=5"; those it
    does not have are refused.

    Raises:
        AbqError: no such method or option, or what follows a colon is not OPTION=VALUE.
    """
    name, *parts = label.split(":")
    if name not in METHODS:
        raise AbqError(f"unknown method {name!r}; this version has {', '.join(METHODS)}")
    try:
        return METHODS[name](**dict(_option(label, part) for part in parts), **options)
    except TypeError as error:
        raise AbqError(f"method {label!r}: {error}") from None


def _option(label: str, text: str) -> tuple[str, object]:
    key, _, value = text.partition("=")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise AbqError(f"method {label!r}: {text!r} is not OPTION=VALUE, for example epochs=5") from None
