"""What is said of a run when it begins: to Spark's web page, and to who watches."""

from __future__ import annotations

import time

from pyspark import SparkContext

import tensorspark
from tensorspark.config import SETTINGS, Config
from tensorspark.driver.arguments import RunPlan
from tensorspark.driver.training import JobLabel
from tensorspark.ps.checkpoint import RunCheckpoint
from tensorspark.telemetry.records import RunBegan, Tensor, mode_of
from tensorspark.weights.layout import WeightLayout

_SECRETS = frozenset({"dashboard_token"})


def label_of(name: str, job_id: str, plan: RunPlan, config: Config) -> JobLabel:
    """What Spark's web page calls the run's job.

    Args:
        job_id: that no other job of the application has.
    """
    name = name or "tensorspark"
    epochs = "1 epoch" if plan.num_epochs == 1 else f"{plan.num_epochs} epochs"
    return JobLabel(
        group=f"{name} {job_id}",
        description=f"tensorspark: {name}, {epochs}, {mode_of(config.staleness)}, {plan.num_partitions} partition(s)",
    )


def run_began(
    context: SparkContext,
    name: str,
    config: Config,
    plan: RunPlan,
    layout: WeightLayout,
    run: int,
    resume: RunCheckpoint | None,
    label: JobLabel,
) -> RunBegan:
    """The first record of a run.

    Args:
        run: its number in its session.
        resume: what it goes on from.
    """
    seconds = resume.seconds if resume else 0.0
    return RunBegan(
        seconds=seconds,
        run=run,
        name=name,
        started_at=time.time() - seconds,
        mode=mode_of(config.staleness),
        num_partitions=plan.num_partitions,
        num_epochs=plan.num_epochs,
        combiner=type(plan.combiner).__name__,
        settings={**settings_as_text(config), "batch_size": str(plan.batch_size), "seed": str(plan.seed)},
        tensors=tuple(Tensor(spec.name, tuple(spec.shape), spec.dtype) for spec in layout.specs),
        model_bytes=layout.num_bytes,
        tensorspark_version=tensorspark.__version__,
        app_id=context.applicationId or "",
        spark_url=context.uiWebUrl,
        job_group=label.group,
        resumed_steps=sum(partition.report.num_steps for partition in resume.partitions) if resume else 0,
    )


def settings_as_text(config: Config) -> dict[str, str]:
    """A session's settings by their keys, without secrets."""
    return {
        setting.key: "" if (value := getattr(config, setting.field)) is None else str(value)
        for setting in SETTINGS
        if setting.field not in _SECRETS
    }
