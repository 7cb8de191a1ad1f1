"""The reader of MNIST and of the embedded digits, and where they are looked for."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from examples import mnist_data

REPOSITORY = Path(mnist_data.__file__).resolve().parent.parent
MNIST_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
DIGITS_NAMES = tuple(f"digits-{name}.gz" for name in MNIST_NAMES)

uint8_labels = hnp.arrays(np.uint8, st.integers(0, 20))
uint8_images = hnp.arrays(np.uint8, st.tuples(st.integers(0, 3), st.just(28), st.just(28)))


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ``MNIST_data/``, a clean environment and no network."""
    directory = tmp_path / "MNIST_data"
    directory.mkdir()
    monkeypatch.setattr(mnist_data, "DATA_DIR", directory)
    monkeypatch.setattr(mnist_data, "_fetch", no_network)
    monkeypatch.delenv(mnist_data.DATA_DIR_VARIABLE, raising=False)
    return directory


def no_network(archive: Path) -> None:
    raise subprocess.CalledProcessError(1, "python", stderr="Traceback ...\nConnectionError: network unreachable\n")


def fill(directory: Path, names: tuple[str, ...]) -> Path:
    directory.mkdir(exist_ok=True)
    for name in names:
        (directory / name).write_bytes(b"")
    return directory


def idx(magic: int, *shape: int, body: bytes = b"") -> bytes:
    return struct.pack(f">{1 + len(shape)}I", magic, *shape) + body


class TestDecode:
    @given(uint8_labels, st.booleans())
    def test_labels_survive_the_round_trip(self, labels: np.ndarray, compressed: bool) -> None:
        content = idx(0x801, len(labels), body=bytes(labels))
        decoded = mnist_data.decode_labels(gzip.compress(content, mtime=0) if compressed else content)
        assert decoded.dtype == np.uint8
        assert decoded.flags.writeable
        np.testing.assert_array_equal(decoded, labels)

    @given(uint8_images, st.booleans())
    def test_images_survive_the_round_trip(self, images: np.ndarray, compressed: bool) -> None:
        content = idx(0x803, *images.shape, body=images.tobytes())
        decoded = mnist_data.decode_images(gzip.compress(content, mtime=0) if compressed else content)
        assert decoded.dtype == np.float32
        assert decoded.shape == (len(images), 784)
        np.testing.assert_allclose(decoded, [[p / 255 for p in image.flat] for image in images] or decoded, rtol=1e-6)

    @given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)))
    def test_encode_writes_what_decode_reads(self, array: np.ndarray) -> None:
        np.testing.assert_array_equal(mnist_data._decode(mnist_data.encode(array), "", array.ndim), array)

    def test_encode_refuses_other_types(self) -> None:
        with pytest.raises(TypeError, match="expected uint8, got float32"):
            mnist_data.encode(np.zeros(3, np.float32))

    def test_a_bytearray_is_read_like_bytes(self) -> None:
        assert list(mnist_data.decode_labels(bytearray(idx(0x801, 2, body=b"\x03\x07")))) == [3, 7]

    def test_a_pixel_of_an_8x8_digit_becomes_a_block_of_3x3_inside_a_border_of_2(self) -> None:
        digit = np.zeros((1, 8, 8), np.uint8)
        digit[0, 1, 7] = 4
        (image,) = mnist_data.decode_images(mnist_data.encode(digit)).reshape(-1, 28, 28)
        expected = np.zeros((28, 28), np.float32)
        expected[5:8, 23:26] = 0.25
        np.testing.assert_array_equal(image, expected)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "header of 16 bytes, got 0 bytes"),
            (idx(0x803, 1, 28)[:15], "header of 16 bytes, got 12 bytes"),
            (idx(0x801, 1, 28, 28, body=bytes(784)), "magic number 0x00000803, got 0x00000801"),
            (idx(0xD03, 1, 28, 28, body=bytes(784)), "magic number 0x00000803, got 0x00000d03"),
            (b"<!DOCTYPE html><html>", "magic number 0x00000803, got 0x3c21444f"),
            (idx(0x803, 1, 28, 28, body=bytes(783)), "1x28x28 unsigned bytes make 800 bytes with the header, got 799"),
            (idx(0x803, 1, 28, 28, body=bytes(785)), "make 800 bytes with the header, got 801"),
            (idx(0x803, 2**32 - 1, 2**32 - 1, 2**32 - 1), "with the header, got 16"),
            (idx(0x803, 1, 28, 8, body=bytes(224)), "expected images of 28x28 or 8x8 pixels, got 28x8"),
            (idx(0x803, 0, 0, 0), "expected images of 28x28 or 8x8 pixels, got 0x0"),
            (idx(0x803, 1, 8, 8, body=bytes(63) + b"\x11"), "pixels of 0 to 16, but here is one of 17"),
            (gzip.compress(idx(0x803, 1, 28, 28, body=bytes(784)), mtime=0)[:-9], "damaged or truncated gzip"),
            (b"\x1f\x8b" + bytes(30), "damaged or truncated gzip"),
        ],
    )
    def test_images_that_are_not_what_they_should_be_are_refused(self, content: bytes, message: str) -> None:
        with pytest.raises(ValueError, match=rf"(?s)^/data/x: .*{message}"):
            mnist_data.decode_images(content, "/data/x")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (idx(0x801), "header of 8 bytes, got 4 bytes"),
            (idx(0x803, 1, body=b"\x01"), "magic number 0x00000801, got 0x00000803"),
            (idx(0x801, 2, body=b"\x01"), "make 10 bytes with the header, got 9"),
        ],
    )
    def test_labels_that_are_not_what_they_should_be_are_refused(self, content: bytes, message: str) -> None:
        with pytest.raises(ValueError, match=rf"^IDX labels: .*{message}"):
            mnist_data.decode_labels(content)

    def test_corrupted_gzip_is_refused(self) -> None:
        compressed = bytearray(gzip.compress(idx(0x801, 100, body=bytes(range(100)))))
        compressed[20] ^= 0xFF
        with pytest.raises(ValueError, match="damaged or truncated gzip"):
            mnist_data.decode_labels(compressed)


