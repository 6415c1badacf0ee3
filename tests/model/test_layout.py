import pytest

from ctxext.errors import InputError, SpecError
from ctxext.model.layout import LayerKind, find_hybrid, layer_kinds, pattern_text


def letters(name, layers, full=None, window=None):
    return pattern_text(layer_kinds(find_hybrid(name, window), layers, full))


def test_pattern_is_tiled_from_layer_0_and_cut_at_the_last():
    assert letters("swa128-nope", 5) == "SNSNS, window 128"
    assert letters("rnope-swa4096", 6) == "SSSNSS, window 4096"
    assert letters("full", 3) == "FFF"
    assert letters("SSSF", 5, window=7) == "SSSFS, window 7"


@pytest.mark.parametrize(
    ("full", "expected"), [("odd", "SNSNS"), ("even", "NSNSN"), ("last", "SSSSN"), ("1,4", "SNSSN"), ("0", "NSSSS")]
)
def test_full_layers_get_the_full_letter_and_all_others_are_sliding(full, expected):
    assert letters("swa128-nope", 5, full) == f"{expected}, window 128"
    assert letters("swa128", 5, full) == f"{expected.replace('N', 'F')}, window 128"


def test_kinds_say_what_the_letters_mean():
    kinds = layer_kinds(find_hybrid("SNF", 3), 3)
    assert kinds == (LayerKind(True, 3), LayerKind(False, None), LayerKind(True, None))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: find_hybrid("swa128-nop"), InputError, "swa128-nope"),
        (lambda: find_hybrid("SSN"), InputError, "window"),
        (
            lambda: find_hybrid("SSXN"),
            InputError,
            "a pattern has the capital letters S, N and F only, not 'X' S is RoPE",
        ),
        (lambda: find_hybrid("sssn"), InputError, "not 's' did you mean SSSN?"),
        (lambda: find_hybrid("ful"), InputError, "not 'f' did you mean full"),
        (lambda: find_hybrid("swa128-nope", 0), SpecError, "1 or more"),
        (lambda: letters("swa128-nope", 4, "5"), InputError, "no layer 5"),
        (lambda: letters("swa128-nope", 4, "all"), InputError, "odd, even, last"),
        (lambda: letters("full", 4, "odd"), InputError, "swa128-nope"),
        (lambda: letters("SNF", 4, "odd", 8), InputError, "exactly one of N and F"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in f"{caught.value.message} {caught.value.hint}"
