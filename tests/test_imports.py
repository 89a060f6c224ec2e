"""Who may import whom: every module imports from its own layer and from those below."""

import ast
import sys
from pathlib import Path

import pytest

import abq_llm

PACKAGE = Path(abq_llm.__file__).parent

LAYERS = (
    {"errors", "version", "devices", "locks", "scheme", "quantizers", "packing"},  # torch only
    {"kernels", "architectures"},
    {"linear", "head", "attention", "calibration", "modules", "integer_only"},
    {"methods"},  # never kernels
    {"calibration.blockwise", "quantize", "checkpoint", "data", "models"},  # blockwise drives the methods
    {"engine", "evaluation"},
    {"integrations", "cli"},
)
FORBIDDEN = {("methods", "kernels")}
# (importer, imported), inside a function: loading a checkpoint registers its loader with Transformers
EXCEPTIONS = {("checkpoint", "integrations.transformers")}
OPTIONAL = {"vllm", "lm_eval", "datasets", "matplotlib", "humming"}


def imports(tree: ast.AST, *, lazy: bool = False):
    """(dotted name, whether inside a function) of every import; those for type checkers only are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{'.' * node.level}{node.module or ''}.{alias.name}", lazy) for alias in node.names)
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from imports(node, lazy=lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def place(module: str) -> tuple[int, str] | None:
    """(layer, name in LAYERS) of a module named below abq_llm: the longest name that it starts with."""
    named = [
        (layer, name) for layer, names in enumerate(LAYERS) for name in names if f"{module}.".startswith(f"{name}.")
    ]
    return max(named, key=lambda pair: len(pair[1]), default=None)


def violations(package: Path) -> list[str]:
    found = []
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
        if module in ("__init__", "__main__"):
            continue  # the public names may come from anywhere
        here = place(module)
        if here is None:
            found.append(f"{module} is in no layer")
            continue
        for name, lazy in imports(ast.parse(path.read_text())):
            top = name.split(".")[0]
            if top in OPTIONAL and not lazy:
                found.append(f"{module} imports {top} outside a function")
            if top != "abq_llm":
                if here[0] == 0 and top != "torch" and top not in sys.stdlib_module_names:
                    found.append(f"{module} imports {name}")
                continue
            target = name.removeprefix("abq_llm").removeprefix(".")
            there = place(target)
            if there is None:
                continue  # a name of abq_llm/__init__, such as __version__
            allowed = there[0] <= here[0] and (here[1], there[1]) not in FORBIDDEN
            if not allowed and not (lazy and (module, target) in EXCEPTIONS):
                found.append(f"{module} imports {target}")
    return found


def test_every_module_imports_downwards():
    assert violations(PACKAGE) == []


def test_relative_imports_are_not_used():
    for path in PACKAGE.rglob("*.py"):
        assert not [name for name, _ in imports(ast.parse(path.read_text())) if name.startswith(".")], path


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("scheme", "import numpy", ["scheme imports numpy"]),
        ("scheme", "import math, torch\nfrom abq_llm.errors import AbqError", []),
        ("packing", "from abq_llm.linear import QuantLinear", ["packing imports linear.QuantLinear"]),
        ("packing", "from abq_llm import linear", ["packing imports linear"]),
        ("kernels.cpu", "import abq_llm.linear", ["kernels.cpu imports linear"]),
        ("methods.abq", "from abq_llm.kernels import reference", ["methods.abq imports kernels.reference"]),
        ("methods.abq", "def f():\n    from abq_llm import kernels", ["methods.abq imports kernels"]),
        ("calibration.block", "import abq_llm.methods.rtn", ["calibration.block imports methods.rtn"]),
        ("calibration.blockwise", "from abq_llm.methods import Method", []),
        ("checkpoint", "def f():\n    import abq_llm.integrations.transformers", []),
        ("checkpoint", "import abq_llm.integrations.transformers", ["checkpoint imports integrations.transformers"]),
        ("linear_v2", "", ["linear_v2 is in no layer"]),
        ("data", "import datasets", ["data imports datasets outside a function"]),
        ("data", "class A:\n    import datasets.x", ["data imports datasets outside a function"]),
        ("data", "try:\n    from vllm import LLM\nexcept ImportError: ...", ["data imports vllm outside a function"]),
        ("data", "if TYPE_CHECKING:\n    import datasets\ndef f():\n    import datasets", []),
        ("cli.compare", "from matplotlib import pyplot", ["cli.compare imports matplotlib outside a function"]),
        ("cli.compare", "from abq_llm import __version__, quantize", []),
    ],
)
def test_the_check_sees(tmp_path, module, source, expected):
    path = tmp_path / (module.replace(".", "/") + ".py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    assert violations(tmp_path) == expected
