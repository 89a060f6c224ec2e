"""The store of tuned plans, and what is compiled before a search. None of it needs a GPU."""

import json
import warnings
from concurrent.futures import Future
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from abq_llm.errors import AbqError
from abq_llm.kernels import cuda
from abq_llm.kernels.cuda import gemm_mma, jit, launch, plan, tune
from abq_llm.kernels.cuda.gpus import Gpu, gpu
from abq_llm.kernels.cuda.plan import Plan
from abq_llm.kernels.cuda.problem import Problem
from abq_llm.linear import buffer_layout
from abq_llm.scheme import Scheme

H100 = Gpu(90, 132, 227 * 1024)
A10 = Gpu(86, 72, 99 * 1024)
NAME = "NVIDIA H100 80GB HBM3"


def problem(scheme: str, m: int, n: int = 512, k: int = 1024) -> Problem:
    return Problem.of(m, n, k, Scheme.parse(scheme))


SMALL = problem("W4A8", 1)


def last_of(wanted: Problem, gpu: Gpu = H100) -> Plan:
    """A plan that the heuristic does not choose."""
    *_, last = tune.plans(wanted, gpu)
    assert last != plan.choose(wanted, gpu)
    return last


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("ABQ_CACHE_DIR", str(tmp_path))
    forget()
    yield
    forget()


def forget():
    """What another process would not know."""
    tune.read.cache_clear()
    tune._warn.cache_clear()
    cuda._plan.cache_clear()


# --- buckets ---


def test_bucket():
    counts = {m: tune.bucket(replace(SMALL, m=m)).m for m in (1, 3, 16, 17, 32, 33, 64, 1025, 2048)}
    assert counts == {1: 1, 3: 3, 16: 16, 17: 32, 32: 32, 33: 64, 64: 64, 1025: 2048, 2048: 2048}
    assert tune.bucket(replace(SMALL, m=40)) == replace(SMALL, m=64)


# --- store ---


@pytest.mark.parametrize(
    ("scheme", "m", "path"),
    [
        ("W4A8", 1, "decode"),
        ("W2*A8g128", 16, "mma"),
        ("W4A8", 64, "wgmma"),
        ("W2A2", 64, "wgmma_b1"),
        ("W4A16", 16, "dequantize"),
        ("W4A16", 1, "mma_f16"),
        ("W4A16", 64, "wgmma_f16"),
    ],
)
def test_every_kind_of_plan_comes_back(scheme, m, path):
    wanted = problem(scheme, m)
    kept = next(one for one in tune.plans(wanted, H100) if one.path == path)
    tune.keep({wanted: (12.5, kept)}, NAME)
    forget()
    assert tune.lookup(wanted, NAME, H100) == kept
    assert tune.read(tune.file_of(NAME)) == {tune.bucket(wanted): (12.5, kept)}


def test_only_problems_of_the_bucket_share_a_plan():
    wanted = problem("W4A8", 50)
    kept = last_of(tune.bucket(wanted))
    tune.keep({wanted: (1.0, kept)}, NAME)
    for m in (33, 64):
        assert tune.lookup(replace(wanted, m=m), NAME, H100) == kept
    others = (
        replace(wanted, m=32),
        replace(wanted, m=65),
        replace(wanted, n=528),
        replace(wanted, k=1056),
        replace(wanted, planes=3),
        replace(wanted, bits=4),
        replace(wanted, symmetric=True),
        replace(wanted, group_size=128),
    )
    assert [tune.lookup(other, NAME, H100) for other in others] == [None] * len(others)


def test_two_keeps_merge_and_the_later_one_wins():
    other = problem("W2A8", 4)
    tune.keep({SMALL: (9.0, plan.choose(SMALL, H100)), other: (3.0, last_of(other))}, NAME)
    tune.keep({SMALL: (8.0, last_of(SMALL))}, NAME)
    assert tune.read(tune.file_of(NAME)) == {SMALL: (8.0, last_of(SMALL)), other: (3.0, last_of(other))}


