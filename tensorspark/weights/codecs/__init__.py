"""Codecs: weights, and changes of weights, in fewer bytes on the wire.

=========== =================================================== ======= ===============================================
codec       of the bytes of float32                             lossy   for
=========== =================================================== ======= ===============================================
float16     1/2                                                 yes     pulls and pushes
bfloat16    1/2                                                 yes     pulls and pushes; keeps float32's range
int8        0.254                                               yes     pushes with error feedback
topk:R      1.5 R                                               yes     pushes of changes, with error feedback
rows        the share of the rows that changed                  no      changes of embeddings
=========== =================================================== ======= ===============================================

The bytes, all little-endian. Version 1 of each codec's format::

    mark        4 bytes: "f16", "b16", "int", "top" or "row" in ASCII, and the version, 1
    directory   one u32 for each unit
    sections    one for each unit, in the buffer's order, without space between them

They are fewer than the buffer's. A section is never longer than its unit, and a unit can also be sent as it is. So a
receiver with room for the values alone can read the encoded bytes into the end of that room and decode them there.

*float16, bfloat16, int8, topk.* The units are blocks: each segment of the layout (its tensors of one dtype, gaps
included) cut into pieces of 262,144 bytes, the last one shorter. The directory says the bytes of each section. A
section as long as its block is the block's bytes; so it is for every dtype that is not encoded, and for blocks with NaN
or infinity. Encoded are float32 and float64, by int8 and topk also float16 and bfloat16 (by topk, any of them only
where `ratio` times the bytes of a sent number and its index is less than the bytes of a number). Of n numbers:

- float16, bfloat16: n numbers of 16 bits.
- int8: ceil(n / 256) float32 scales, then n signed bytes. Number i is byte i times scale i // 256, in float32.
- topk: k numbers (of the block's dtype where that has 16 bits, else float32), then their k indices in the block,
  ascending: u16 if n is at most 65,536, else u32. The other numbers are zero. k follows from the section's size.

*rows.* The units are the tables (`weights.layout.TensorSpec.is_table`), each with the gap behind it, and what lies
between two of them, before the first and behind the last. The directory has an entry for each tensor of rows only:
the number k of rows sent, or 2³² - 1 if the unit's bytes are sent as they are, as all other units are. An encoded
section is k row numbers (u32, ascending), then the k rows' bytes. The other rows, and the gap, are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensorspark.errors import ConfigError
from tensorspark.weights.codecs.base import Codec
from tensorspark.weights.codecs.floats import BFloat16Codec, Float16Codec
from tensorspark.weights.codecs.int8 import Int8Codec
from tensorspark.weights.codecs.rows import RowCodec
from tensorspark.weights.codecs.topk import TopKCodec

__all__ = ["CODEC_SPECS", "Codec", "codec_from_json", "codec_of"]

CODEC_SPECS = ("none", "float16", "bfloat16", "int8", "topk:R", "rows")
"""What `codec_of` takes; R stands for a share of the numbers, as in "topk:0.01"."""

_PLAIN: dict[str, Callable[[], Codec]] = {
    "float16": Float16Codec,
    "bfloat16": BFloat16Codec,
    "int8": Int8Codec,
    "rows": RowCodec,
}


def codec_of(spec: str) -> Codec | None:
    """The codec of this name; None for "none".

    >>> codec_of("topk:1e-2"), codec_of("none")
    (codec_of('topk:0.01'), None)
    >>> codec_of("int8") == codec_of("int8")
    True

    Raises:
        ConfigError: there is no such codec, the ratio is none, or ml_dtypes is missing for "bfloat16".
    """
    if spec == "none":
        return None
    name, _, argument = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if name == "topk" and argument:
        return TopKCodec(_ratio_of(spec, argument))
    if name not in _PLAIN or name != spec:
        raise _unknown(spec)
    return _PLAIN[name]()


def codec_from_json(value: Any) -> Codec | None:
    """The codec that `Codec.to_json` described; None for None.

    >>> codec_from_json({"codec": "topk", "ratio": 0.01})
    codec_of('topk:0.01')

    Raises:
        ConfigError: as for `codec_of`, or it is no such description.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ConfigError(f"expected a codec as an object such as {{'codec': 'int8'}}, got {value!r}")
    name = value.get("codec")
    settings = {key: setting for key, setting in value.items() if key != "codec"}
    if name == "topk" and set(settings) == {"ratio"}:
        return TopKCodec(settings["ratio"])
    if settings or name == "topk":
        raise ConfigError(f"expected 'ratio' beside 'codec' for 'topk', and nothing for others, got {value!r}")
    return codec_of(name)  # type: ignore[arg-type]  # says itself what it expects


def _ratio_of(spec: str, argument: str) -> float:
    try:
        return float(argument)
    except ValueError:
        raise _unknown(spec) from None


def _unknown(spec: object) -> ConfigError:
    return ConfigError(
        f"expected a codec of {', '.join(CODEC_SPECS)} (R: the share of the numbers to send, such as topk:0.01), "
        f"got {spec!r}"
    )
