import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stamp_fast import ArgumentError
from stamp_fast.early import indicator, settled, similarity

HISTORY = [[64, 100], [60, 110], [58, 112], [57, 113], [57, 114], [56, 114]]
counts = st.integers(1, 6).flatmap(
    lambda layers: st.lists(st.lists(st.integers(0, 512), min_size=layers, max_size=layers), min_size=2, max_size=8)
)


def test_goldens():
    assert similarity([64, 128, 256], [60, 128, 200]) == pytest.approx(0.9483116, abs=1e-7)
    assert similarity([10, 0], [0, 10]) == 0
    found = [similarity(HISTORY[-1], HISTORY[-1 - j]) for j in range(1, 6)]
    assert found == pytest.approx([0.99558, 0.99337, 0.98680, 0.97383, 0.93396], abs=5e-6)
    assert indicator(HISTORY, 5) == pytest.approx(0.976708, abs=5e-7)


@given(counts)
def test_similarity_is_symmetric_and_one_only_for_equals(history):
    first, second = history[:2]
    psi = similarity(first, second)
    assert 0 <= psi <= 1
    assert psi == similarity(second, first)
    assert (psi == 1) == (first == second)
    assert similarity([0, *first], [0, *second]) >= psi  # layers that are empty in both are alike


@given(counts, st.integers(1, 9))
def test_the_indicator_is_the_mean_over_the_window(history, window):
    found = [similarity(history[-1], history[t]) for t in range(len(history) - 1) if len(history) - 1 - t <= window]
    assert indicator(history, window) == pytest.approx(sum(found) / len(found))


def test_the_first_epoch_has_nothing_to_be_compared_with():
    assert math.isnan(indicator([[1, 2]]))


NAN = float("nan")


@pytest.mark.parametrize(
    ("indicators", "expected"),
    [
        ([NAN, 0.9, 0.9], False),  # high enough, but of less than a window of three
        ([NAN, 0.9, 0.9, 0.9], True),
        ([NAN, 0.5, 0.6, 0.7, 0.8], True),  # as high as the threshold
        ([NAN, 0.5, 0.6, 0.7, 0.79], False),
        ([NAN, 0.9, 0.91, 0.95, 0.94], False),  # fell
        ([NAN, 0.99, 0.5, 0.5, 0.5, 0.9], True),  # the 0.99 is further back than the window
        ([NAN, 0.9, 0.9, 0.9, NAN], False),
    ],
)
def test_the_trigger(indicators, expected):
    assert settled(indicators, 0.8, window=3) is expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: similarity([1], [1, 2]), "same layers"),
        (lambda: similarity([], []), "same layers"),
        (lambda: similarity([1, -1], [1, 1]), "fewer than 0"),
        (lambda: indicator([]), "at least one epoch"),
        (lambda: indicator([[1]], 0), "window"),
        (lambda: settled([1.0], 0.9, 1.5), "window"),
    ],
)
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
