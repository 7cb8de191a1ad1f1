"""What TFRecord files hold: framing and checksums, and `tf.train.Example` messages from and to Arrow record batches."""

import importlib

for _dependency in ("crc32c", "pyarrow"):  # each module here needs one of them: said here, once
    try:
        importlib.import_module(_dependency)
    except ImportError as error:
        raise ImportError(
            f"TFRecord files need {_dependency}, in the Python of the driver and of the executors, and it is not "
            "installed: pip install 'tensorspark[tfrecord]'",
            name=_dependency,
        ) from error
