"""One file, one paper. A method may rewrite a block's weights in place and return QParams per linear, no more."""

from __future__ import annotations

import ast
import math
from dataclasses import fields
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
    """A method by its name, with options as keywords or after colons, as in "abq:rounding=False:epochs=5".

    Raises:
        AbqError: no such method or option, or a value that the option cannot have.
    """
    name, *parts = label.split(":")
    if name not in METHODS:
        raise AbqError(f"unknown method {name!r}; this version has {', '.join(METHODS)}")
    for part in parts:
        key, _, text = part.partition("=")
        if key in options:
            raise AbqError(f"method {label!r}: {key} is given twice")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise AbqError(f"method {label!r}: {part!r} is not OPTION=VALUE, for example epochs=5") from None
    for option in fields(METHODS[name]):  # type: ignore[arg-type]
        value = options.get(option.name, option.default)
        if not _is_like(value, option.default):
            raise AbqError(f"method {label!r}: {option.name} is {value!r}, expected a value like {option.default!r}")
    try:
        method = METHODS[name](**options)
    except TypeError as error:
        raise AbqError(f"method {label!r}: {error}") from None
    for key, value in vars(method).items():
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise AbqError(f"method {label!r}: {key} is {value!r}, expected a finite number >= 0")
    return method


def _is_like(value: object, default: object) -> bool:
    """Whether an option with this default can be of the value's type; a float can be an int."""
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(_is_like(each, default[0]) for each in value)
    return type(value) is type(default) or (type(value), type(default)) == (int, float)
