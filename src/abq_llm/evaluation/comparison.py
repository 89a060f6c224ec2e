"""Methods and schemes compared on one model: each cell of the table is quantized, packed, loaded again and evaluated.

The result of a cell is a JSON file named by the hash of everything that decides it, so a table can be stopped, resumed
and extended; only cells without a file are computed.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from abq_llm import checkpoint
from abq_llm.data import TokenSet
from abq_llm.devices import device_name
from abq_llm.errors import AbqError
from abq_llm.evaluation.perplexity import evaluate
from abq_llm.locks import locked
from abq_llm.methods import Method
from abq_llm.models import load_model
from abq_llm.quantize import hash_weights, quantize
from abq_llm.scheme import Scheme
from abq_llm.version import __version__

UNQUANTIZED = "fp"  # name of the method of the row to compare with

Record = dict[str, Any]


class Tasks(Protocol):
    """Zero-shot tasks, without saying whose."""

    def score(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Record]:
        """Task -> {"acc", "acc_norm", "stderr"}."""

    def inputs(self) -> Record:
        """What decides the scores besides the model, as JSON."""


@dataclass(frozen=True)
class Cell:
    """What differs from cell to cell.

    Attributes:
        label: the method as it was asked for, such as "abq:dlc=False"; `UNQUANTIZED` with a method of None.
        calibration: None for a method that needs none.
    """

    scheme: str
    label: str
    method: Method | None = None
    seed: int = 0
    calibration: TokenSet | None = None


@dataclass(frozen=True)
class Setup:
    """What all cells share.

    Attributes:
        model, model_sha256: hub id or path, and `hash_model` of it.
        backend: of the packed model, an actual one.
        batch_size: calibration samples in a training step.
        commit: of the code, kept in each record; not part of its hash.
    """

    model: str
    model_sha256: str
    device: torch.device
    backend: str
    texts: tuple[TokenSet, ...]
    batch_size: int = 1
    tasks: Tasks | None = None
    commit: str | None = None


def cells(
    schemes: Iterable[Scheme], methods: Mapping[str, Method], seeds: Sequence[int], draw: Callable[[int], TokenSet]
) -> list[Cell]:
    """The unquantized model, then every method (by its label) at every scheme.

    Methods that look at data come once for each seed, which draws it (`draw`), the others with the first.
    """
    found = [Cell("W16A16", UNQUANTIZED)]
    for scheme in schemes:
        for label, method in methods.items():
            for seed in seeds if method.needs_data else seeds[:1]:
                found.append(Cell(str(scheme), label, method, seed, draw(seed) if method.needs_data else None))
    return found


def hash_model(model: PreTrainedModel) -> str:
    """Hex SHA-256 of the weights and of the configuration, wherever the model was loaded from."""
    config = model.config.to_diff_dict()
    config = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    return hashlib.sha256((json.dumps(config, sort_keys=True, default=str) + hash_weights(model)).encode()).hexdigest()


def file_of(directory: Path, cell: Cell, setup: Setup) -> Path:
    """Where the record of a cell is, or will be."""
    inputs = json.dumps(_inputs(cell, setup), sort_keys=True)
    return directory / f"{hashlib.sha256(inputs.encode()).hexdigest()[:24]}.json"


def _inputs(cell: Cell, setup: Setup) -> Record:
    """Everything that decides the figures of a cell."""
    return {
        "model": setup.model_sha256,
        "scheme": cell.scheme,
        "method": cell.method.name if cell.method else UNQUANTIZED,
        "options": asdict(cell.method) if cell.method else {},  # type: ignore[call-overload]
        "seed": cell.seed,
        "batch_size": setup.batch_size,
        "calibration": cell.calibration and _about(cell.calibration),
        "texts": [_about(text) for text in setup.texts],
        "tasks": setup.tasks and setup.tasks.inputs(),
        "device": setup.device.type,
        "backend": setup.backend,
        "versions": {"abq_llm": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _about(tokens: TokenSet) -> Record:
    return {"name": tokens.name, "shape": list(tokens.tokens.shape), "sha256": tokens.sha256}


def read(file: Path) -> Record | None:
    """The record in `file`; None if there is none.

    Raises:
        AbqError: the file is damaged.
    """
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AbqError(f"{file}: not a record of a comparison ({error}); delete it to compute it anew") from error
    return dict(record)


def compute(cell: Cell, setup: Setup, directory: Path, note: Callable[[str], None] = lambda _: None) -> str | None:
    """Compute a cell and write its record to `file_of(directory, cell, setup)`.

    Blocks that a stopped computation has finished are not computed again; then the record has no "seconds". `note` is
    called with what is going on.

    Returns:
        None, or in one line why it failed; then nothing is written.
    """
    file = file_of(directory, cell, setup)
    work = file.with_suffix(".partial")  # finished blocks, then the checkpoint
    try:
        with locked(work):
            if not file.exists():
                _write(file, _measure(cell, setup, work, note))
            shutil.rmtree(work, ignore_errors=True)
    except Exception as error:  # one bad cell, out of memory perhaps, must not cost the table
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _write(file: Path, record: Record) -> None:
    aside = file.with_suffix(".tmp")
    try:
        aside.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def _measure(cell: Cell, setup: Setup, work: Path, note: Callable[[str], None]) -> Record:
    base, tokenizer = open_base(setup.model)
    reference = _reference(setup.model, setup.device)
    if cell.method is None:
        size = checkpoint.packed_size(base).size_bytes
        packed: Record = {"bits_per_weight": 8.0 * base.dtype.itemsize, "size_bytes": size}
        packed |= {"seconds": None, "peak_memory_bytes": None}
        reference.to(setup.device)  # type: ignore[arg-type]
        return _record(cell, setup, packed, _figures(reference, None, tokenizer, setup, note))

    network = copy.deepcopy(base)
    reference.to("cpu")  # type: ignore[arg-type]  # its memory is not the method's
    resumed = any(work.iterdir())

    def progress(block: int, blocks: int, loss: float | None, message: str) -> None:
        note(f"block {block + 1}/{blocks} {message}")

    report = quantize(
        network,
        cell.scheme,
        cell.method,
        cell.calibration,
        device=setup.device,
        seed=cell.seed,
        batch_size=setup.batch_size,
        work_dir=work,
        progress=progress,
    )
    saved = work / "packed"
    shutil.rmtree(saved, ignore_errors=True)  # of a computation that was stopped
    checkpoint.save(network, saved, provenance=report.provenance)
    size = checkpoint.packed_size(saved).size_bytes
    del network
    loaded, _ = checkpoint.load(saved, device=setup.device, dtype=reference.dtype, backend=setup.backend)
    packed = {"bits_per_weight": report.bits_per_weight, "size_bytes": size}
    packed |= {"seconds": None if resumed else report.seconds, "peak_memory_bytes": report.peak_memory_bytes}
    reference.to(setup.device)  # type: ignore[arg-type]
    return _record(cell, setup, packed, _figures(loaded, reference, tokenizer, setup, note))


def _figures(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    setup: Setup,
    note: Callable[[str], None],
) -> Record:
    """Perplexity, KL and top-1 agreement by text, and the scores by task."""
    started = time.monotonic()
    perplexity, kl, agreement, tasks = {}, {}, {}, {}
    for text in setup.texts:
        note(f"evaluating on {text.name}")
        result = evaluate(model, text.tokens, reference)
        perplexity[text.name] = result.perplexity if math.isfinite(result.perplexity) else None
        kl[text.name], agreement[text.name] = result.kl, result.top1_agreement
    if setup.tasks is not None:
        note("evaluating on tasks")
        tasks = setup.tasks.score(model, tokenizer)
    figures = {"perplexity": perplexity, "kl": kl, "top1_agreement": agreement, "tasks": tasks}
    return {**figures, "evaluation_seconds": time.monotonic() - started}


def _record(cell: Cell, setup: Setup, packed: Record, figures: Record) -> Record:
    return {
        "scheme": cell.scheme,
        "method": cell.label,
        "seed": cell.seed,
        **packed,
        **figures,
        "device_name": device_name(setup.device),
        "commit": setup.commit,
        "inputs": _inputs(cell, setup),
    }


@functools.lru_cache(maxsize=1)
def open_base(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to quantize, in its own dtype on the CPU, with its tokenizer; every cell quantizes a copy."""
    return load_model(name)


