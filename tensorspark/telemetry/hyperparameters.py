"""A run as a session of TensorBoard's HParams page: a row of a table that compares runs.

Settings that bear on what is learned are its hyperparameters. Which there are, and which scalars are metrics,
TensorBoard gathers from all runs that it sees. An experiment's definition could name them; but the first that it meets
holds for all runs, and can never be changed.
"""

from __future__ import annotations

from typing import Any

from tensorspark.telemetry.records import RunBegan, RunEnded

_SETTINGS = ("batch_size", "sync_interval", "overlap", "compression", "pull_compression")
_PREFIX = "spark.tensorspark."


def hyperparameters(began: RunBegan) -> dict[str, bool | float | str]:
    """By the fields of `SETTINGS`. The run may name settings by their keys or by fields, which go before; those that it
    does not name are absent.

    >>> settings = {"spark.tensorspark.batch.size": "64", "spark.tensorspark.staleness": ""}
    >>> run = RunBegan(0, 0, "run", 0, "asynchronous", 2, 3, "DeltaWeightCombiner", settings, (), 0, "2")
    >>> hyperparameters(run)["batch_size"], hyperparameters(run)["staleness"]
    (64.0, 'async')
    """
    settings = {_field(key): text for key, text in began.settings.items()} | dict(began.settings)
    values: dict[str, bool | float | str] = {
        "mode": began.mode,
        "combiner": began.combiner,
        "num_partitions": float(began.num_partitions),
        "num_epochs": float(began.num_epochs),
    }
    values |= {name: _value(settings[name]) for name in _SETTINGS if name in settings}
    if "staleness" in settings:
        values["staleness"] = settings["staleness"] or "async"  # a word, also a number: a column has one type
    return values


def session_start(began: RunBegan) -> Any:
    """A `Summary.Value` that begins the session. Needs the package tensorboard."""
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    info = plugin_data_pb2.SessionStartInfo(
        start_time_secs=began.started_at + began.seconds, monitor_url=began.spark_url or ""
    )
    for name, value in hyperparameters(began).items():
        if isinstance(value, bool):
            info.hparams[name].bool_value = value
        elif isinstance(value, float):
            info.hparams[name].number_value = value
        else:
            info.hparams[name].string_value = value
    return _value_of(metadata.SESSION_START_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_start_info=info))


def session_end(ended: RunEnded, ended_at: float) -> Any:
    """A `Summary.Value` that ends the session: a run that a callback stopped has succeeded.

    Args:
        ended_at: seconds since the epoch.
    """
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    status = api_pb2.STATUS_FAILURE if ended.outcome == "failed" else api_pb2.STATUS_SUCCESS
    info = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=ended_at)
    return _value_of(metadata.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_end_info=info))


def _value_of(tag: str, plugin_data: Any) -> Any:
    # Not tensorboard.plugins.hparams.summary, which does the same: it imports TensorFlow.
    from tensorboard.compat.proto import summary_pb2
    from tensorboard.plugins.hparams import metadata

    return summary_pb2.Summary.Value(
        tag=tag, metadata=metadata.create_summary_metadata(plugin_data), tensor=metadata.NULL_TENSOR
    )


def _field(key: str) -> str:
    return key.removeprefix(_PREFIX).replace(".", "_")


def _value(text: str) -> bool | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text
