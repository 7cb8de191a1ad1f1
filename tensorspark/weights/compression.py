"""How a run's weights travel: a codec for what workers push, another for what they pull."""

from __future__ import annotations

from dataclasses import dataclass

from tensorspark.errors import ConfigError
from tensorspark.weights.codecs import Codec, codec_of
from tensorspark.weights.combiners import WeightCombiner

_ROWS = "rows"


@dataclass(frozen=True)
class Compression:
    """A codec a direction, by its text ("none", "bfloat16", "topk:0.01", ...; see `weights.codecs`).

    With "rows", a pull brings the rows of embeddings that changed since the worker's version; it is no codec then, but
    a patch (`weights.changes`).

    Attributes:
        leaves_error: whether a lossy push leaves in the pushed buffer what it lost, for the worker to add to; else its
            client keeps that, in memory of its own.

    Raises:
        ConfigError: an unknown codec, or top-k for pulls.
    """

    push: str = "none"
    pull: str = "none"
    leaves_error: bool = False

    def __post_init__(self) -> None:
        push, pull = codec_of(self.push), codec_of(self.pull)
        if pull is not None and pull.is_sparse and pull.spec != _ROWS:
            raise ConfigError(
                f"pull_compression={self.pull!r} would set all but a few weights to zero: use none, float16, bfloat16, "
                f"int8 or rows for pulls; {self.pull} is for pushes (compression)"
            )
        object.__setattr__(self, "push", "none" if push is None else push.spec)
        object.__setattr__(self, "pull", "none" if pull is None else pull.spec)

    @property
    def push_codec(self) -> Codec | None:
        return codec_of(self.push)

    @property
    def is_push_lossy(self) -> bool:
        codec = self.push_codec
        return codec is not None and codec.is_lossy

    @property
    def pull_codec(self) -> Codec | None:
        return None if self.pulls_rows else codec_of(self.pull)

    @property
    def pulls_rows(self) -> bool:
        return self.pull == _ROWS

    def require_fit(self, combiner: WeightCombiner) -> None:
        """Raises `ConfigError` where a codec cannot carry what the combiner wants, or would spoil what it holds."""
        pull_codec = self.pull_codec
        if pull_codec is not None and pull_codec.is_lossy and combiner.pushes == "weights":
            raise ConfigError(
                f"pull_compression={self.pull!r} rounds the weights that workers train on, and "
                f"{type(combiner).__name__} would take these into the server's: use none or rows, or a combiner that "
                f"takes deltas (MeanDeltaCombiner, DeltaWeightCombiner)"
            )
        codec = self.push_codec
        if codec is None or combiner.pushes == "delta":
            return
        name = type(combiner).__name__
        if codec.is_sparse:
            raise ConfigError(
                f"compression={self.push!r} sends changes only, and {name} takes "
                f"{'whole weights' if combiner.pushes == 'weights' else 'differences that are never zero'}: use "
                f"float16, bfloat16 or int8, or a combiner that takes deltas (MeanDeltaCombiner, DeltaWeightCombiner)"
            )


NO_COMPRESSION = Compression()
