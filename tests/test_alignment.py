"""Byte counts round to whole pages, exactly and at any size."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockstore import ALIGNMENT, align_down, align_up

nbytes_of_any_size = st.integers(0, 1 << 40) | st.integers(0, 1 << 80)


@given(nbytes=nbytes_of_any_size)
def test_align_up_is_the_nearest_multiple_that_is_not_below(nbytes: int) -> None:
    aligned = align_up(nbytes)

    assert aligned % ALIGNMENT == 0
    assert 0 <= aligned - nbytes < ALIGNMENT


@given(nbytes=nbytes_of_any_size)
def test_align_down_is_the_nearest_multiple_that_is_not_above(nbytes: int) -> None:
    aligned = align_down(nbytes)

    assert aligned % ALIGNMENT == 0
    assert 0 <= nbytes - aligned < ALIGNMENT


@given(pages=st.integers(0, 1 << 40))
def test_a_multiple_is_left_as_it_is(pages: int) -> None:
    nbytes = pages * ALIGNMENT

    assert (align_down(nbytes), align_up(nbytes)) == (nbytes, nbytes)


@pytest.mark.parametrize(
    ("nbytes", "down", "up"),
    [
        pytest.param(0, 0, 0, id="nothing"),
        pytest.param(1, 0, 4096, id="first byte of a page"),
        pytest.param(4095, 0, 4096, id="last byte of a page"),
        pytest.param(4096, 4096, 4096, id="a page"),
        pytest.param(4097, 4096, 8192, id="a page and a byte"),
        pytest.param(2**62, 2**62, 2**62, id="largest file"),
        pytest.param(2**63 - 1, 2**63 - 4096, 2**63, id="past what a C long takes"),
    ],
)
def test_both_sides_of_an_edge(nbytes: int, down: int, up: int) -> None:
    assert (align_down(nbytes), align_up(nbytes)) == (down, up)


@pytest.mark.parametrize("align", [align_up, align_down])
@pytest.mark.parametrize("nbytes", [-1, -4096, -(2**70)])
def test_a_negative_count_is_refused(align: Callable[[int], int], nbytes: int) -> None:
    with pytest.raises(ValueError, match=f"a byte count is at least 0, not {nbytes}"):
        align(nbytes)
