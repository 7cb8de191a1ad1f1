"""Versions of the weights, and how much of one a puller is sent: nothing, what changed, all, or all of it encoded."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tensorspark.ps.buffers import BufferPool
from tensorspark.weights.changes import Units
from tensorspark.weights.codecs import Codec
from tensorspark.weights.layout import Buffer, WeightLayout

# A patch of more is made on the thread of the arithmetic where it can be foreseen: it would hold up the others.
_BRIEF_PATCH_BYTES = 2**20


class Form(enum.Enum):
    """What a snapshot's payload is.

    SAME: nothing, as the worker has this version. PATCH: what changed since the version that the worker has
    (`weights.changes`). WHOLE: the weights. ENCODED: the weights, as the run's codec for pulls writes them.
    """

    SAME = "same"
    PATCH = "patch"
    WHOLE = "whole"
    ENCODED = "encoded"


@dataclass(eq=False)
class _Patch:
    buffer: Buffer
    num_loans: int = 0


@dataclass(frozen=True)
class Derived:
    """What is made of new weights before they are published.

    Attributes:
        changed_at: by unit, the version that changed it last, `[num_units] int64`; None: all in this version.
        encoded: for pulls, where there is a codec and it pays.
        patches: that pullers will ask for in all likelihood, by the version that they have.
    """

    changed_at: NDArray[np.int64] | None = None
    encoded: Buffer | None = None
    patches: Mapping[int, _Patch] = field(default_factory=dict)


@dataclass(eq=False)
class Snapshot:
    """One version of the weights. Nobody writes to `buffer` while the snapshot is current or pinned.

    Attributes:
        num_pins: who reads `buffer`.
        num_encoded_pins: who reads the encoded copy.
        is_hollow: whether the weights are gone, as only their encoded copy is still read.
    """

    version: int
    buffer: Buffer
    derived: Derived
    num_pins: int = 0
    num_encoded_pins: int = 0
    is_hollow: bool = False


@dataclass(frozen=True, eq=False)
class Loan:
    """What is sent of a snapshot.

    Attributes:
        buffer: None where there is nothing to send.
        snapshot: whose weights, or encoded copy, `buffer` is; pinned meanwhile.
        patch: that `buffer` is.
    """

    version: int
    form: Form
    buffer: Buffer | None = None
    snapshot: Snapshot | None = None
    patch: _Patch | None = None


class SnapshotStore:
    """Versions of the weights: the current one, and older ones as long as they are read. The server's loop owns it.

    Encoded copies count against the pool's bound, as long as a copy takes at most half of what the weights do: one
    buffer is never taken from the pool, for the current copy and the next one; and an older version of which only the
    copy is read holds its place in the pool, but no memory for its weights. Patches take up to half of the weights, and
    as much again while the next version's are made.

    Args:
        weights: the first version; copied.
        version: its number: 0, or that of a restored run.
        codec: of what pullers are sent.
        by_row: whether changes are told apart by the rows of tables.
    """

    def __init__(
        self,
        layout: WeightLayout,
        pool: BufferPool,
        weights: Buffer,
        version: int = 0,
        *,
        codec: Codec | None = None,
        by_row: bool = False,
    ) -> None:
        self._layout = layout
        self._pool = pool
        self._codec = codec
        self._units = Units(layout, by_row=by_row)
        self._spare: list[Buffer] = []  # for encoded weights
        self._patches: dict[tuple[int, int], _Patch] = {}  # from a version to a version
        self._lags: set[int] = set()  # of the long patches that were asked for: from so many versions before
        self._foreseen: frozenset[int] = frozenset()  # those before the last `prepare`
        first = pool.take_now()
        assert first is not None
        if codec is not None:
            pool.take_now()
        first[:] = weights
        self.current = Snapshot(version, first, Derived(encoded=self._encode(first)))

    def pin(self) -> Snapshot:
        """The current snapshot, kept as it is until `unpin`."""
        self.current.num_pins += 1
        return self.current

    def unpin(self, snapshot: Snapshot) -> None:
        snapshot.num_pins -= 1
        self._free_unread(snapshot)

    def prepare(self) -> None:
        """To be called on the loop before `derive` on another thread: it then makes patches, too."""
        self._patches = {key: patch for key, patch in self._patches.items() if patch.num_loans}
        self._foreseen, self._lags = frozenset(self._lags), set()

    def derive(self, buffer: Buffer) -> Derived:
        """What is made of weights that are to be published next; on any thread, one at a time."""
        if self._codec is not None:
            return Derived(encoded=self._encode(buffer))
        current = self.current
        changed = self._units.changed(current.buffer, buffer)
        if changed is None:
            return Derived()
        before = current.derived.changed_at
        if before is None:
            before = np.full(self._units.num_units, current.version)
        changed_at = np.where(changed, current.version + 1, before)
        return Derived(changed_at, patches=self._foreseen_patches(buffer, current.version + 1, changed_at))

    def publish(self, buffer: Buffer, derived: Derived) -> Snapshot:
        """Makes `buffer`, taken from the pool, the current snapshot, one version on."""
        retired = self.current
        self.current = Snapshot(retired.version + 1, buffer, derived)
        self._patches |= {(held, self.current.version): patch for held, patch in derived.patches.items()}
        self._foreseen = frozenset()
        self._free_unread(retired)
        return self.current

    def lend(self, held: int | None) -> Loan:
        """What a puller is sent of the current snapshot; stays as it is until `give_back`.

        Args:
            held: the version that it has; None where it has none.
        """
        snapshot = self.current
        if held == snapshot.version:
            return Loan(snapshot.version, Form.SAME)
        encoded = snapshot.derived.encoded
        if encoded is not None:
            snapshot.num_encoded_pins += 1
            return Loan(snapshot.version, Form.ENCODED, encoded, snapshot=snapshot)
        patch = None if held is None else self._patch_since(held, snapshot)
        if patch is not None:
            patch.num_loans += 1
            return Loan(snapshot.version, Form.PATCH, patch.buffer, patch=patch)
        return Loan(snapshot.version, Form.WHOLE, snapshot.buffer, snapshot=self.pin())

    def give_back(self, loan: Loan) -> None:
        if loan.snapshot is not None and loan.form is Form.ENCODED:
            loan.snapshot.num_encoded_pins -= 1
            self._free_unread(loan.snapshot)
        elif loan.snapshot is not None:
            self.unpin(loan.snapshot)
        if loan.patch is not None:
            loan.patch.num_loans -= 1

    def _patch_since(self, held: int, snapshot: Snapshot) -> _Patch | None:
        """None where it does not pay, or others on their way take all the memory that patches may have.

        One is kept until there is a newer: in a bulk-synchronous run all want the same.
        """
        changed_at = snapshot.derived.changed_at
        if changed_at is None or held > snapshot.version:
            return None
        key = (held, snapshot.version)
        if key not in self._patches:
            self._patches = {key: patch for key, patch in self._patches.items() if patch.num_loans}
            changed = changed_at > held
            if self._units.patch_bytes(changed) > self._patch_room(self._patches.values()):
                return None
            self._patches[key] = _Patch(self._units.write(snapshot.buffer, changed))
        if self._patches[key].buffer.nbytes > _BRIEF_PATCH_BYTES:
            self._lags.add(snapshot.version - held)
        return self._patches[key]

    def _foreseen_patches(self, buffer: Buffer, version: int, changed_at: NDArray[np.int64]) -> dict[int, _Patch]:
        """Those that were asked for of the version before, where they are long and there is room for them."""
        patches: dict[int, _Patch] = {}
        for lag in self._foreseen:
            changed = changed_at > version - lag
            room = self._patch_room([*list(self._patches.values()), *patches.values()])
            if _BRIEF_PATCH_BYTES < self._units.patch_bytes(changed) <= room:
                patches[version - lag] = _Patch(self._units.write(buffer, changed))
        return patches

    def _patch_room(self, taken: Iterable[_Patch]) -> int:
        return self._layout.num_bytes // 2 - sum(patch.buffer.nbytes for patch in taken)

    def _encode(self, buffer: Buffer) -> Buffer | None:
        if self._codec is None:
            return None
        out = self._spare.pop() if self._spare else np.empty(self._codec.capacity(self._layout), np.uint8)
        num_bytes = self._codec.encode(self._layout, buffer, out)
        if num_bytes:
            return out[:num_bytes]
        self._spare.append(out)
        return None

    def _free_unread(self, snapshot: Snapshot) -> None:
        """Frees what nobody reads of a snapshot that is not current."""
        if snapshot is self.current or snapshot.num_pins:
            return
        if not snapshot.num_encoded_pins:
            self._pool.put_back(snapshot.buffer)
            if snapshot.derived.encoded is not None and not self._spare:  # with the current one, enough for the next
                self._spare.append(snapshot.derived.encoded.base)  # type: ignore[arg-type]
        elif not snapshot.is_hollow:
            snapshot.buffer = self._layout.allocate()  # pages that are not written to are no memory yet
            snapshot.is_hollow = True