def test_a_keep_sees_what_another_process_kept():
    other = problem("W2A8", 4)
    theirs = tune.keep({other: (3.0, last_of(other))}, NAME).read_text()
    file = tune.keep({}, NAME)
    file.unlink()
    assert tune.read(file) == {}  # which this process remembers
    file.write_text(theirs)
    assert tune.read(file) == {}
    tune.keep({SMALL: (9.0, last_of(SMALL))}, NAME)
    assert set(tune.read(file)) == {SMALL, other}


def test_devices_are_not_mixed():
    tune.keep({SMALL: (9.0, last_of(SMALL))}, NAME)
    assert tune.lookup(SMALL, "NVIDIA H200", H100) is None
    tune.keep({SMALL: (7.0, plan.choose(SMALL, H100))}, "NVIDIA H200")
    assert tune.lookup(SMALL, NAME, H100) == last_of(SMALL)
    assert sorted(file.name for file in tune.directory().iterdir()) == [
        "NVIDIA-H100-80GB-HBM3.json",
        "NVIDIA-H200.json",
    ]


def test_a_name_is_no_path():
    assert tune.file_of("../a/b (c)").name == "a-b-c.json" and tune.file_of("../a/b (c)").parent == tune.directory()


def test_no_temporary_file_is_left(monkeypatch):
    file = tune.keep({SMALL: (9.0, last_of(SMALL))}, NAME)
    before = file.read_bytes()

    def fail(self, target):
        raise OSError("disk")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk"):
        tune.keep({SMALL: (1.0, plan.choose(SMALL, H100))}, NAME)
    assert list(file.parent.iterdir()) == [file] and file.read_bytes() == before


# --- files that are not as `keep` writes them ---


def write(text: str | bytes) -> None:
    file = tune.file_of(NAME)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())


def entries(**changes: object) -> dict[str, dict[str, object]]:
    """A file with one entry, of a product on `mma.sync`, which can be used as it stands."""
    best = last_of(SMALL)
    assert best.path == "mma"
    return {json.dumps(asdict(SMALL)): {"path": best.path, "tile": asdict(best.tile), "us": 9.0, **changes}}


def test_the_entry_that_the_following_tests_damage_is_good():
    write(json.dumps(entries()))
    assert tune.lookup(SMALL, NAME, H100) == last_of(SMALL)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", b"\xff\xfe", "[]", "null", '"x"', "3", "[" * 100_000),
        *('{"x": {}}', '{"[]": {}}', '{"{}": 1}'),
        json.dumps({json.dumps({**asdict(SMALL), "m": "1"}): next(iter(entries().values()))}),
        *map(
            json.dumps,
            [
                entries(path="magic"),
                entries(path="magic", tile=None),
                entries(path=["decode"]),
                entries(path="decode"),
                entries(path="dequantize"),
                entries(tile=None),
                entries(tile={}),
                entries(tile=[1]),
                entries(tile={**asdict(last_of(SMALL).tile), "color": 3}),
                entries(tile={**asdict(last_of(SMALL).tile), "tokens": "8"}),
                entries(us=None),
                {key: {"path": "decode"} for key in entries()},
            ],
        ),
    ],
)
def test_a_damaged_file_is_ignored_with_one_warning_and_repaired_by_the_next_keep(text):
    write(text)
    with pytest.warns(RuntimeWarning, match=r"H100.*run `abq tune` again") as warned:
        assert [tune.lookup(replace(SMALL, m=m), NAME, H100) for m in (1, 2, 1)] == [None] * 3
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tune.keep({SMALL: (9.0, last_of(SMALL))}, NAME)
        forget()
        assert tune.lookup(SMALL, NAME, H100) == last_of(SMALL)


def test_one_bad_entry_leaves_the_others():
    other = problem("W2A8", 4)
    file = tune.keep({other: (3.0, last_of(other))}, NAME)
    write(json.dumps({**json.loads(file.read_text()), **entries(path="magic")}))
    forget()
    with pytest.warns(RuntimeWarning, match="1 of 2 tuned kernels"):
        assert tune.lookup(other, NAME, H100) == last_of(other)


