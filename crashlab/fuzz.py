"""Fuzz: journals that are cut off, flipped and mixed up, held against a reading of them in plain Python.

A store fills a journal of 100 records. Then the journal is cut off at every byte, single bits of it are flipped, and
records of another store, or its own at other places, are put into it. Each time it is opened, and must say what its
whole records say, no more and no less; tell that records in its midst are damaged, and say nothing of a torn tail;
and raise nothing but `JournalMismatchError`, for a damaged header. The reading here shares no code with the library.
"""

import os
import random
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn
from zlib import crc32

import blockstore as bs
from blockstore import _disk, _os, resume, sidecar

COUNT = 100
"""Records of a journal."""

_HEADER = 4096
_LAYOUT = struct.Struct("<IB3x16s7Q4xI")
_MAGIC = 0x01_6A_73_62
_WRITTEN, _DURABLE, _REVOKED, _VOID = 1, 2, 3, 4
_PAGES = 600
_ENDINGS = ("killed", "closed", "poisoned")
_READ_EVERY, _RESUME_EVERY = 50, 500
"""How seldom the store is opened as a whole, to read and to write; else only the journal is read."""
_FINDINGS_MAX = 20

Seen = tuple[int, int, int, int, bool, int]
"""A receipt: start, stop, nbytes, tag, durable, checksum."""


