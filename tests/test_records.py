"""A record is believed when every bit of it is right, and records mean what replaying them one by one means."""

import struct
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from blockstore import records
from blockstore.records import DURABLE, HOLE, NBYTES, RECEIPT, RECORD, REVOKED, VOID, WRITTEN, Draft, Standing

UUID = bytes.fromhex("00112233445566778899aabbccddeeff")
EPOCH, OTHER_EPOCH = 1, 2
BLOCK = 4096
"""Records of which `valid` takes the CRC at once."""

u64 = st.integers(0, 2**64 - 1)


def as_records(raw: bytes) -> NDArray[np.void]:
    return np.frombuffer(raw, RECORD, len(raw) // NBYTES)


# -- the format -------------------------------------------------------------------------------------

PINNED = """
    62 73 6a 01   01   00 00 00
    00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff
    08 07 06 05 04 03 02 01
    0a 00 00 00 00 00 00 00
    00 10 00 00 00 00 00 00
    00 30 00 00 00 00 00 00
    88 13 00 00 00 00 00 00
    ff ff ff ff ff ff ff ff
    ef be ad de 00 00 00 00
    00 00 00 00   dc d8 e3 28
"""


def test_a_record_is_these_88_bytes_for_ever() -> None:
    made = Draft(UUID, 0x0102030405060708).pack(WRITTEN, 10, 4096, 12288, 5000, 2**64 - 1, 0xDEADBEEF)

    assert made == bytes.fromhex(PINNED)


def test_the_pinned_record_reads_back() -> None:
    (found,) = as_records(bytes.fromhex(PINNED))

    assert {name: found[name].item() for name in RECORD.names or () if not name.startswith("spare")} == {
        "magic": 0x016A7362,
        "kind": 1,
        "uuid": UUID,
        "epoch": 0x0102030405060708,
        "sequence": 10,
        "start": 4096,
        "stop": 12288,
        "nbytes": 5000,
        "tag": 2**64 - 1,
        "checksum": 0xDEADBEEF,
        "crc": 0x28E3D8DC,
    }
    assert records.valid(as_records(bytes.fromhex(PINNED))).all()


def test_the_fields_lie_where_they_lie() -> None:
    assert {name: field[1] for name, field in (RECORD.fields or {}).items()} == {
        "magic": 0,
        "kind": 4,
        "spare": 5,
        "uuid": 8,
        "epoch": 24,
        "sequence": 32,
        "start": 40,
        "stop": 48,
        "nbytes": 56,
        "tag": 64,
        "checksum": 72,
        "spare2": 80,
        "crc": 84,
    }
    assert NBYTES == 88
    assert (WRITTEN, DURABLE, REVOKED, VOID) == (1, 2, 3, 4)


@given(kind=st.sampled_from([WRITTEN, DURABLE, REVOKED, VOID]), epoch=u64, numbers=st.tuples(*[u64] * 6))
def test_what_is_packed_is_what_the_array_says(kind: int, epoch: int, numbers: tuple[int, ...]) -> None:
    raw = Draft(UUID, epoch).pack(kind, *numbers)

    (found,) = as_records(raw)
    assert [found[name] for name in ("sequence", "start", "stop", "nbytes", "tag", "checksum")] == list(numbers)
    assert (found["kind"], found["epoch"], found["uuid"].item()) == (kind, epoch, UUID)
    assert found["crc"] == crc32(raw[:84])


# -- whole or damaged ---------------------------------------------------------------------------------


def naively_valid(raw: bytes) -> list[bool]:
    """Return whether each 88 bytes are a record, one after the other."""
    found = []
    for at in range(0, len(raw) // NBYTES * NBYTES, NBYTES):
        magic, *_, crc = struct.unpack("<I80sI", raw[at : at + NBYTES])
        found.append(magic == 0x016A7362 and crc == crc32(raw[at : at + NBYTES - 4]))
    return found


def log_of(count: int, uuid: bytes = UUID) -> bytearray:
    """Return so many different records."""
    draft = Draft(uuid, EPOCH)
    return bytearray().join(
        draft.pack(1 + n % 4, n, n * 4096, n * 4096 + 4096, n, n * n, ~n % 2**32) for n in range(count)
    )


LONG = log_of(2 * BLOCK + 100)
FOREIGN = log_of(64, bytes(16))

counts = st.integers(0, 70) | st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 77])

