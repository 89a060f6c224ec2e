import copy
import math
from itertools import pairwise

import pytest
import torch

from abq_llm.architectures import QueryKeyPair, ValueOutputPair
from abq_llm.calibration.transforms import block_parameters
from abq_llm.errors import AbqError
from abq_llm.methods import affinequant, method_by_name
from abq_llm.methods.affinequant import AffineQuant, gradual_mask
from abq_llm.methods.omniquant import OmniQuant
from tests.blocks import first_block, folded, rows_of
from tests.tiny import VARIANTS, tiny_model

QUICK = {"epochs": 4, "lr_lwc": 0.2, "lr_let": 0.05}


def block(variant="llama-gqa-tied", scheme="W4A4KV4", **changes):
    model_type, overrides = VARIANTS[variant]
    return first_block(tiny_model(model_type, **overrides), scheme, samples=16, **changes)


def test_the_mask_opens_from_the_diagonal():
    assert not gradual_mask(8, 0, 4).any() and not gradual_mask(8, 0, 1).any()
    off_diagonal = ~torch.eye(8, dtype=torch.bool)
    assert torch.equal(gradual_mask(8, 3, 4), off_diagonal)
    assert gradual_mask(4, 1, 4).int().tolist() == [[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]]
    for d, epochs in ((8, 4), (16, 20), (64, 20), (64, 2)):
        masks = [gradual_mask(d, epoch, epochs) for epoch in range(epochs)]
        assert all((later >= earlier).all() for earlier, later in pairwise(masks))
        bands = [int(mask[0].sum()) for mask in masks]
        assert bands == [int((d - 1) / (epochs - 1) * epoch + 1e-9) for epoch in range(epochs)]


def test_entries_stay_zero_until_they_are_opened(monkeypatch):
    """And those that are open move: the state after an epoch has that epoch's bands."""
    opened = gradual_mask(16, 1, 4)
    monkeypatch.setattr(affinequant, "gradual_mask", lambda d, epoch, epochs: gradual_mask(d, min(epoch, 1), 4))
    (P,) = folded(block(), AffineQuant(**QUICK)).mix.values()
    assert (P[:, ~opened] == 0).all() and (P[:, opened] != 0).float().mean() > 0.9


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_head_has_a_matrix_of_its_own(variant):
    task = block(variant, "W3A3KV3")
    vectors = folded(task, AffineQuant(**{**QUICK, "epochs": 8, "stability": 0.6}))
    kinds = [QueryKeyPair, ValueOutputPair] if variant in ("opt", "falcon-rw") else [ValueOutputPair]
    assert [type(pair) for pair in vectors.mix] == kinds
    for pair, P in vectors.mix.items():
        part = pair.value if isinstance(pair, ValueOutputPair) else pair.key
        assert P.shape == (len(rows_of(task.block, part)) // task.head_dim, *[task.head_dim] * 2)
        assert (P.abs().amax((1, 2)) > 1e-3).all() and not P.diagonal(dim1=1, dim2=2).any()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_without_quantizers_the_block_computes_the_same(variant):
    task = block(variant)
    expected = task.fp_output.clone()
    before = block_parameters(copy.deepcopy(task.block))
    with torch.enable_grad():
        AffineQuant(**QUICK, stability=1).quantize_block(task)
    output = task.forward_stream(task.fp_stream, quantized=False)
    assert (output - expected).norm() < 5e-6 * expected.norm()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in block_parameters(task.block).items())


def test_without_stability_it_is_omniquant():
    ours, theirs = block(), block()
    grids = AffineQuant(**QUICK, stability=0).quantize_block(ours), OmniQuant(**QUICK).quantize_block(theirs)
    torch.testing.assert_close(block_parameters(ours.block), block_parameters(theirs.block), rtol=1e-6, atol=1e-7)
    for name in grids[0]:
        torch.testing.assert_close(grids[0][name], grids[1][name])


def loss(**options):
    losses = []
    for variant in ("llama-gqa-tied", "qwen2", "opt"):
        task = block(variant, "W3A3KV3")
        AffineQuant(**{**QUICK, "epochs": 8, **options}).quantize_block(task)
        losses.append(task.block_loss)
    return torch.tensor(losses)


def test_training_lowers_the_loss_and_matrices_help():
    start, scales, matrices = loss(epochs=0), loss(stability=0), loss(stability=0.6)
    assert (matrices < 0.9 * start).all()
    assert (matrices / scales).mean() < 0.95


@pytest.mark.parametrize("options", [{"epochs": -1}, {"alpha": 1.1}, {"stability": -0.1}, {"stability": math.nan}])
def test_impossible_options_are_refused(options):
    with pytest.raises(AbqError, match="epochs and stability must be >= 0"):
        method_by_name("affinequant", **options)
