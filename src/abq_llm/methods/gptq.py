"""GPTQ (Frantar, Ashkboos, Hoefler, Alistarh, ICLR 2023, arXiv:2210.17323).

Rounds the columns of W [N, K] one after the other, each time moving the columns that are left so that they make up for
the error on the inputs X [K, tokens]:

    H = 2 X X^T + damp mean(diag H) I       H^-1 = U^T U, U upper triangular (the paper's Cholesky factor)
    Q_i = quant(W_i)      E_i = (W_i - Q_i) / U_ii      W_j -= E_i U_ij  for j > i

within blocks of B columns at once, and on what lies behind a block when it is done (lazy batches, section 3.3, step 2).
With `correction`, the target is no longer W X but on the way to W X_fp, X_fp being the inputs on the fp stream (the
asymmetric calibration of GPTAQ, Li et al., ICML 2025, arXiv:2504.02692): what the inputs have lost, the weights make up
for. || W X_fp - Q X ||^2 = || W' X - Q X ||^2 + const for W' = W X_fp X^T (X X^T)^-1, so W' is rounded instead of W.

The linears of a block are rounded in the order in which they run: X holds what the linears before them make of the
quantized stream once they are rounded, with activations and KV quantized as in the scheme. Options and differences from
the paper and its published code are in docs/methods/gptq.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from abq_llm.calibration.block import BlockTask, output_error
from abq_llm.calibration.moments import linears_by_input, moments
from abq_llm.calibration.transforms import block_parameters
from abq_llm.errors import AbqError
from abq_llm.quantizers import QParams, choose_qparams, fake_quantize, to_groups
from abq_llm.scheme import IntFormat, Scheme

ATTEMPTS = 5  # each with ten times the damping of the one before


@dataclass(frozen=True)
class Gptq:
    """Options. The paper's text is act_order=False, mse=False; its code has both."""

    name: ClassVar[str] = "gptq"
    needs_data: ClassVar[bool] = True

    damp: float = 0.01  # of the mean of diag H, added to the diagonal
    block: int = 128  # B; changes the speed, not the result
    act_order: bool = True  # columns of large diag H first; implies static_groups
    static_groups: bool = False  # grids from the original weight; off: from the weight as it is when a group is reached
    mse: bool = True  # grids of least |W - quant(W)|^2.4 over shrunk ranges; off: min-max
    correction: float = 0.0  # how far to go from W to W', 0..1; GPTQ itself is 0

    def __post_init__(self) -> None:
        if not 0 <= self.damp < float("inf") or self.block < 1 or not 0 <= self.correction <= 1:
            raise AbqError(f"{self}: damp must be finite and >= 0, block >= 1, correction in 0..1")

    def quantize_block(self, task: BlockTask) -> dict[str, QParams]:
        target = task.fp_output
        original = copy.deepcopy(block_parameters(task.block)) if self.correction else None
        grids: dict[str, QParams] = {}
        for names in linears_by_input(task):
            where = f"block {task.index}: {', '.join(names)}"
            task.report(where, None)
            linears = [task.linears[name] for name in names]
            W = torch.cat([linear.weight.detach() for linear in linears])  # rows do not know of each other
            H, D = moments(task, linears[0], original)
            try:
                if D is not None:
                    W = corrected(W, H, D, self, _reporter(task, where))
                Q, grid = round_columns(W, H, task.scheme, self, task.scale_dtype, _reporter(task, where))
            except AbqError as error:
                raise AbqError(f"{where}: {error}") from None
            rows = [linear.out_features for linear in linears]
            for name, linear, q, scale, zero_point in zip(
                names, linears, Q.split(rows), grid.scale.split(rows), grid.zero_point.split(rows), strict=True
            ):
                linear.weight.data = q.clone()
                grids[name] = QParams(scale, zero_point)
        task.block_loss = output_error(task, grids, target)
        return grids


@torch.no_grad()
def corrected(
    W: Tensor, H: Tensor, D: Tensor, options: Gptq, report: Callable[[str], None] = lambda message: None
) -> Tensor:
    """W [N, K] -> W + correction W D H^-1, fp32, with H damped. A column that is dead in X stays as it is."""
    U = inverse_factor(H, options.damp, report)
    return (W.double() + options.correction * (W.double() @ D @ U.T @ U)).float()