Harm = tuple[str, int, int, bytes]
"""What, which record, which byte or other record, and with which bytes."""

harms = st.tuples(
    st.sampled_from(["flip", "zero", "overwrite", "copy", "swap", "shift", "foreign"]),
    st.integers(0, 2**32),
    st.integers(0, 2**32),
    st.binary(min_size=1, max_size=200),
)


def harm(raw: bytearray, count: int, what: Harm) -> None:
    """Damage a log of `count` records in one way."""
    kind, first, second, data = what
    i, j = first % count * NBYTES, second % count * NBYTES
    if kind == "flip":
        raw[i + second % NBYTES] ^= 1 << data[0] % 8
    elif kind == "zero":
        raw[i : i + NBYTES] = bytes(NBYTES)
    elif kind == "overwrite":
        at = i + second % NBYTES
        raw[at : at + len(data)] = data[: len(raw) - at]
    elif kind == "copy":
        raw[i : i + NBYTES] = raw[j : j + NBYTES]
    elif kind == "swap":
        raw[i : i + NBYTES], raw[j : j + NBYTES] = raw[j : j + NBYTES], raw[i : i + NBYTES]
    elif kind == "shift":  # all that follows is moved by some bytes
        raw[i:] = data[: len(raw) - i] + raw[i : len(raw) - len(data[: len(raw) - i])]
    else:
        raw[i : i + NBYTES] = FOREIGN[second % 64 * NBYTES :][:NBYTES]


@given(count=counts, damage=st.lists(harms, max_size=12), garbage=st.binary(max_size=300))
def test_whole_records_are_found_as_if_each_was_checked_alone(count: int, damage: list[Harm], garbage: bytes) -> None:
    raw = LONG[: count * NBYTES]
    for what in damage if count else []:
        harm(raw, count, what)
    raw += garbage

    assert records.valid(as_records(bytes(raw))).tolist() == naively_valid(bytes(raw))


@given(count=st.integers(1, 3 * BLOCK), chance=st.randoms(use_true_random=False), share=st.floats(0, 1))
def test_any_subset_of_records_can_be_damaged(count: int, chance: Any, share: float) -> None:
    log = np.frombuffer(bytes(LONG), RECORD)[np.arange(count) % len(LONG) % (2 * BLOCK)]
    damaged = np.random.default_rng(chance.getrandbits(32)).random(count) < share
    places = chance.randrange(NBYTES)
    log.view(np.uint8).reshape(count, NBYTES)[damaged, places] ^= 1 << chance.randrange(8)

    assert np.array_equal(records.valid(log), ~damaged)


def test_no_records_are_no_flags() -> None:
    nothing = np.empty(0, RECORD)

    assert records.valid(nothing).shape == records.own(nothing, UUID).shape == (0,)
    assert records.valid(nothing).dtype == records.own(nothing, UUID).dtype == np.bool_


def test_every_bit_of_a_record_matters() -> None:
    raw = np.frombuffer(bytes(LONG[:NBYTES]), np.uint8)
    flipped = raw ^ np.packbits(np.eye(NBYTES * 8, dtype=np.bool_), axis=1)

    assert not records.valid(flipped.reshape(-1).view(RECORD)).any()


def test_zeros_are_no_record() -> None:
    assert not records.valid(np.zeros(BLOCK + 1, RECORD)).any()


def test_records_that_do_not_lie_in_a_row_are_checked_as_well() -> None:
    raw = LONG[: 100 * NBYTES]
    raw[6 * NBYTES] ^= 1
    every_third = as_records(bytes(raw))[::3]

    assert np.flatnonzero(~records.valid(every_third)).tolist() == [2]


@given(owners=st.lists(st.sampled_from([UUID, bytes(16), UUID[:8] + bytes(8), bytes(8) + UUID[8:]]), max_size=30))
def test_own_records_are_those_with_all_16_bytes_of_the_uuid(owners: list[bytes]) -> None:
    log = b"".join(Draft(owner, EPOCH).pack(WRITTEN, 0, 0, 4096, 1, 0, 0) for owner in owners)

    assert records.own(as_records(log), UUID).tolist() == [owner == UUID for owner in owners]


# -- what stands ------------------------------------------------------------------------------------


