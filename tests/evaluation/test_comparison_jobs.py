"""Cells in several processes: in order, spread over devices, each error with its cell."""

import multiprocessing
import os
from dataclasses import replace
from types import SimpleNamespace

import torch

from abq_llm.cli.common import quiet_libraries
from abq_llm.evaluation import comparison_jobs
from abq_llm.evaluation.comparison import UNQUANTIZED, Cell, file_of, read
from abq_llm.evaluation.comparison_jobs import compute_all, longest_first
from abq_llm.methods import method_by_name
from tests.evaluation.test_comparison import directory, setup  # noqa: F401

CPUS = [torch.device("cpu", 0), torch.device("cpu", 1)]


class DeadlyTasks:
    """Tasks that end the process which scores them."""

    def score(self, model, tokenizer):
        os._exit(1)

    def inputs(self):
        return {}


def rtn(scheme):
    return Cell(scheme, "rtn", method_by_name("rtn"))


def test_the_longest_come_first_and_the_others_keep_their_order():
    names = ("rtn", "gptq", "abq", "awq", "omniquant")
    cells = [Cell("W16A16", UNQUANTIZED), *(Cell("W4A16", name, method_by_name(name)) for name in names)]
    ordered = [cell.label for cell, _ in longest_first([(cell, None) for cell in cells])]
    assert ordered == ["abq", "omniquant", "gptq", "awq", UNQUANTIZED, "rtn"]


def test_every_cell_comes_back_with_its_error(setup, tmp_path):  # noqa: F811
    cells = [rtn("W4A16"), Cell("W4A8", "abq", method_by_name("abq")), rtn("W3A8")]  # abq has no calibration
    results = dict(compute_all([(cell, setup) for cell in cells], tmp_path, CPUS[:1], 2, quiet_libraries))
    errors = {(cell.scheme, cell.label): error for (cell, _), error in results.items()}
    assert errors["W4A16", "rtn"] is None and errors["W3A8", "rtn"] is None
    assert errors["W4A8", "abq"].startswith("AbqError: method 'abq' learns from data")
    assert read(file_of(tmp_path, cells[0], setup))["perplexity"]


def test_a_process_that_dies_costs_its_cell_only(setup, tmp_path):  # noqa: F811
    deadly = replace(setup, tasks=DeadlyTasks())
    jobs = [(rtn("W4A16"), deadly), (rtn("W4A8"), setup), (rtn("W3A8"), setup)]
    errors = {cell.scheme: error for (cell, _), error in compute_all(jobs, tmp_path, CPUS[:1], 1, quiet_libraries)}
    assert errors == {"W4A16": "its process has died, of memory perhaps: try fewer --jobs", "W4A8": None, "W3A8": None}


def die():
    os._exit(1)


def test_a_process_that_dies_before_it_has_a_cell_costs_no_more(setup, tmp_path):  # noqa: F811
    results = list(compute_all([(rtn("W4A16"), setup), (rtn("W4A8"), setup)], tmp_path, CPUS[:1], 1, die))
    assert [error for _, error in results] == ["its process has died, of memory perhaps: try fewer --jobs"] * 2


def test_each_device_has_its_processes(setup, tmp_path, monkeypatch):  # noqa: F811
    started = []

    spawn = comparison_jobs.get_context("spawn")

    def process(**options):
        started.append(options["args"][2])
        return spawn.Process(**options)

    monkeypatch.setattr(comparison_jobs, "get_context", lambda _: SimpleNamespace(Pipe=spawn.Pipe, Process=process))
    jobs = [(rtn(scheme), setup) for scheme in ("W2A16", "W3A16", "W4A16", "W5A16")]
    assert all(error is None for _, error in compute_all(jobs, tmp_path, CPUS, 3, quiet_libraries))
    assert started == [CPUS[0], CPUS[1], CPUS[0]]


def test_closing_ends_the_processes(setup, tmp_path):  # noqa: F811
    jobs = [(rtn(scheme), setup) for scheme in ("W2A16", "W3A16", "W4A16", "W5A16", "W6A16", "W7A16")]
    results = compute_all(jobs, tmp_path, CPUS[:1], 2, quiet_libraries)
    next(results)
    results.close()
    for process in multiprocessing.active_children():
        process.join(10)
    assert multiprocessing.active_children() == []
    assert len(list(tmp_path.glob("*.json"))) < len(jobs)