@functools.lru_cache(maxsize=1)
def _reference(name: str, device: torch.device) -> PreTrainedModel:
    """The model to compare with: float32 on a CPU, its own dtype elsewhere, as in `abq eval`."""
    model = copy.deepcopy(open_base(name)[0])
    return (model.float() if device.type == "cpu" else model).to(device)  # type: ignore[arg-type]


# --- over the seeds ---


def accuracy(record: Record) -> float | None:
    """Mean over the tasks of acc_norm, or of acc where there is no other, as papers average; None without tasks."""
    scores = [task["acc"] if task["acc_norm"] is None else task["acc_norm"] for task in record["tasks"].values()]
    return statistics.mean(scores) if scores else None


def over_seeds(records: Iterable[Record]) -> list[Record]:
    """One row for each scheme and method, in the order of `records`: figures as {"mean", "std"}.

    std is that of a sample, None for one seed; a figure that one of the seeds has not is None for all.
    """
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record["scheme"], record["method"]].append(record)
    rows = []
    for (scheme, method), runs in groups.items():
        row: Record = {"scheme": scheme, "method": method, "seeds": [run["seed"] for run in runs]}
        for key in ("bits_per_weight", "size_bytes", "seconds", "peak_memory_bytes"):
            row[key] = _spread([run[key] for run in runs])
        for key in ("perplexity", "kl", "top1_agreement"):
            row[key] = {text: _spread([run[key][text] for run in runs]) for text in runs[0][key]}
        row["tasks"] = {
            task: {key: _spread([run["tasks"][task][key] for run in runs]) for key in ("acc", "acc_norm")}
            for task in runs[0]["tasks"]
        }
        row["accuracy"] = _spread([accuracy(run) for run in runs])
        rows.append(row)
    return rows


def _spread(values: list[float | None]) -> Record | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return {"mean": statistics.mean(known), "std": statistics.stdev(known) if len(known) > 1 else None}
