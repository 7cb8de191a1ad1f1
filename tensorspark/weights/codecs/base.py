"""What every codec of weights is, and the parts that they share. The bytes are described in `weights.codecs`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from tensorspark.errors import ProtocolError
from tensorspark.weights.layout import ALIGNMENT_BYTES, Buffer, WeightLayout

MARK_BYTES = 4
ENTRY_BYTES = 4


class Codec(ABC):
    """Weights, or changes of weights, in fewer bytes.

    Codecs hold no state between calls: they can be shared by threads, compared, hashed and pickled. The same values
    give the same bytes on every machine.

    Attributes:
        spec: what `weights.codecs.codec_of` takes, in its canonical form (``"topk:0.01"``).
        mark: what the bytes begin with: names the codec and the version of its format.
        is_lossy: whether decoded values differ from those encoded.
        is_sparse: whether what is not sent is zero, which is of use for changes of weights only.
    """

    spec: str
    mark: ClassVar[bytes]
    is_lossy: ClassVar[bool]
    is_sparse: ClassVar[bool]

    def capacity(self, layout: WeightLayout) -> int:
        """Bytes that `out` must hold. Mostly fewer are written: pages that are not touched cost no memory."""
        return layout.num_bytes

    @abstractmethod
    def encode(self, layout: WeightLayout, values: Buffer, out: Buffer) -> int:
        """Writes the encoded values to the front of `out`, whose rest may be overwritten too.

        Returns:
            Their number of bytes, less than `layout.num_bytes`; 0 where they would not be fewer, or a sample says so:
            the buffer is then to be sent as it is.
        """

    @abstractmethod
    def encode_keeping_error(self, layout: WeightLayout, values: Buffer, out: Buffer) -> int:
        """As `encode`, and leaves in `values` what was lost: values - decoded.

        Added to the next change, it is what makes lossy training converge as without (Seide et al., "1-Bit Stochastic
        Gradient Descent", 2014; Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression
        Schemes", 2019). Zeros where nothing was lost; where it returns 0, the values are as they were.
        """

    @abstractmethod
    def decode(self, layout: WeightLayout, buffer: Buffer, num_bytes: int) -> None:
        """Turns the encoded bytes, the last `num_bytes` of `buffer`, into the values, in place; gaps are zero.

        Raises:
            ProtocolError: the bytes are no encoding of this layout by this codec. The buffer then holds anything.
        """

    def to_json(self) -> dict[str, Any]:
        """What `weights.codecs.codec_from_json` takes."""
        return {"codec": self.spec}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codec) and other.spec == self.spec

    def __hash__(self) -> int:
        return hash(self.spec)

    def __repr__(self) -> str:
        return f"codec_of({self.spec!r})"

    def require_buffers(self, layout: WeightLayout, values: Buffer, out: Buffer) -> None:
        """Raises ValueError for buffers of another size than the layout's."""
        if len(values) != layout.num_bytes or len(out) < self.capacity(layout):
            raise ValueError(
                f"expected {layout.num_bytes} bytes of values and room for {self.capacity(layout)}, "
                f"got {len(values)} and {len(out)}"
            )

    def write_head(self, out: Buffer, entries: list[int]) -> None:
        """Writes the mark and the directory to the front of `out`."""
        head = self.mark + np.asarray(entries, "<u4").tobytes()
        out[: len(head)] = np.frombuffer(head, np.uint8)

    def read_head(self, layout: WeightLayout, buffer: Buffer, num_bytes: int, num_entries: int) -> NDArray[np.int64]:
        """The directory, copied, of the encoded bytes at the end of `buffer`.

        Raises:
            ProtocolError: they are too few, too many, or of another codec.
        """
        if len(buffer) != layout.num_bytes:
            raise ValueError(f"expected a buffer of {layout.num_bytes} bytes, got {len(buffer)}")
        shortest = head_bytes(num_entries)
        if not shortest <= num_bytes < layout.num_bytes:
            raise self.broken(f"{num_bytes} bytes, where {shortest} to {layout.num_bytes - 1} can be")
        start = layout.num_bytes - num_bytes
        head = buffer[start : start + shortest].tobytes()
        if not head.startswith(self.mark):
            raise self.broken(f"they begin with {head[:MARK_BYTES]!r} instead of {self.mark!r}")
        return np.frombuffer(head, "<u4", offset=MARK_BYTES).astype(np.int64)

    def broken(self, reason: str) -> ProtocolError:
        """The error for bytes that are no encoding."""
        return ProtocolError(f"expected weights encoded as {self.spec!r}, got bytes that are not: {reason}")


class Scratch:
    """Arrays to compute in, by name, kept between the blocks of one call."""

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[np.uint8]] = {}

    def array(self, name: str, dtype: Any, num: int) -> NDArray[Any]:
        """`[num] dtype` with any values; the same memory as before under this name."""
        dtype = np.dtype(dtype)
        num_bytes = num * dtype.itemsize
        kept = self._arrays.get(name)
        if kept is None or len(kept) < num_bytes:
            kept = self._arrays[name] = np.empty(num_bytes, np.uint8)
        return kept[:num_bytes].view(dtype)

    def copy(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """A copy of a flat array."""
        copied = self.array(name, array.dtype, len(array))
        np.copyto(copied, array)
        return copied


def head_bytes(num_entries: int) -> int:
    """Size of the mark and the directory."""
    return MARK_BYTES + ENTRY_BYTES * num_entries


def zero_gaps(layout: WeightLayout, buffer: Buffer) -> None:
    """Zeroes what lies between the tensors: whoever sent the bytes may have written there."""
    for spec in layout.specs:
        stop = layout.offsets[spec.name] + spec.num_bytes
        if stop % ALIGNMENT_BYTES:
            buffer[stop : stop - stop % ALIGNMENT_BYTES + ALIGNMENT_BYTES] = 0
