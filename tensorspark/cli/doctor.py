"""``tensorspark doctor``: whether driver and executors can train."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import re
import secrets
import shlex
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tensorspark import config as configuration
from tensorspark.cli.output import EXIT_FAILED, EXIT_OK, UsageError, say
from tensorspark.errors import ConfigError, TensorsparkError

if TYPE_CHECKING:
    from tensorspark.driver.preflight import CheckResult
    from tensorspark.ps.client import ServerAddress

_DESCRIPTION = """\
Checks that this machine and the executors can train, before you wait for a run that cannot. Starts a Spark application
of its own and a parameter server as a run would, looks at the driver and at every slot, and prints a line a check:

  ok    it works
  warn  it works, but look at it
  skip  there was nothing to check, or a failed check stood in the way
  FAIL  it does not work; the line says which setting to change

Exits with 0 where nothing failed, 1 where something did, and 2 where the command itself was wrong."""
_EPILOG = """\
example, with the file that `pyspark --properties-file` and `spark-submit --properties-file` read too:

  python -m tensorspark doctor --properties-file conf/spark-defaults.conf
  python -m tensorspark doctor --master 'local[2]' --conf spark.hdfs.dir=file:///nfs/tmp

Without slots, or with busy ones, it gives up after spark.tensorspark.io.timeout (Spark itself takes about a minute
to give up on a master that does not answer):

  python -m tensorspark doctor --master spark://host:7077 --conf spark.tensorspark.io.timeout=20s

