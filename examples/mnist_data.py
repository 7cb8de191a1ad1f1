"""Finds and reads MNIST, or the handwritten digits that come with this repository where there is no MNIST.

Reading needs numpy only, so that it runs on Spark executors as well as on the driver.
"""

from __future__ import annotations

import gzip
import itertools
import logging
import math
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

DATA_DIR = Path(__file__).resolve().parent.parent / "MNIST_data"
"""Where MNIST is looked for last and downloaded to, and where the embedded digits are."""

DATA_DIR_VARIABLE = "MNIST_DATA_DIR"
DOWNLOAD_DEADLINE_S = 120.0

_MNIST_SOURCE = "MNIST"
DIGITS = "scikit-learn digits (1,797 scans of 8x8 pixels scaled to 28x28; not MNIST)"

# In the order of MnistFiles' fields. Some copies of MNIST write the second "-" as a ".".
_ROLES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

_IMAGE_SIDE = 28
_DIGIT_SIDE = 8
_DIGIT_MAX = 16
_UBYTE_MAGIC = 0x0800  # plus the number of dimensions

# Keras gives its connections no timeout. It keeps what it downloads in its own cache, and checks the hash.
_DOWNLOAD_PROGRAM = """
import socket, sys
socket.setdefaulttimeout(15)
import keras, numpy
(x_train, y_train), (x_test, y_test) = keras.datasets.mnist.load_data()
numpy.savez(sys.argv[1], x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
"""


@dataclass(frozen=True)
class MnistFiles:
    """Four IDX files, gzipped or not.

    Attributes:
        source: which data this is, for humans.
    """

    source: str
    train_images: Path
    train_labels: Path
    test_images: Path
    test_labels: Path


def find(data_dir: str | os.PathLike[str] | None = None, download: bool = True) -> MnistFiles:
    """The files to train on: of `data_dir`, else ``$MNIST_DATA_DIR``, else ``MNIST_data/``.

    A directory named by argument or environment must hold all four files. Where none is named and ``MNIST_data/``
    holds no MNIST, it is downloaded to there, and where that fails (logged as a warning), the embedded digits are
    the answer.

    Raises:
        FileNotFoundError: a named directory lacks files; the message lists them.
    """
    if data_dir is not None:
        return _in_named_dir(Path(data_dir), "data_dir")
    if from_environment := os.environ.get(DATA_DIR_VARIABLE):
        return _in_named_dir(Path(from_environment), f"${DATA_DIR_VARIABLE}")
    if files := _mnist_in(DATA_DIR):
        return files
    if download and _download(DATA_DIR) and (files := _mnist_in(DATA_DIR)):
        return files
    if files := _digits_in(DATA_DIR):
        return files
    raise FileNotFoundError(f"{DATA_DIR} holds neither MNIST nor the digits that come with this repository")


