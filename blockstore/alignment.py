"""Alignment: ranges start where pages of the page cache start. Byte counts are ints, at least 0."""

ALIGNMENT = 4096
"""Bytes to which every range is aligned: one page of the page cache."""


def align_up(nbytes: int) -> int:
    """Round a byte count up to a multiple of `ALIGNMENT`.

    Parameters
    ----------
    nbytes : int
        Bytes, at least 0.

    Returns
    -------
    int
        Bytes, the smallest multiple of 4096 that is not below `nbytes`.

    Raises
    ------
    ValueError
        If `nbytes` is negative.

    Examples
    --------
    >>> align_up(1), align_up(4096), align_up(4097)
    (4096, 4096, 8192)
    """
    return align_down(nbytes + ALIGNMENT - 1) if nbytes > 0 else align_down(nbytes)


def align_down(nbytes: int) -> int:
    """Round a byte count down to a multiple of `ALIGNMENT`.

    Parameters
    ----------
    nbytes : int
        Bytes, at least 0.

    Returns
    -------
    int
        Bytes, the largest multiple of 4096 that is not above `nbytes`.

    Raises
    ------
    ValueError
        If `nbytes` is negative.

    Examples
    --------
    >>> align_down(1), align_down(4096), align_down(8191)
    (0, 4096, 4096)
    """
    if nbytes < 0:
        raise ValueError(f"a byte count is at least 0, not {nbytes}")
    return nbytes - nbytes % ALIGNMENT