class Fact(NamedTuple):
    """One record, for the model."""

    kind: int
    epoch: int
    sequence: int
    start: int
    stop: int
    nbytes: int
    tag: int
    checksum: int


def packed(facts: Iterable[Fact]) -> NDArray[np.void]:
    return as_records(b"".join(Draft(UUID, epoch).pack(kind, *rest) for kind, epoch, *rest in facts))


def replay(facts: list[Fact], epoch: int) -> tuple[list[tuple[int, bool]], int]:
    """Return the places of the receipts that stand, each with whether it is durable, and how many were dropped."""
    last: dict[int, int] = {}
    durable: list[range] = []
    void: list[range] = []
    for place, fact in enumerate(facts):
        if fact.kind in (WRITTEN, REVOKED):
            last[fact.start] = place
        elif fact.kind == DURABLE:
            durable.append(range(fact.start, fact.stop))
        elif fact.kind == VOID:
            void.append(range(fact.start, fact.stop))
    stand, dropped = [], 0
    for _, place in sorted(last.items()):
        if (fact := facts[place]).kind == REVOKED:
            continue
        is_void = any(fact.sequence in span for span in void)
        is_durable = any(fact.sequence in span for span in durable) and not is_void
        if is_durable or (fact.epoch == epoch and not is_void):
            stand.append((place, is_durable))
        else:
            dropped += 1
    return stand, dropped


sequences = st.integers(0, 12)
epochs = st.sampled_from([EPOCH, EPOCH, OTHER_EPOCH])
extents = st.builds(
    lambda kind, epoch, sequence, page, pages, nbytes, tag, checksum: Fact(
        kind, epoch, sequence, page * 4096, (page + pages) * 4096, nbytes, tag, checksum
    ),
    st.sampled_from([WRITTEN, WRITTEN, REVOKED]),
    epochs,
    sequences,
    st.integers(0, 8),
    st.integers(1, 3),
    u64,
    u64,
    u64,
)
spans = st.builds(
    lambda kind, epoch, low, count: Fact(kind, epoch, 99, low, low + count, 0, 0, 0),
    st.sampled_from([DURABLE, DURABLE, VOID]),
    epochs,
    sequences,
    st.integers(0, 6),
)


@given(facts=st.lists(extents | spans, max_size=40), epoch=st.sampled_from([EPOCH, OTHER_EPOCH, 3]))
def test_what_stands_is_what_replaying_the_records_leaves(facts: list[Fact], epoch: int) -> None:
    found = records.standing(packed(facts), epoch)

    stand, dropped = replay(facts, epoch)
    assert list(zip(found.where.tolist(), found.durable.tolist(), strict=True)) == stand
    assert found.dropped == dropped


@given(count=st.integers(0, 50), flushed=st.integers(0, 50))
def test_ranges_written_in_order_of_start_take_the_short_way_to_the_same(count: int, flushed: int) -> None:
    facts = [Fact(WRITTEN, EPOCH, n, n * 4096, n * 4096 + 4096, 1, n, 0) for n in range(count)]
    facts.append(Fact(DURABLE, EPOCH, count, 0, flushed, 0, 0, 0))

    found = records.standing(packed(facts), EPOCH)

    assert found.where.tolist() == list(range(count))
    assert found.durable.tolist() == [n < flushed for n in range(count)]


W1 = Fact(WRITTEN, EPOCH, 1, 0, 4096, 10, 7, 0)
R2 = Fact(REVOKED, EPOCH, 2, 0, 4096, 0, 0, 0)
W3 = Fact(WRITTEN, EPOCH, 3, 0, 4096, 10, 7, 0)
D1, D3 = Fact(DURABLE, EPOCH, 9, 0, 2, 0, 0, 0), Fact(DURABLE, EPOCH, 9, 0, 4, 0, 0, 0)
V1, V3 = Fact(VOID, EPOCH, 9, 0, 2, 0, 0, 0), Fact(VOID, EPOCH, 9, 2, 4, 0, 0, 0)
TOP = Fact(DURABLE, EPOCH, 9, 0, 2**64 - 1, 0, 0, 0)