def test_a_plan_that_does_not_suit_the_problem_is_not_used():
    """Of another shape, of another GPU, or of another version."""
    four = problem("W4A8", 4)
    fused = next(one for one in tune.plans(SMALL, H100) if getattr(one.tile, "fused", False))
    tune.keep({four: (1.0, fused)}, NAME)  # it quantizes one token
    with pytest.warns(RuntimeWarning, match="this version") as warned:
        assert [tune.lookup(four, NAME, H100) for _ in range(2)] == [None, None]
    assert len(warned) == 1
    many = problem("W4A8", 64)
    tune.keep({many: (1.0, next(one for one in tune.plans(many, H100) if one.path == "wgmma"))}, "NVIDIA A10")
    with pytest.warns(RuntimeWarning, match="this version"):
        assert tune.lookup(many, "NVIDIA A10", A10) is None


def test_without_a_home_there_is_nothing_to_look_up(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(jit, "cache_directory", homeless)
    assert tune.lookup(SMALL, NAME, H100) is None
    with pytest.raises(AbqError, match="ABQ_CACHE_DIR"):
        tune.keep({}, NAME)


# --- the backend ---


def test_the_backend_uses_what_was_kept(monkeypatch):
    monkeypatch.setattr(cuda, "gpu", lambda index: H100)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: (NAME, "NVIDIA H200")[index])
    used = []
    monkeypatch.setattr(cuda, "run", lambda chosen, problem, *tensors: used.append(chosen))
    weight = [torch.empty(SMALL.n, 0)]

    def used_by(m: int, index: int) -> Plan:
        x = torch.empty(m, SMALL.k)
        monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: index)
        cuda.linear(x, weight, None, Scheme.parse("W4A8"))
        return used[-1]

    assert used_by(1, 0) == plan.choose(SMALL, H100)
    tune.keep({SMALL: (9.0, last_of(SMALL))}, NAME)
    cuda._plan.cache_clear()
    assert used_by(1, 0) == last_of(SMALL)
    assert used_by(1, 1) == plan.choose(SMALL, H100)
    assert used_by(3, 0) == plan.choose(replace(SMALL, m=3), H100)
    hits = cuda._plan.cache_info().hits
    used_by(1, 0)
    assert cuda._plan.cache_info().hits == hits + 1


# --- search ---


def test_search_leaves_out_what_does_not_run(monkeypatch):
    times = dict(zip(tune.plans(SMALL, H100), (3.0, None, 2.0, 2.5), strict=False))

    def measure(candidate, *_):
        if times.get(candidate) is None:
            raise AbqError(f"{candidate.path} does not compile")
        return times[candidate]

    monkeypatch.setattr(tune, "measure", measure)
    tried = tune.plans(SMALL, H100)
    found = tune.search(SMALL, cuda.run, H100, torch.empty(0), [])
    assert found == [(2.0, tried[2]), (2.5, tried[3]), (3.0, tried[0])] and tried[0] == plan.choose(SMALL, H100)
    times.clear()
    with pytest.raises(AbqError, match="no kernel runs: decode does not compile"):
        tune.search(SMALL, cuda.run, H100, torch.empty(0), [])


def test_cold_copies():
    weight = [torch.arange(2**20), torch.ones(2**20)]  # 12 MiB
    copies = tune.cold_copies(weight)
    assert len(copies) == 11 and copies[0] is weight
    assert len({copy[0].data_ptr() for copy in copies}) == 11
    assert all(torch.equal(copy[0], weight[0]) and torch.equal(copy[1], weight[1]) for copy in copies)
    assert len(tune.cold_copies([torch.ones(1)])) == 201


# --- compilation ahead ---


class Pool:
    """Does the jobs at once, by the `_compile` of this process."""

    def __init__(self) -> None:
        self.jobs: list[tuple[str, str, str]] = []

    def submit(self, function, *job):
        assert function is tune._compile
        self.jobs.append(job)
        done: Future[None] = Future()
        done.set_result(function(*job))
        return done


@pytest.fixture
def compiled(monkeypatch):
    """(stem, name, constants, arch) of what is compiled; half of it fails."""
    jobs = []

    def compile_cubin(*job):
        jobs.append(job)
        if len(jobs) % 2:
            raise AbqError("no")

    monkeypatch.setattr(jit, "compile_cubin", compile_cubin)
    return jobs