def load(files: MnistFiles) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Reads all four files.

    Returns:
        Training images ``[n, 784] float32``, training labels ``[n] uint8``, test images and test labels.

    Raises:
        ValueError: a file is not what it should be, or there are not as many images as labels.
    """
    train_images, test_images = (
        decode_images(path.read_bytes(), str(path)) for path in (files.train_images, files.test_images)
    )
    train_labels, test_labels = (
        decode_labels(path.read_bytes(), str(path)) for path in (files.train_labels, files.test_labels)
    )
    for path, images, labels in (
        (files.train_images, train_images, train_labels),
        (files.test_images, test_images, test_labels),
    ):
        if len(images) != len(labels):
            raise ValueError(f"{path} holds {len(images)} images, but there are {len(labels)} labels beside it")
    return train_images, train_labels, test_images, test_labels


def decode_images(content: bytes | bytearray, name: str = "IDX images") -> np.ndarray:
    """Reads the content of an IDX3 file, gzipped or not.

    Args:
        content: images of 28x28 pixels of 0 to 255, or of 8x8 pixels of 0 to 16. The latter are scaled to 28x28: each
            pixel becomes a block of 3x3, with a border of 2.
        name: what error messages call the content.

    Returns:
        ``[n, 784] float32`` in [0, 1].

    Raises:
        ValueError: not gzip or IDX3 of unsigned bytes, truncated, too long, or images of another size or range.
    """
    pixels = _decode(content, name, num_dims=3)
    num_images, height, width = pixels.shape
    scale = 255
    if height == width == _DIGIT_SIDE:
        if pixels.size and pixels.max() > _DIGIT_MAX:
            raise ValueError(f"{name}: 8x8 digits have pixels of 0 to {_DIGIT_MAX}, but here is one of {pixels.max()}")
        factor, margin = divmod(_IMAGE_SIDE, _DIGIT_SIDE)
        border = margin // 2
        blocks = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
        pixels = np.pad(blocks, ((0, 0), (border, border), (border, border)))
        scale = _DIGIT_MAX
    elif not height == width == _IMAGE_SIDE:
        raise ValueError(f"{name}: expected images of 28x28 or 8x8 pixels, got {height}x{width}")
    images = pixels.reshape(num_images, _IMAGE_SIDE * _IMAGE_SIDE).astype(np.float32)
    images /= np.float32(scale)
    return images


def decode_labels(content: bytes | bytearray, name: str = "IDX labels") -> np.ndarray:
    """Reads the content of an IDX1 file, gzipped or not: ``[n] uint8``. Error messages call it `name`.

    Raises:
        ValueError: not gzip or IDX1 of unsigned bytes, truncated, or too long.
    """
    return _decode(content, name, num_dims=1).copy()


def encode(array: np.ndarray) -> bytes:
    """The IDX content, not gzipped, of an array of uint8."""
    if array.dtype != np.uint8:
        raise TypeError(f"expected uint8, got {array.dtype}")
    return struct.pack(f">{1 + array.ndim}I", _UBYTE_MAGIC + array.ndim, *array.shape) + array.tobytes()


def one_hot(labels: np.ndarray, num_classes: int = 10) -> np.ndarray:
    """``[n]`` class numbers as ``[n, num_classes] float32``.

    Raises:
        ValueError: a label is outside 0 to `num_classes` - 1.
    """
    labels = np.asarray(labels)
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}")
    rows: np.ndarray = np.eye(num_classes, dtype=np.float32)[labels]
    return rows


def _mnist_in(directory: Path) -> MnistFiles | None:
    return _files_in(directory, "", _MNIST_SOURCE)


def _digits_in(directory: Path) -> MnistFiles | None:
    return _files_in(directory, "digits-", DIGITS)


def _files_in(directory: Path, prefix: str, source: str) -> MnistFiles | None:
    found = [_find_file(directory, prefix + role) for role in _ROLES]
    train_images, train_labels, test_images, test_labels = found
    if train_images and train_labels and test_images and test_labels:
        return MnistFiles(source, train_images, train_labels, test_images, test_labels)
    return None


def _find_file(directory: Path, name: str) -> Path | None:
    for spelling, suffix in itertools.product((name, name.replace("-idx", ".idx")), ("", ".gz")):
        path = directory / (spelling + suffix)
        if path.is_file():
            return path
    return None


def _in_named_dir(directory: Path, named_by: str) -> MnistFiles:
    if files := _mnist_in(directory) or _digits_in(directory):
        return files
    if not directory.is_dir():
        raise FileNotFoundError(f"{named_by} is {directory}, which is not a directory")
    missing = [role for role in _ROLES if _find_file(directory, role) is None]
    raise FileNotFoundError(f"{named_by} is {directory}, which lacks (with or without .gz): {', '.join(missing)}")


def _download(directory: Path) -> bool:
    """Writes MNIST's four files into `directory`, each whole or not at all. False, and logged, on failure."""
    logger.info("downloading MNIST to %s", directory)
    try:
        directory.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".download-") as temporary:
            archive = Path(temporary, "mnist.npz")
            _fetch(archive)
            with np.load(archive) as arrays:
                for role, key in zip(_ROLES, ("x_train", "y_train", "x_test", "y_test"), strict=True):
                    compressed = Path(temporary, role + ".gz")
                    compressed.write_bytes(gzip.compress(encode(arrays[key]), mtime=0))
                    compressed.replace(directory / compressed.name)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("MNIST could not be downloaded: %s", _reason(error))
        return False
    return True


def _fetch(archive: Path) -> None:
    """Writes MNIST as Keras gives it to an npz file, from a process of its own, so that there is a deadline."""
    subprocess.run(
        [sys.executable, "-c", _DOWNLOAD_PROGRAM, str(archive)],
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=DOWNLOAD_DEADLINE_S,
        check=True,
    )


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError) and error.stderr and error.stderr.strip():
        return str(error.stderr).strip().splitlines()[-1]
    if isinstance(error, subprocess.TimeoutExpired):
        return f"not done after {error.timeout:.0f} s"
    return str(error)


def _decode(content: bytes | bytearray, name: str, num_dims: int) -> np.ndarray:
    """The array of uint8 in an IDX content; shares the content's memory where it is not gzipped."""
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{name}: damaged or truncated gzip: {error}") from error
    header_bytes = 4 * (1 + num_dims)
    if len(content) < header_bytes:
        raise ValueError(f"{name}: expected an IDX header of {header_bytes} bytes, got {len(content)} bytes in all")
    magic, *shape = struct.unpack_from(f">{1 + num_dims}I", content)
    if magic != _UBYTE_MAGIC + num_dims:
        raise ValueError(f"{name}: expected the magic number {_UBYTE_MAGIC + num_dims:#010x}, got {magic:#010x}")
    expected_bytes = header_bytes + math.prod(shape)
    if len(content) != expected_bytes:
        dims = "x".join(map(str, shape))
        raise ValueError(
            f"{name}: {dims} unsigned bytes make {expected_bytes} bytes with the header, got {len(content)}"
        )
    return np.frombuffer(content, np.uint8)[header_bytes:].reshape(shape)