@dataclass(frozen=True, slots=True)
class Report:
    """What fuzzing found. `str` is one line."""

    believed: int
    """Receipts that were reported."""
    false: int
    """Of these, such that no whole record vouches for, or that never stood."""
    missed: int
    """Receipts that whole records vouch for, and that were not reported."""
    unreported: int
    """Damages without the warning that is due, and warnings without damage."""
    undocumented: int
    """Exceptions and warnings that are none of those documented."""
    refused: int
    """Journals with a damaged header that were refused, as they should be."""
    truncations: int
    flips: int
    splices: int
    seeds: tuple[int, ...]
    findings: tuple[str, ...]
    """The first of them, in words."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not (self.false or self.missed or self.unreported or self.undocumented)

    def __str__(self) -> str:
        return (
            f"journal fuzzing: {self.false} false of {self.believed} receipts believed, {self.missed} missed, "
            f"{self.unreported} damages unreported, {self.undocumented} undocumented exceptions, "
            f"{self.truncations} truncations, {self.flips} flips, {self.splices} splices, "
            f"seeds {', '.join(map(str, self.seeds))}"
        )


def run(
    truncations: bool = True,
    flips: int = 50_000,
    splices: int = 1_000,
    seeds: Iterable[int] = (0, 1, 2),
    progress: Callable[[str], object] | None = None,
    folder: Path | None = None,
) -> Report:
    """Damage the journal of one store for each seed, and report.

    Parameters
    ----------
    truncations : bool
        Cut each journal off at every byte.
    flips, splices : int
        How many bits to flip, and records to put where they do not belong, one at a time; over all seeds.
    seeds : iterable of int
        At least one. A seed's remainder by 3 says how its store ends: killed, closed, or with a sync that fails.
    progress : callable, optional
        Is told in words what is done.
    folder : path, optional
        Where stores are made. Default: a temporary one.
    """
    seeds = tuple(seeds)
    count = _Count()
    done = 0
    with tempfile.TemporaryDirectory(prefix="crashlab-fuzz-", dir=folder) as name:
        for number, seed in enumerate(seeds):
            victim = Victim(Path(name) / f"store-{seed}", seed, count)
            other = Victim(Path(name) / f"other-{seed}", ~seed, count)
            if truncations:
                done += _truncate(victim)
            _flip(victim, _share(flips, len(seeds), number), random.Random(f"flips {seed}"))
            _splice(victim, other, _share(splices, len(seeds), number), random.Random(f"splices {seed}"))
            if progress is not None:
                progress(f"seed {seed}: {count.believed} receipts believed, {len(count.findings)} findings")
    return Report(
        count.believed,
        count.false,
        count.missed,
        count.unreported,
        count.undocumented,
        count.refused,
        done,
        flips,
        splices,
        seeds,
        tuple(count.findings),
    )


def _share(total: int, shares: int, number: int) -> int:
    return total // shares + (number < total % shares)


@dataclass(slots=True)
class _Count:
    """The report, while it grows."""

    believed: int = 0
    false: int = 0
    missed: int = 0
    unreported: int = 0
    undocumented: int = 0
    refused: int = 0
    findings: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        if len(self.findings) < _FINDINGS_MAX:
            self.findings.append(text)


class Fact(NamedTuple):
    """A record that is whole and of the store."""

    kind: int
    epoch: int
    sequence: int
    start: int
    stop: int
    nbytes: int
    tag: int
    checksum: int


def fact_of(raw: bytes, uuid: bytes) -> Fact | None:
    """Return what 88 bytes say, or None if they are no whole record of the store `uuid`."""
    if len(raw) < _LAYOUT.size:
        return None
    magic, kind, owner, epoch, sequence, start, stop, nbytes, tag, checksum, crc = _LAYOUT.unpack(raw)
    if magic != _MAGIC or owner != uuid or crc != crc32(raw[:-4]):
        return None
    return Fact(kind, epoch, sequence, start, stop, nbytes, tag, checksum)


def believable(facts: Iterable[Fact | None], epoch: int) -> list[Seen]:
    """Return the receipts that stand, in order of start, if these are the records of a journal."""
    last: dict[int, Fact] = {}
    spans: dict[int, list[tuple[int, int]]] = {_DURABLE: [], _VOID: []}
    for fact in facts:
        if fact is None:
            continue
        if fact.kind in (_WRITTEN, _REVOKED):
            last[fact.start] = fact
        elif fact.kind in spans:
            spans[fact.kind].append((fact.start, fact.stop))
    found: list[Seen] = []
    for start, fact in sorted(last.items()):
        void = any(low <= fact.sequence < high for low, high in spans[_VOID])
        durable = not void and any(low <= fact.sequence < high for low, high in spans[_DURABLE])
        if fact.kind == _WRITTEN and (durable or (fact.epoch == epoch and not void)):
            found.append((start, fact.stop, fact.nbytes, fact.tag, durable, fact.checksum))
    return found


def is_damaged(facts: Sequence[Fact | None], epoch: int) -> bool:
    """Whether records are missing that no power loss can have torn: a warning is due."""
    whole = [place for place, fact in enumerate(facts) if fact is not None]
    holes = [place for place in range(whole[-1] if whole else 0) if facts[place] is None]
    if not holes:
        return False
    last = facts[whole[-1]]
    if last is not None and last.epoch == epoch:
        return True
    barriers = [place for place, fact in enumerate(facts) if fact is not None and fact.kind == _DURABLE]
    return len(barriers) > 1 and holes[0] < barriers[-2]


_ZEROS = 4096 - 512
"""Bytes that must follow the last record."""


class Victim:
    """A store that has ended, whose journal of `COUNT` records is damaged, looked at, and restored."""

    def __init__(self, path: Path, seed: int, count: _Count) -> None:
        self._path, self._seed, self._count = path, seed, count
        self._journal = Path(f"{path}.journal")
        self._ever: set[tuple[int, ...]] = set()
        self._expected: dict[int, tuple[Sequence[Fact | None], tuple[list[Seen], bool]]] = {}
        self._fill(random.Random(f"fuzz {seed}"))
        self.pristine = self._journal.read_bytes()
        self._data = _os.open_file(str(path), writable=False)
        self._handle = os.open(self._journal, os.O_RDWR)
        self._uuid = sidecar.find(str(path), self._data, writable=False, adopt=False).header.uuid  # type: ignore[union-attr]
        self._epoch = _disk.epoch(self._data)
        self._lasting = _disk.filesystem(self._data) not in _disk.FORGETFUL
        self._looks = 0
        self.nbytes = min(len(self.pristine), _HEADER + (COUNT + 2) * _LAYOUT.size)
        self._facts = self._read(self.pristine)
        if sum(fact is not None for fact in self._facts) != COUNT:
            raise AssertionError(f"seed {seed}: the journal does not have {COUNT} records")

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def record(self, place: int) -> bytes:
        """Return the bytes of one record."""
        return self.pristine[_HEADER + place * _LAYOUT.size :][: _LAYOUT.size]

    def cut(self, nbytes: int) -> None:
        """Look at the journal cut off at `nbytes`; it stays so until `restore`."""
        os.ftruncate(self._handle, nbytes)
        facts = self._facts[: max(nbytes - _HEADER, 0) // _LAYOUT.size]
        self._look(facts, f"cut off at {nbytes}", header=nbytes < _HEADER)

    def patch(self, patches: Sequence[tuple[int, bytes]], what: str) -> None:
        """Look at the journal with some bytes replaced, and restore it."""
        length = len(self.pristine)
        size = max(length, *(offset + len(data) for offset, data in patches))
        facts = self._facts + [None] * ((size - length) // _LAYOUT.size)
        for offset, data in patches:
            os.pwrite(self._handle, data, offset)
        for offset, data in patches:
            if offset + len(data) > _HEADER:
                first = max(offset - _HEADER, 0) // _LAYOUT.size
                last = (offset + len(data) - 1 - _HEADER) // _LAYOUT.size
                raw = os.pread(self._handle, (last - first + 1) * _LAYOUT.size, _HEADER + first * _LAYOUT.size)
                facts += [None] * (last + 1 - len(facts))
                facts[first : last + 1] = self._read(bytes(_HEADER) + raw)[: last + 1 - first]
        was = self._handle
        self._look(facts, what, header=any(offset < _HEADER for offset, _ in patches))
        if was == self._handle:
            for offset, data in patches:
                os.pwrite(was, self.pristine[offset : offset + len(data)], offset)
            if size > length:
                os.ftruncate(was, length)

    def restore(self) -> None:
        """Make the journal what it was, also if another one is in its place."""
        self._journal.write_bytes(self.pristine)
        handle = os.open(self._journal, os.O_RDWR)
        os.close(self._handle)
        self._handle = handle

    def _read(self, content: bytes) -> list[Fact | None]:
        size, uuid = _LAYOUT.size, bytes.fromhex(self._uuid)
        stop = min(len(content), self.nbytes) if content is self.pristine else len(content)
        return [fact_of(content[at : at + size], uuid) for at in range(_HEADER, stop, size)]

    # -- what is believed ---------------------------------------------------------------------------

    def _look(self, facts: Sequence[Fact | None], what: str, *, header: bool) -> None:
        """Open the journal as it is now in some ways, and compare."""
        self._looks += 1
        what = f"seed {self._seed} ({_ENDINGS[self._seed % 3]}), {what}"
        self._compare(lambda: self._peek(self._epoch), facts, self._epoch, what, header)
        later = self._epoch ^ 1
        if not header and self._expected.get(later, (None,))[0] != facts:
            self._compare(lambda: self._peek(later), facts, later, f"{what}, after a reset", header)
        if self._looks % _READ_EVERY == 0:
            self._compare(self._open_to_read, facts, self._epoch, f"{what}, opened to read", header)
        if self._looks % _RESUME_EVERY == 0:
            size = os.fstat(self._handle).st_size
            self._resume(facts, what, header)
            self.restore()
            os.ftruncate(self._handle, min(size, len(self.pristine)))

    def _peek(self, epoch: int) -> list[Seen]:
        found = sidecar.find(str(self._path), self._data, writable=False, adopt=False)
        if found is None:
            raise FileNotFoundError("the journal is not found")
        receipts: list[Seen] = resume.look(found, epoch)[2].tolist()
        return receipts

    def _open_to_read(self) -> list[Seen]:
        with bs.open(self._path, mode="r") as store:
            receipts: list[Seen] = store.receipts().tolist()
        return receipts

    def _open_to_write(self) -> list[Seen]:
        with bs.open(self._path) as store:
            receipts: list[Seen] = store.receipts().tolist()
            if store.free != store.nbytes - sum(receipt[1] - receipt[0] for receipt in receipts):
                raise AssertionError(f"{store.free} bytes are free")
        return receipts

    def _resume(self, facts: Sequence[Fact | None], what: str, header: bool) -> None:
        """Open the store for writing: what it says then is there for good."""
        opened = self._compare(self._open_to_write, facts, self._epoch, f"{what}, opened to write", header, True)
        if opened and self._lasting:
            kept = [fact for fact in facts if fact is not None]
            text = f"{what}, opened to write, after a reset"
            self._compare(lambda: self._peek(self._epoch ^ 1), kept, self._epoch, text, False, True)

    def _compare(
        self,
        look: Callable[[], list[Seen]],
        facts: Sequence[Fact | None],
        epoch: int,
        what: str,
        header: bool,
        settled: bool = False,
    ) -> bool:
        """Hold what `look` says against what the facts say; return whether it said anything."""
        count = self._count
        cut = self._is_cut(facts)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                seen = look()
            except bs.JournalMismatchError as error:
                count.refused += header
                if not header:
                    count.undocumented += 1
                    count.note(f"{what}: {error!r}")
                return False
            except Exception as error:
                count.undocumented += 1
                count.note(f"{what}: {error!r}")
                return False
        due, damaged = self._expect(facts, epoch)
        damaged |= cut
        if settled:
            due = [(*receipt[:4], self._lasting, receipt[5]) for receipt in due]
        count.believed += len(seen)
        if seen != due or not self._ever.issuperset(map(_version, seen)):
            false = [receipt for receipt in seen if receipt not in due or _version(receipt) not in self._ever]
            missed = [receipt for receipt in due if receipt not in seen]
            count.false += len(false)
            count.missed += len(missed)
            count.note(f"{what}: false {false}, missed {missed}")
        damage = [warning for warning in caught if warning.category is bs.JournalDamageWarning]
        if bool(damage) != damaged:
            count.unreported += 1
            count.note(f"{what}: " + (f"{damage[0].message}" if damage else "not a word of the damage"))
        for warning in caught:
            if warning.category not in (bs.JournalDamageWarning, bs.FileSystemWarning):
                count.undocumented += 1
                count.note(f"{what}: {warning.message!r}")
        return True

    def _is_cut(self, facts: Sequence[Fact | None]) -> bool:
        """Whether so many of the zeros are missing which a journal ends with that records may be, too."""
        whole = max((place + 1 for place, fact in enumerate(facts) if fact is not None), default=0)
        return self._journal.stat().st_size - _HEADER - whole * _LAYOUT.size < _ZEROS

    def _expect(self, facts: Sequence[Fact | None], epoch: int) -> tuple[list[Seen], bool]:
        """Return what is to be believed, and whether a warning is due; most often that is what it was before."""
        before, answer = self._expected.get(epoch, ((), ([], False)))
        if before != facts:
            answer = believable(facts, epoch), is_damaged(facts, epoch)
            self._expected[epoch] = facts, answer
        return answer

    # -- how the journal comes to be ------------------------------------------------------------------

    def _fill(self, chance: random.Random) -> None:
        """Write, rewrite, flush and be killed until the journal has `COUNT` records but for what the end adds."""
        ending = _ENDINGS[self._seed % 3]
        store, tag = self._ready(None), 0
        ranges: list[bs.AllocatedRange] = []
        while (left := COUNT - (ending != "killed") - len(store._ledger._journal.records())) > 0:  # type: ignore[union-attr]
            act = chance.choice(("write", "write", "write", "rewrite", "fail", "flush", "kill"))
            if left == 1 or (act in ("rewrite", "fail") and not ranges) or (act == "kill" and left < COUNT // 2):
                act = "write"
            if act == "write":
                tag += 1
                ranges.append(store.allocate(chance.randint(1, 12_000), tag=tag))
                ranges[-1].write(chance.randbytes(ranges[-1].nbytes))
            elif act == "rewrite":
                r = chance.choice(ranges)
                r.write(chance.randbytes(r.nbytes), rewrite=True)
            elif act == "fail":
                r = ranges.pop(chance.randrange(len(ranges)))
                with suppress(RuntimeError), r.writer(rewrite=True):
                    raise RuntimeError("planted")
            elif act == "flush":
                store.flush()
            else:
                store._disown()
                store, ranges = self._ready(store), []
            self._ever.update(map(_version, store.receipts().tolist()))
        if ending == "poisoned":
            store._ledger._sync_data = _fail
            with suppress(bs.PoisonedStoreError):
                store.flush()
        if ending == "closed":
            store.close()
        else:
            store._disown()

    def _ready(self, before: bs.BlockStore | None) -> bs.BlockStore:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bs.FileSystemWarning)
            if before is None:
                store = bs.create(self._path, _PAGES * bs.ALIGNMENT, checksum="crc32")
            else:
                store = bs.open(self._path)
        store._ledger._lasting = True  # durable records in memory, too: nothing is turned off here
        return store


def _version(receipt: Seen) -> tuple[int, ...]:
    """Return what tells one writing of a range from all others."""
    return (*receipt[:4], receipt[5])


def _fail() -> NoReturn:
    raise OSError("planted")


def _truncate(victim: Victim) -> int:
    """Cut the journal off at every byte of the header and the records, from the end."""
    for nbytes in range(victim.nbytes - 1, -1, -1):
        victim.cut(nbytes)
    victim.restore()
    return victim.nbytes


def _flip(victim: Victim, flips: int, chance: random.Random) -> None:
    """Flip single bits, each one at most once as long as there are enough."""
    bits = range(victim.nbytes * 8)
    chosen = chance.sample(bits, min(flips, len(bits))) + chance.choices(bits, k=max(flips - len(bits), 0))
    for bit in chosen:
        offset = bit // 8
        victim.patch([(offset, bytes([victim.pristine[offset] ^ 1 << bit % 8]))], f"bit {bit} flipped")


def _splice(victim: Victim, other: Victim, splices: int, chance: random.Random) -> None:
    """Put records of another store, or its own from elsewhere, into the journal."""

    def at(place: int) -> int:
        return _HEADER + place * _LAYOUT.size

    for number in range(splices):
        i, j = chance.randrange(COUNT), chance.randrange(COUNT)
        behind = COUNT + chance.randrange(3)
        foreign = other.record(chance.randrange(COUNT))
        some = b"".join(other.record(k % COUNT) for k in range(i, i + chance.randint(2, 9)))
        what, patches = (
            (f"another store's record over {i}", [(at(i), foreign)]),
            (f"another store's record appended at {behind}", [(at(behind), foreign)]),
            (f"some of another store's records over {j}", [(at(j), some)]),
            (f"another store's record in the midst of {i}", [(at(i) + chance.randrange(1, 88), foreign)]),
            (f"record {i} also over {j}", [(at(j), victim.record(i))]),
            (f"record {i} also appended at {behind}", [(at(behind), victim.record(i))]),
            (f"records {i} and {j} swapped", [(at(i), victim.record(j)), (at(j), victim.record(i))]),
        )[number % 7]
        victim.patch(patches, what)
