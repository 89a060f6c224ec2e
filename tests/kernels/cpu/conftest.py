import os

import pytest

from abq_llm.kernels.cpu import native

BUILT = os.environ["ABQ_NATIVE_MODULE"]
LEVELS = native.module().levels() if native.missing() is None else ["scalar"]


@pytest.fixture(autouse=True)
def built():
    """These tests are never skipped: a module that does not compile is a failure."""
    if BUILT.startswith("not built"):
        pytest.fail(BUILT)


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    """Each instruction set that this CPU has."""
    monkeypatch.setenv("ABQ_CPU_LEVEL", request.param)
    return request.param