@torch.no_grad()
def round_columns(
    W: Tensor,
    H: Tensor,
    scheme: Scheme,
    options: Gptq,
    scale_dtype: torch.dtype = torch.float16,
    report: Callable[[str], None] = lambda message: None,
) -> tuple[Tensor, QParams]:
    """W [N, K] and H float64 [K, K] -> Q fp32 [N, K], on the grid to the last bit, and the grid [N, groups, 1].

    The arithmetic is float64, so that neither B nor the device decides a rounding. Groups are those of the original
    order of columns, whichever order they are rounded in.
    """
    assert scheme.weight is not None
    fmt, (n, k), B = scheme.weight, W.shape, options.block
    size = min(scheme.group_size or k, k)
    static = options.static_groups or options.act_order
    scale, zero_point = choose_grid(to_groups(W, size), fmt, scale_dtype, mse=options.mse)

    order = torch.arange(k, device=W.device)
    if options.act_order:
        order = H.diagonal().argsort(descending=True, stable=True)
    columns = order.tolist()
    W, Q = W[:, order].double(), torch.empty_like(W, dtype=torch.float32)
    U = inverse_factor(H[order][:, order], options.damp, report)

    for start in range(0, k, B):
        end = min(start + B, k)
        E = W.new_zeros(n, end - start)
        for i in range(start, end):
            group = columns[i] // size
            if not static and i % size == 0 and i > 0:
                now = W[:, i : i + size].clone()
                now[:, end - i :] -= E[:, : i - start] @ U[start:i, end : i + size]  # what the block still owes them
                grid = choose_grid(now, fmt, scale_dtype, mse=options.mse)
                scale[:, group], zero_point[:, group] = grid
            q = fake_quantize(W[:, i : i + 1], QParams(scale[:, group], zero_point[:, group]), fmt)
            e = (W[:, i : i + 1] - q) / U[i, i]
            W[:, i:end] -= e * U[i, i:end]
            Q[:, columns[i] : columns[i] + 1], E[:, i - start : i - start + 1] = q, e
        W[:, end:] -= E @ U[start:end, end:]
    return Q, QParams(scale, zero_point)


def inverse_factor(H: Tensor, damp: float, report: Callable[[str], None] = lambda message: None) -> Tensor:
    """U, upper triangular with H^-1 = U^T U, of H [K, K] after damping.

    With J the reversal of the columns, J H J = L L^T makes J L J upper triangular, H = (J L J)(J L J)^T, and so
    U = (J L J)^-1: the inverse of H itself, which would lose digits, is never formed. A dead column (H_jj = 0, so its
    whole row is 0) gets the mean of the diagonal: it is rounded to nearest and moves no other.

    Raises:
        AbqError: H is not finite, or not positive definite even with the most damping that is tried.
    """
    mean = H.diagonal().mean()
    if not mean.isfinite():
        raise AbqError("the Hessian is not finite: the inputs hold NaN, infinities or squares that overflow")
    mean = torch.where(mean > 0, mean, 1)
    for attempt in range(ATTEMPTS):
        if attempt:
            damp = max(10 * damp, 0.01)
            report(f"the Hessian is not positive definite, trying damping {damp:g}")
        damped = H.flip(0, 1)
        diagonal = damped.diagonal()
        diagonal.masked_fill_(diagonal == 0, mean).add_(damp * mean)
        L, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
            U = torch.linalg.solve_triangular(L.flip(0, 1), eye, upper=True)
            if U.isfinite().all():
                return U
    raise AbqError(f"the Hessian is not positive definite, not even with damping {damp:g} of its mean diagonal")


def choose_grid(groups: Tensor, fmt: IntFormat, scale_dtype: torch.dtype, *, mse: bool) -> QParams:
    """Grids [..., 1] of groups [..., size]: min-max, or of 81 ranges from 1 to 0.2 of it that of least |error|^2.4."""
    best = choose_qparams(groups, fmt, scale_dtype=scale_dtype)
    if not mse:
        return best
    least = torch.full_like(best.scale, float("inf"))
    for shrink in torch.linspace(1.0, 0.2, 81).tolist():
        grid = choose_qparams(groups, fmt, clip_hi=shrink, clip_lo=shrink, scale_dtype=scale_dtype)
        error = (fake_quantize(groups, grid, fmt) - groups.float()).abs_().pow_(2.4).sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = QParams(*(torch.where(better, new, old) for new, old in zip(grid, best, strict=True)))
    return best


def _reporter(task: BlockTask, where: str) -> Callable[[str], None]:
    return lambda message: task.report(f"{where}: {message}", None)
