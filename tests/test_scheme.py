import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abq_llm.errors import AbqError
from abq_llm.scheme import GRAMMAR, IntFormat, Scheme

WIDTHS = (*range(1, 9), 16)
WEIGHTS = [*((bits, False) for bits in WIDTHS), *((bits, True) for bits in range(1, 9))]
GROUPS = (None, 1, 32, 100, 128, 999999999)


@pytest.mark.parametrize(("bits", "balanced"), WEIGHTS)
def test_every_scheme_round_trips(bits, balanced):
    for act, kv, group in itertools.product(WIDTHS, (None, *WIDTHS), GROUPS):
        if bits == 16 and group:
            continue
        text = f"W{bits}{'*' * balanced}A{act}" + (f"KV{kv}" if kv else "") + (f"g{group}" if group else "")
        scheme = Scheme.parse(text)
        assert scheme == Scheme(
            weight=None if bits == 16 else IntFormat(bits, balanced=balanced),
            activation=None if act == 16 else IntFormat(act),
            kv=None if kv in (None, 16) else IntFormat(kv),
            group_size=group,
        )
        assert str(scheme) == text.replace("KV16", "")
        assert Scheme.parse(str(scheme)) == scheme
        for weight_symmetric, activation_symmetric in itertools.product((False, True), repeat=2):
            flags = {"weight_symmetric": weight_symmetric, "activation_symmetric": activation_symmetric}
            other = Scheme.parse(text, **flags)
            assert str(other) == str(scheme)
            assert other.weight_symmetric == (weight_symmetric and bits != 16 and not balanced)
            assert other.activation_symmetric == (activation_symmetric and (act != 16 or kv not in (None, 16)))
            assert Scheme.parse(str(other), **flags) == other


@pytest.mark.parametrize(
    ("text", "position", "why"),
    [
        ("", 0, "expected 'W'"),
        ("w4A8", 0, "expected 'W'"),
        (" W4A8", 0, "expected 'W'"),
        ("A8", 0, "expected 'W'"),
        ("W", 1, "expected a number after 'W'"),
        ("WA8", 1, "expected a number after 'W'"),
        ("W0A8", 1, "expected a number after 'W'"),
        ("W04A8", 1, "expected a number after 'W'"),
        ("W-4A8", 1, "expected a number after 'W'"),
        ("W٤A8", 1, "expected a number after 'W'"),
        ("W9A8", 1, "9 bits are not in 1..8 or 16"),
        ("W17A8", 1, "17 bits are not in 1..8 or 16"),
        ("W4", 2, "expected 'A'"),
        ("W4.5A8", 2, "expected 'A'"),
        ("W4a8", 2, "expected 'A'"),
        ("W2**A8", 3, "expected 'A'"),
        ("W16*A8", 3, "no levels to balance"),
        ("W4A", 3, "expected a number after 'A'"),
        ("W4A*8", 3, "expected a number after 'A'"),
        ("W4A10", 3, "10 bits are not in 1..8 or 16"),
        ("W4A8*", 4, "unexpected '*'"),
        ("W4A8 ", 4, "unexpected ' '"),
        ("W4A8\n", 4, r"unexpected '\n'"),
        ("W4A8K4", 4, "unexpected 'K4'"),
        ("W4A8G128", 4, "unexpected 'G128'"),
        ("W4A8KV", 6, "expected a number after 'KV'"),
        ("W4A8KV0", 6, "expected a number after 'KV'"),
        ("W4A8KV12", 6, "12 bits are not in 1..8 or 16"),
        ("W4A8KV4KV4", 7, "unexpected 'KV4'"),
        ("W4A8g", 5, "expected a number after 'g'"),
        ("W4A8g0", 5, "expected a number after 'g'"),
        ("W4A8g-1", 5, "expected a number after 'g'"),
        ("W4A8g128KV4", 8, "unexpected 'KV4'"),
        ("W4A8g128x", 8, "unexpected 'x'"),
        ("W4A8g" + "9" * 5000, 14, "unexpected '9"),
        ("W16A8g128", 9, "W16 stays floating point and has no groups"),
    ],
)
def test_a_bad_scheme_names_the_string_the_position_and_the_grammar(text, position, why):
    with pytest.raises(AbqError) as error:
        Scheme.parse(text)
    message = str(error.value)
    assert message.startswith(f"bad scheme {text!r} at position {position}: ")
    assert why in message
    assert message.endswith(f"the grammar is {GRAMMAR}")
    assert "\n" not in message
    assert isinstance(error.value, ValueError)


@given(st.text(alphabet="WAKVg*0123456789 ", max_size=12) | st.text(max_size=8))
def test_any_string_is_a_scheme_or_an_error(text):
    try:
        scheme = Scheme.parse(text)
    except AbqError as error:
        assert repr(text) in str(error)  # noqa: PT017
    else:
        assert str(scheme) == text.replace("KV16", "")


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_integer_formats(bits, balanced):
    fmt = IntFormat(bits, balanced=balanced)
    assert fmt.levels == (2**bits + 1 if balanced else 2**bits)
    assert fmt.qmax == fmt.levels - 1
    assert fmt.planes == fmt.qmax.bit_length() == (bits + 1 if balanced else bits)
    assert fmt.fixed_zero_point == (2 ** (bits - 1) if balanced else None)
    assert IntFormat(bits, balanced=balanced, symmetric=True).fixed_zero_point == 2 ** (bits - 1)
    if balanced:
        values = [code - fmt.fixed_zero_point for code in range(fmt.levels)]
        assert values == [-value for value in reversed(values)]


def test_scheme_properties():
    scheme = Scheme.parse("W2*A8KV4g128")
    assert (scheme.levels, scheme.planes) == (5, 3)
    assert [Scheme.parse("W16A8").levels, Scheme.parse("W16A8").planes] == [None, None]
    assert [scheme.groups(k) for k in (1, 127, 128, 129, 4096)] == [1, 1, 1, 2, 32]
    assert Scheme.parse("W2A8").groups(4096) == 1
    assert hash(scheme) == hash(Scheme.parse("W2*A8KV4g128"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.group_size = 64


@pytest.mark.parametrize(
    ("text", "shape", "flags", "scale_bits", "expected"),
    [
        ("W4A8g128", (4096, 4096), {}, 16, 4 + (16 + 8) / 128),
        ("W4A8g128", (4096, 4096), {"weight_symmetric": True}, 16, 4 + 16 / 128),
        ("W2*A8", (4096, 4096), {}, 16, 3 + 16 / 4096),
        ("W2*A8", (7, 4096), {}, 32, 3 + 32 / 4096),
        ("W8*A8", (1, 32), {}, 16, 9 + 16 / 32),
        ("W1A8", (2, 33), {}, 16, (64 + 24) / 33),
        ("W3A16g100", (5, 250), {}, 16, (3 * 256 + 3 * 24) / 250),
        ("W16A8", (8, 8), {}, 16, 16),
    ],
)
def test_bits_per_weight_counts_scales_zero_points_and_padding(text, shape, flags, scale_bits, expected):
    assert math.isclose(Scheme.parse(text, **flags).bits_per_weight(*shape, scale_bits), expected, rel_tol=1e-12)
