"""The pool of threads: the same bits whatever their number, from several threads at once, and after a fork."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from abq_llm.kernels import cpu
from tests import oracle


@pytest.fixture
def product():
    """A function of nothing, and what it should return."""
    case = oracle.make_case("W4A8", 512, 640)
    weight = cpu.prepare(case.layer.packed_weight(), case.scheme, 512)
    x = torch.randn(20, 512)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield lambda: cpu.linear(x, weight, None, case.scheme), cpu.linear(x, weight, None, case.scheme)
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_nothing(product):
    run, expected = product
    for threads in (1, 2, 3, 7, 64, 1):
        torch.set_num_threads(threads)
        for _ in range(20):
            assert torch.equal(run(), expected)


def test_several_threads_may_call(product):
    run, expected = product
    wrong = []

    def call():
        wrong.extend(1 for _ in range(50) if not torch.equal(run(), expected))

    callers = [threading.Thread(target=call) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_torch_decides_how_many_threads_there_are():
    """In a fresh process: one thread starts none, three start two, and the pool keeps them."""
    script = (
        "import torch, os\n"
        "from abq_llm.kernels import cpu\n"
        "from tests.kernels.cpu.test_threads import oracle\n"
        "case = oracle.make_case('W4A8', 64, 640)\n"
        "torch.set_num_threads(1)\n"
        "weight = cpu.prepare(case.layer.packed_weight(), case.scheme, 64)\n"
        "x = torch.randn(1, 64)\n"
        "for threads in (1, 3, 3, 2, 3):\n"
        "    torch.set_num_threads(threads)\n"
        "    before = len(os.listdir('/proc/self/task'))\n"
        "    cpu.linear(x, weight, None, case.scheme)\n"
        "    print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    if not Path("/proc/self/task").exists():
        pytest.skip("counts threads in /proc")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["0", "2", "0", "0", "0"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_computes_the_same(product):
    run, expected = product
    child = os.fork()
    if child == 0:
        os._exit(0 if all(torch.equal(run(), expected) for _ in range(20)) else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert torch.equal(run(), expected)