@pytest.mark.parametrize(
    ("facts", "epoch", "stand", "dropped"),
    [
        ([], EPOCH, [], 0),
        ([D3, V3], EPOCH, [], 0),
        ([W1], EPOCH, [(0, False)], 0),
        ([W1], OTHER_EPOCH, [], 1),
        ([W1, D1], OTHER_EPOCH, [(0, True)], 0),
        ([D1, W1], OTHER_EPOCH, [(1, True)], 0),
        ([W1, TOP], OTHER_EPOCH, [(0, True)], 0),
        ([W1, D1, R2], EPOCH, [], 0),
        ([W1, D1, R2, W3], EPOCH, [(3, False)], 0),
        ([W1, D1, R2, W3], OTHER_EPOCH, [], 1),
        ([W1, D1, R2, W3, D3], OTHER_EPOCH, [(3, True)], 0),
        ([W1, V1], EPOCH, [], 1),
        ([W1, D1, V1], EPOCH, [], 1),
        ([W1, R2, V1], EPOCH, [], 0),
        ([W1, D1, W3, V3], EPOCH, [], 1),
    ],
    ids=[
        "nothing",
        "spans of nothing",
        "written",
        "written before a reset",
        "durable",
        "durable by a record that comes first",
        "durable by the widest span",
        "revoked",
        "rewritten",
        "rewritten before a reset",
        "rewritten and flushed",
        "void",
        "void though it was called durable",
        "void and revoked",
        "what was there before a void one does not come back",
    ],
)
def test_standing(facts: list[Fact], epoch: int, stand: list[tuple[int, bool]], dropped: int) -> None:
    found = records.standing(packed(facts), epoch)

    assert list(zip(found.where.tolist(), found.durable.tolist(), strict=True)) == stand
    assert found.dropped == dropped
    assert replay(facts, epoch) == (stand, dropped)


@given(facts=st.lists(extents, min_size=1, max_size=20), data=st.data())
def test_receipts_are_the_fields_of_the_records_that_stand(facts: list[Fact], data: st.DataObject) -> None:
    where = data.draw(st.lists(st.integers(0, len(facts) - 1), max_size=10))
    durable = data.draw(st.lists(st.booleans(), min_size=len(where), max_size=len(where)))
    which = Standing(np.array(where, np.intp), np.array(durable, np.bool_), 0)

    receipts = records.receipts_of(packed(facts), which)

    assert receipts.dtype == RECEIPT
    assert receipts.tolist() == [
        (
            facts[place].start,
            facts[place].stop,
            facts[place].nbytes,
            facts[place].tag,
            is_durable,
            facts[place].checksum,
        )
        for place, is_durable in zip(where, durable, strict=True)
    ]


def test_the_dtypes_that_users_see_keep_their_fields() -> None:
    assert RECEIPT.descr == [
        ("start", "<u8"),
        ("stop", "<u8"),
        ("nbytes", "<u8"),
        ("tag", "<u8"),
        ("durable", "|b1"),
        ("checksum", "<u8"),
    ]
    assert HOLE.descr == [("start", "<u8"), ("stop", "<u8"), ("nbytes", "<u8")]


# -- what is left -----------------------------------------------------------------------------------


@st.composite
def filled(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int]:
    """Draw extents that are apart, ascending, and may touch, and the bytes of the space that they are in."""
    edges = sorted(draw(st.lists(st.integers(0, 60), max_size=16, unique=True)))
    pairs = list(zip(edges[::2], edges[1::2], strict=False))
    if draw(st.booleans()) and len(edges) > 2:
        pairs = [pair for pair in pairwise(edges) if draw(st.booleans())]
    return pairs, draw(st.integers(max([1, *edges]), 64))


def runs(free: list[bool]) -> Iterator[tuple[int, int]]:
    """Yield where the runs of free units start and stop."""
    start = None
    for place, is_free in enumerate([*free, False]):
        if is_free and start is None:
            start = place
        elif not is_free and start is not None:
            yield start, place
            start = None


@given(space=filled())
def test_holes_are_the_bits_that_no_receipt_covers(space: tuple[list[tuple[int, int]], int]) -> None:
    pairs, nbytes = space
    free = [not any(start <= place < stop for start, stop in pairs) for place in range(nbytes)]
    receipts = np.zeros(len(pairs), RECEIPT)
    receipts["start"], receipts["stop"] = np.array(pairs, "<u8").reshape(-1, 2).T

    found = records.holes(receipts, nbytes)

    assert found.dtype == HOLE
    assert found.tolist() == [(start, stop, stop - start) for start, stop in runs(free)]