Under spark-submit (in a cluster's deploy mode, say) give the options to spark-submit, and name the package's main file:

  spark-submit --properties-file conf/spark-defaults.conf .../tensorspark/__main__.py doctor"""

# Spark Python workers start with the executors' Python; spark-submit and pyspark put this setting into that variable.
_PYTHON_SETTING, _PYTHON_VARIABLE = "spark.pyspark.python", "PYSPARK_PYTHON"
_SUBMIT_VARIABLE, _SUBMITTED_VARIABLE = "PYSPARK_SUBMIT_ARGS", "PYSPARK_GATEWAY_PORT"
# What a run does not need, and what makes Spark wait until the executors that it asked for are there.
_DEFAULTS = {
    "spark.app.name": "tensorspark doctor",
    "spark.log.level": "OFF",
    "spark.scheduler.minRegisteredResourcesRatio": "1.0",
    "spark.ui.enabled": "false",
}


def add_parser(commands: Any) -> None:
    """Adds the command to those of a parser."""
    doctor = commands.add_parser(
        "doctor",
        help="check that driver and executors can train",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument("--properties-file", metavar="F", help="settings of Spark and tensorspark, a key and a value "
                        "a line; without it, Spark's own conf/spark-defaults.conf")  # fmt: skip
    doctor.add_argument("--master", metavar="M", help="where to run, such as local[2], yarn or spark://host:7077")
    doctor.add_argument("--conf", metavar="KEY=VALUE", type=_as_conf, action="append", default=[], help="a setting; "
                        "wins over the file; may be given again")  # fmt: skip
    doctor.set_defaults(run=run)


def _as_conf(text: str) -> str:
    if not re.fullmatch(r"[^=\s]+=.*", text, re.DOTALL):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, such as spark.tmp.dir=/tmp, got {text!r}")
    return text


def run(options: argparse.Namespace) -> int:
    """Prints a line a check; returns the exit code.

    Raises:
        UsageError: options that cannot work.
    """
    submit_options = _submit_options(options)
    if importlib.util.find_spec("pyspark") is None:
        say("FAIL pyspark: it is not installed for this Python; pip install 'tensorspark[spark]', or run the doctor "
             "under spark-submit")  # fmt: skip
        return EXIT_FAILED
    from tensorspark.driver.preflight import Status

    # py4j logs the stack of a call that Ctrl-C cut short, in part as the root logger; errors come to us in any case.
    logging.getLogger("py4j").addHandler(logging.NullHandler())
    logging.getLogger("py4j").propagate = False
    logging.getLogger().addFilter(lambda record: record.getMessage() != "KeyboardInterrupt while sending command.")
    has_failed = False
    with contextlib.closing(_examine(submit_options)) as results:
        for result in results:
            say(str(result))
            has_failed |= result.status is Status.FAILED
    return EXIT_FAILED if has_failed else EXIT_OK


def _submit_options(options: argparse.Namespace) -> list[str]:
    """The options as spark-submit knows them."""
    submit_options: list[str] = []
    if options.properties_file is not None:
        if not Path(options.properties_file).is_file():
            raise UsageError(f"--properties-file: expected a file, but there is none at {options.properties_file}")
        submit_options += ["--properties-file", options.properties_file]
    if options.master is not None:
        submit_options += ["--master", options.master]
    for setting in options.conf:
        submit_options += ["--conf", setting]
    if submit_options and _SUBMITTED_VARIABLE in os.environ:
        raise UsageError(f"Spark has started already: give {submit_options[0]} to spark-submit instead")
    return submit_options


def _examine(submit_options: list[str]) -> Generator[CheckResult, None, None]:
    """Yields results as they come, and stops what was started when it ends or is closed."""
    from tensorspark.driver.preflight import CheckResult, examine

    check = "Spark"
    with contextlib.ExitStack() as stack:
        try:
            log = stack.enter_context(tempfile.TemporaryFile())
            gateway = _start_jvm(submit_options, log)
            spark_conf = _make_spark_conf(gateway)
            check = "settings"
            config = configuration.resolve({}, dict(spark_conf.getAll()))
            yield CheckResult(check, "those of tensorspark are valid")
            check = "Spark"
            context = _start_spark(gateway, spark_conf)
            stack.callback(context.stop)
            yield CheckResult(check, f"{context.version} runs on {context.master}")
        except TensorsparkError as error:
            yield CheckResult.failed(check, error)
            return
        served, address = _serve(stack, config, context.getConf().get("spark.driver.host", "localhost"))
        yield served
        yield from examine(
            context,
            address,
            hdfs_dir=config.hdfs_dir,
            tmp_dir=config.tmp_dir,
            run_id=f"doctor-{secrets.token_hex(4)}",
            timeout_s=config.io_timeout_s,
        )


def _serve(
    stack: contextlib.ExitStack, config: configuration.Config, driver_host: str
) -> tuple[CheckResult, ServerAddress | None]:
    """Starts a parameter server as a run would, with a run that nobody trains."""
    from tensorspark.driver.preflight import CheckResult, Status
    from tensorspark.driver.resources import address_of, start_server
    from tensorspark.weights.combiners import MeanWeightCombiner
    from tensorspark.weights.layout import TensorSpec, WeightLayout

    host = config.server_host or driver_host
    layout = WeightLayout([TensorSpec("doctor", (1,), "float32")])
    try:
        server = start_server(layout, config, host)
    except ConfigError as error:
        return CheckResult.failed("parameter server", error), None
    stack.callback(server.close)
    server.begin_run(layout.allocate(), MeanWeightCombiner(1), 1)
    address = address_of(server, config)
    how = "with TLS" if config.tls_enabled else "without TLS"
    found = f"listens {how}, and advertises {address}"
    if config.server_port not in (0, server.port):
        found += f": port {config.server_port} (spark.tensorspark.server.port) is taken"
        return CheckResult("parameter server", found, Status.WARNING), address
    return CheckResult("parameter server", found), address


# Spark, without its talk


def _start_jvm(submit_options: list[str], log: IO[bytes]) -> Any:
    """A gateway to Spark's JVM, which reads the properties file itself; under spark-submit to the one that runs."""
    from pyspark.errors import PySparkRuntimeError
    from pyspark.java_gateway import launch_gateway

    with _environment(_SUBMIT_VARIABLE, _submit_arguments(submit_options)):
        try:
            gateway: Any = launch_gateway(popen_kwargs={"stdout": log, "stderr": log})  # type: ignore[no-untyped-call]
            return gateway
        except PySparkRuntimeError as error:
            raise ConfigError(f"it did not start: {_last_words(log)}; {_ADVICE}") from error
        except OSError as error:
            raise ConfigError(f"it did not start: {error}; check SPARK_HOME, or unset it") from error


_ADVICE = "check spark.master, --properties-file and --conf, and JAVA_HOME, which must hold Java 17 or newer"


def _submit_arguments(submit_options: list[str]) -> str:
    """`submit_options` behind those that the environment has: of two, the last counts."""
    *options, resource = shlex.split(os.environ.get(_SUBMIT_VARIABLE, "")) or ["pyspark-shell"]
    return shlex.join([*options, *submit_options, resource])


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _make_spark_conf(gateway: Any) -> Any:
    from pyspark import SparkConf

    spark_conf = SparkConf(_jvm=gateway.jvm)
    for key, value in _DEFAULTS.items():
        spark_conf.setIfMissing(key, value)
    return spark_conf


def _start_spark(gateway: Any, spark_conf: Any) -> Any:
    from py4j.protocol import Py4JError
    from pyspark import SparkContext
    from pyspark.errors import PySparkException

    python = spark_conf.get(_PYTHON_SETTING)
    with _environment(_PYTHON_VARIABLE, python) if python else contextlib.nullcontext():
        try:
            return SparkContext(gateway=gateway, conf=spark_conf)
        except (Py4JError, PySparkException, ValueError) as error:
            raise ConfigError(f"it did not start: {_reason(error)}; {_ADVICE}") from error


def _reason(error: Exception) -> str:
    """What a Java exception says, without its stack."""
    lines = [line.lstrip(": ") for line in str(error).splitlines()]
    return next((line for line in lines if re.match(r"[\w.$]+(Exception|Error)\b", line)), lines[0])


def _last_words(log: IO[bytes]) -> str:
    """The line in which the JVM says why it ended, as far as can be told."""
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"exception|error|not set|not found|no such", line, re.IGNORECASE)]
    return re.sub(r"^Exception in thread \S+ ", "", (telling or lines or ["it said nothing"])[0])
