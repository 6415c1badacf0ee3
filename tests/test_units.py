import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxext import units
from ctxext.errors import InputError


@pytest.mark.parametrize(
    ("given_value", "tokens"),
    [
        ("100k", 102_400),
        ("3.5k", 3_584),
        ("8K", 8_192),
        ("1m", 1_048_576),
        ("0.5m", 524_288),
        ("102,400", 102_400),
        ("102_400", 102_400),
        ("1,024k", 1_048_576),
        (" 512 ", 512),
        ("0", 0),
        (8192, 8192),
        (0, 0),
    ],
)
def test_tokens_are_read(given_value, tokens):
    assert units.parse_tokens(given_value) == tokens


@pytest.mark.parametrize(
    "refused",
    ["", " ", "3.5q", "k", "1e5", "010", "-1", "-8k", "+8k", "3.5", "0.3k", "1,2", "1,0240", "1__0", "8kk", "8 8"]
    + ["8kb", "0x10", "inf", "nan", "٣k", "9" * 500, -1, 1.5, 8192.0, True, None, ["8k"]],
)
def test_tokens_are_refused_with_what_was_given_and_what_is_allowed(refused):
    with pytest.raises(InputError, match="tokens; allowed: a whole number of tokens"):
        units.parse_tokens(refused)


@given(st.integers(min_value=0, max_value=10**15))
def test_formatted_tokens_are_read_back(count):
    assert units.parse_tokens(units.format_tokens(count)) == count


@pytest.mark.parametrize(
    ("given_value", "size"),
    [
        ("80G", 80 * 1024**3),
        ("80GB", 80 * 1024**3),
        ("80 GiB", 80 * 1024**3),
        ("1.5g", 3 * 1024**3 // 2),
        ("512M", 512 * 1024**2),
        ("2T", 2 * 1024**4),
        ("7B", 7),
        ("1024", 1024),
        (3, 3),
    ],
)
def test_bytes_are_read(given_value, size):
    assert units.parse_bytes(given_value) == size


@pytest.mark.parametrize("refused", ["", "80Q", "-1G", "1e9", "G", "0.3", 1.0, None])
def test_bytes_are_refused(refused):
    with pytest.raises(InputError, match="bytes; allowed: a whole number of bytes"):
        units.parse_bytes(refused)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (1e-6, "under 0.1 ms"),
        (0.00412, "4.1 ms"),
        (0.0994, "99.4 ms"),
        (0.0996, "0.1 s"),
        (3.2, "3.2 s"),
        (9.96, "10 s"),
        (59.6, "1 min"),
        (725, "12 min 5 s"),
        (4980, "1 h 23 min"),
        (7200, "2 h"),
        (183_600, "2 d 3 h"),
    ],
)
def test_durations_are_written(seconds, text):
    assert units.format_duration(seconds) == text


def test_one_thing_is_no_plural():
    assert [units.counted(n, "sequence") for n in (0, 1, 2000)] == ["0 sequences", "1 sequence", "2,000 sequences"]
    assert units.counted(1, "process", "processes") == "1 process" and units.counted(2, "pass", "passes") == "2 passes"


@pytest.mark.parametrize(
    ("count", "text"),
    [(640, "640 B"), (1024, "1 KiB"), (3 * 1024**3 // 2, "1.5 GiB"), (2 * 1024**4, "2 TiB"), (5 * 1024**5, "5120 TiB")],
)
def test_bytes_are_written(count, text):
    assert units.format_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (1_200_000, "1.2M"), (999_999, "1M"), (6_738_415_616, "6.7B")],
)
def test_counts_are_written(count, text):
    assert units.format_count(count) == text


def test_flops_are_written():
    assert units.format_flops(3.4e12) == "3.4 TFLOP"
    assert units.format_flops(12) == "12 FLOP"
