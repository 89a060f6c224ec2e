import pytest
from torch import nn

from abq_llm.architectures import TABLES, LinearPair, NormPair, QueryKeyPair, ValueOutputPair, architecture_of
from abq_llm.errors import AbqError
from tests.tiny import VARIANTS, tiny_model

MODELS = {**VARIANTS, **{name: (name, {}) for name in TABLES}}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def family(request):
    """(table, model)."""
    model_type, overrides = request.param
    return architecture_of(model_type), tiny_model(model_type, **overrides)


def blocks(table, model):
    found = model.get_submodule(table.blocks)
    assert isinstance(found, nn.ModuleList) and len(found) == model.config.num_hidden_layers
    return found


def test_every_linear_of_a_block_is_in_the_table_once(family):
    for block in blocks(*family):
        linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        assert sorted(family[0].linears) == sorted(linears)


def test_the_names_exist_and_the_channels_of_a_pair_meet(family):
    table, model = family
    for block in blocks(table, model):
        d = block.get_submodule(table.attention).head_dim
        assert set(table.compensated) <= set(table.linears)
        for pair in table.pairs:
            if isinstance(pair, NormPair):
                (channels,) = block.get_submodule(pair.norm).weight.shape
                assert {block.get_submodule(name).in_features for name in pair.linears} == {channels}
                assert set(pair.linears) <= set(table.linears)
                continue
            names = list(vars(pair).values())
            assert set(names) <= set(table.linears)
            first, second = (block.get_submodule(name) for name in names)
            if isinstance(pair, LinearPair):
                assert first.out_features == second.in_features
            elif isinstance(pair, ValueOutputPair):
                assert second.in_features % first.out_features == 0 and first.out_features % d == 0
            else:
                assert isinstance(pair, QueryKeyPair)
                assert first.out_features % second.out_features == 0 and second.out_features % d == 0


def test_a_linear_has_one_source_of_scales(family):
    """Two pairs on the input of one linear would divide two producers for one product."""
    fed = []
    for pair in family[0].pairs:
        fed += (
            pair.linears if isinstance(pair, NormPair) else [getattr(pair, "consumer", getattr(pair, "output", None))]
        )
    fed = [name for name in fed if name]
    assert sorted(fed) == sorted(set(fed)) == sorted(family[0].linears)


def test_a_table_is_found_by_each_of_its_types():
    for name, table in TABLES.items():
        assert architecture_of(name) is table and name in table.model_types


def test_an_unknown_type_is_named_with_the_known_ones():
    with pytest.raises(AbqError, match="'gpt9'") as error:
        architecture_of("gpt9")
    assert all(name in str(error.value) for name in TABLES) and "\n" not in str(error.value)