@pytest.mark.parametrize("gpu", [H100, A10], ids=["sm_90", "sm_86"])
def test_precompile_compiles_every_candidate_once(compiled, gpu):
    problems = [problem(*args) for args in (("W2A2", 1), ("W2A2", 64), ("W4A8g128", 16), ("W4A16", 1), ("W4A16", 512))]
    pool, steps = Pool(), []
    tune.precompile(problems, gpu, torch.bfloat16, "sm_x", pool, lambda *step: steps.append(step))

    wanted = {
        (stem, json.dumps(constants))
        for one in problems
        for candidate in tune.plans(one, gpu)
        if candidate.tile
        for stem, constants in [tune._kernel(candidate, one, torch.bfloat16, gpu)]
    }
    assert sorted(pool.jobs) == sorted((*job, "sm_x") for job in wanted)
    stems = {
        "decode",
        "gemm_mma",
        "gemm_mma_f16",
        *(["gemm_wgmma", "gemm_wgmma_b1", "gemm_wgmma_f16"] if gpu is H100 else []),
    }
    assert {stem for stem, _, _ in pool.jobs} == stems
    assert sorted((stem, json.dumps(constants)) for stem, _, constants, _ in compiled) == sorted(wanted)
    assert {constants["T"] for _, _, constants, _ in compiled} == {"bf16_t"}
    assert steps == [(done, len(wanted)) for done in range(len(wanted) + 1)]


@pytest.mark.parametrize(
    ("scheme", "m", "paths"),
    [
        ("W2A2", 1, {"decode", "mma"}),
        ("W2A2", 40, {"decode", "mma", "wgmma", "wgmma_b1"}),
        ("W3A4g128", 20, {"decode", "mma", "wgmma"}),
        ("W4A16g48", 2, {"mma_f16"}),
        ("W4A16g48", 20, {"mma_f16", "wgmma_f16"}),
    ],
)
def test_what_is_precompiled_is_what_a_run_loads(monkeypatch, scheme, m, paths):
    """The launches go nowhere, from tensors that say they are on a GPU."""
    wanted = problem(scheme, m, 48, 512)
    chosen = {candidate.path: candidate for candidate in tune.plans(wanted, H100) if candidate.tile}
    assert set(chosen) == paths
    loaded = []

    def load(stem, name, constants, device):
        loaded.append((stem, constants))
        return SimpleNamespace()

    monkeypatch.setattr(jit, "load", load)
    monkeypatch.setattr(launch, "launch", lambda *args, **options: None)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 0)
    limits = {"multi_processor_count": H100.sms, "shared_memory_per_block_optin": H100.shared_limit}
    facts = SimpleNamespace(major=9, minor=0, **limits)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    caches = gemm_mma._kernel, gpu
    parsed = Scheme.parse(scheme)
    layout = buffer_layout(wanted.k, wanted.n, parsed, torch.float16).values()
    weight = cuda.prepare([torch.zeros(shape, dtype=dtype) for shape, dtype in layout], parsed, wanted.k)
    try:
        for candidate in chosen.values():
            for cached in caches:
                cached.cache_clear()
            cuda.run(candidate, wanted, torch.zeros(m, wanted.k).half(), weight, None)
            assert loaded[-1] == tune._kernel(candidate, wanted, torch.float16, H100)
    finally:
        for cached in caches:
            cached.cache_clear()


def test_precompile_of_nothing():
    pool = Pool()
    tune.precompile([], H100, torch.float16, "sm_90a", pool)
    assert pool.jobs == []


def test_a_stopped_precompile_cancels_what_waits():
    waiting: list[Future[None]] = []

    class Stuck:
        def submit(self, *job):
            waiting.append(Future())
            if len(waiting) == 1:
                waiting[0].set_exception(KeyboardInterrupt())
            return waiting[-1]

    with pytest.raises(KeyboardInterrupt):
        tune.precompile([SMALL], H100, torch.float16, "sm_90a", Stuck())
    assert len(waiting) > 1 and all(job.cancelled() for job in waiting[1:])