class TestOneHot:
    def test_each_row_has_its_one_at_the_label(self) -> None:
        rows = mnist_data.one_hot(np.array([2, 0], np.uint8), num_classes=3)
        assert rows.dtype == np.float32
        assert rows.tolist() == [[0, 0, 1], [1, 0, 0]]

    def test_no_labels_make_no_rows(self) -> None:
        assert mnist_data.one_hot(np.array([], np.uint8)).shape == (0, 10)

    def test_labels_out_of_range_are_refused(self) -> None:
        with pytest.raises(ValueError, match="labels run from 1 to 10, expected 0 to 9"):
            mnist_data.one_hot(np.array([1, 10], np.uint8))
        with pytest.raises(ValueError, match="labels run from -1 to 1"):
            mnist_data.one_hot(np.array([1, -1]))


class TestFind:
    def test_the_argument_goes_before_the_environment(self, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        named = fill(data_dir / "named", MNIST_NAMES)
        monkeypatch.setenv("MNIST_DATA_DIR", str(fill(data_dir / "other", MNIST_NAMES)))
        assert mnist_data.find(str(named)).train_images == named / "train-images-idx3-ubyte"

    def test_the_environment_goes_before_the_repository(self, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fill(data_dir, MNIST_NAMES)
        named = fill(data_dir / "named", tuple(f"{name}.gz" for name in MNIST_NAMES))
        monkeypatch.setenv("MNIST_DATA_DIR", str(named))
        files = mnist_data.find()
        assert files == mnist_data.MnistFiles("MNIST", *(named / f"{name}.gz" for name in MNIST_NAMES))

    def test_an_empty_variable_names_nothing(self, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fill(data_dir, MNIST_NAMES)
        monkeypatch.setenv("MNIST_DATA_DIR", "")
        assert mnist_data.find().test_labels == data_dir / "t10k-labels-idx1-ubyte"

    def test_mnist_in_the_repository_goes_before_the_digits(self, data_dir: Path) -> None:
        fill(data_dir, MNIST_NAMES + DIGITS_NAMES)
        assert mnist_data.find().source == "MNIST"

    def test_names_with_a_dot_are_found_too(self, data_dir: Path) -> None:
        fill(data_dir, tuple(name.replace("-idx", ".idx") for name in MNIST_NAMES))
        assert mnist_data.find().test_images.name == "t10k-images.idx3-ubyte"

    @pytest.mark.parametrize("by_argument", [True, False])
    def test_a_named_directory_without_the_files_is_an_error_that_lists_them(
        self, data_dir: Path, monkeypatch: pytest.MonkeyPatch, by_argument: bool
    ) -> None:
        fill(data_dir, DIGITS_NAMES)
        named = fill(data_dir / "named", MNIST_NAMES[:2])
        if not by_argument:
            monkeypatch.setenv("MNIST_DATA_DIR", str(named))
        with pytest.raises(FileNotFoundError) as caught:
            mnist_data.find(str(named) if by_argument else None)
        name = "data_dir" if by_argument else "$MNIST_DATA_DIR"
        assert str(caught.value) == (
            f"{name} is {named}, which lacks (with or without .gz): t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte"
        )

    def test_a_named_directory_that_does_not_exist_is_an_error(self, data_dir: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere, which is not a directory"):
            mnist_data.find(str(data_dir / "nowhere"))

    def test_a_named_directory_may_hold_the_digits(self, data_dir: Path) -> None:
        assert "not MNIST" in mnist_data.find(fill(data_dir / "named", DIGITS_NAMES)).source

    def test_what_is_downloaded_is_kept_as_idx_files(self, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (5, 28, 28), np.uint8)
        labels = rng.integers(0, 10, 5, np.uint8)

        def fetch(archive: Path) -> None:
            np.savez(archive, x_train=images[:3], y_train=labels[:3], x_test=images[3:], y_test=labels[3:])

        fill(data_dir, DIGITS_NAMES)
        monkeypatch.setattr(mnist_data, "_fetch", fetch)
        files = mnist_data.find()
        monkeypatch.setattr(mnist_data, "_fetch", no_network)
        assert files == mnist_data.find()
        assert files.source == "MNIST"
        train_images, train_labels, test_images, test_labels = mnist_data.load(files)
        np.testing.assert_allclose(np.vstack([train_images, test_images]), images.reshape(5, 784) / 255, rtol=1e-6)
        assert [*train_labels, *test_labels] == list(labels)
        assert sorted(path.name for path in data_dir.iterdir()) == sorted(
            [*DIGITS_NAMES, *(f"{name}.gz" for name in MNIST_NAMES)]
        )

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (subprocess.CalledProcessError(1, "python", stderr="Traceback\nURLError: no network\n"), "no network"),
            (subprocess.TimeoutExpired("python", 120), "not done after 120 s"),
            (PermissionError(13, "Permission denied", "MNIST_data"), "Permission denied"),
        ],
    )
    def test_where_the_download_fails_the_digits_are_the_answer(
        self,
        data_dir: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        error: Exception,
        reason: str,
    ) -> None:
        def fetch(archive: Path) -> None:
            raise error

        fill(data_dir, DIGITS_NAMES)
        monkeypatch.setattr(mnist_data, "_fetch", fetch)
        assert "not MNIST" in mnist_data.find().source
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert reason in record.getMessage()
        assert sorted(path.name for path in data_dir.iterdir()) == sorted(DIGITS_NAMES)

    def test_nothing_is_downloaded_where_that_is_not_wanted(
        self, data_dir: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        fill(data_dir, DIGITS_NAMES)
        assert "not MNIST" in mnist_data.find(download=False).source
        assert not caplog.records

    def test_without_any_data_the_error_names_the_directory(self, data_dir: Path) -> None:
        with pytest.raises(FileNotFoundError, match=f"{data_dir} holds neither"):
            mnist_data.find(download=False)


class TestLoad:
    def test_the_embedded_digits_are_1500_and_297_images_of_ten_classes(self) -> None:
        train_images, train_labels, test_images, test_labels = mnist_data.load(digits())
        assert train_images.shape == (1500, 784)
        assert test_images.shape == (297, 784)
        for images, labels in ((train_images, train_labels), (test_images, test_labels)):
            assert (images.min(), images.max()) == (0, 1)
            assert len(images) == len(labels)
            assert set(labels) == set(range(10))
        # The class counts that the data set's description gives for its 1,797 digits.
        counts = np.bincount(np.concatenate([train_labels, test_labels]))
        assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]

    def test_softmax_regression_learns_the_embedded_digits(self) -> None:
        images, labels, test_images, test_labels = mnist_data.load(digits())
        targets = mnist_data.one_hot(labels)
        weights = np.zeros((784, 10))
        for _ in range(15):
            for start in range(0, len(images), 100):
                batch = slice(start, start + 100)
                scores = np.exp(images[batch] @ weights)
                error = scores / scores.sum(axis=1, keepdims=True) - targets[batch]
                weights -= 0.5 * images[batch].T @ error / len(error)
        assert ((test_images @ weights).argmax(axis=1) == test_labels).mean() > 0.95

    def test_a_damaged_file_is_named(self, tmp_path: Path) -> None:
        for name in MNIST_NAMES:
            images = np.zeros((2, 28, 28) if "images" in name else 2, np.uint8)
            (tmp_path / name).write_bytes(mnist_data.encode(images))
        damaged = tmp_path / MNIST_NAMES[2]
        damaged.write_bytes(damaged.read_bytes()[:-1])
        with pytest.raises(ValueError, match=f"^{damaged}: "):
            mnist_data.load(mnist_data.find(tmp_path))

    def test_fewer_labels_than_images_are_refused(self, tmp_path: Path) -> None:
        for name in MNIST_NAMES:
            array = np.zeros((2, 28, 28) if "images" in name else 1, np.uint8)
            (tmp_path / name).write_bytes(mnist_data.encode(array))
        with pytest.raises(ValueError, match="holds 2 images, but there are 1 labels beside it"):
            mnist_data.load(mnist_data.find(tmp_path))

    @pytest.mark.mnist
    def test_real_mnist_is_60000_and_10000_images(self) -> None:
        try:
            files = mnist_data.find(download=False)
        except FileNotFoundError as error:
            pytest.skip(str(error))
        if files.source != "MNIST":
            pytest.skip(f"MNIST is neither in $MNIST_DATA_DIR nor in {mnist_data.DATA_DIR}")
        train_images, train_labels, test_images, test_labels = mnist_data.load(files)
        assert train_images.shape == (60000, 784)
        assert test_images.shape == (10000, 784)
        # Mean and standard deviation as they are known: 0.1307 and 0.3081.
        assert train_images.mean(dtype=np.float64) == pytest.approx(0.1307, abs=5e-5)
        assert train_images.std(dtype=np.float64) == pytest.approx(0.3081, abs=5e-5)
        assert train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
        assert test_labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]


def digits() -> mnist_data.MnistFiles:
    files = mnist_data._digits_in(mnist_data.DATA_DIR)
    assert files is not None
    return files


def test_reading_imports_neither_tensorflow_nor_pyspark() -> None:
    program = "import sys, examples.mnist_data; print({'tensorflow', 'keras', 'pyspark'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "set()\n"
