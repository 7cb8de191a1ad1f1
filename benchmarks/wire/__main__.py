"""How fast weights travel between workers and the parameter server, and what it takes.

Everything runs on loopback, servers and clients in processes of their own. What is compared is measured one right
after the other in each round; figures are medians over the rounds, ratios the medians of the rounds' ratios. A push
counts when it is merged into the weights, and at the end the weights are checked to be the sum of all pushes, and what
is pulled to be the weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from benchmarks.measuring.report import Report, argument_parser
from benchmarks.wire import clients, codecs, json_comparison, memory, pages, raw_comparison, shards

PARTS: dict[str, Callable[[Report, bool], None]] = {
    "raw": raw_comparison.measure,
    "codecs": codecs.measure,
    "clients": clients.measure,
    "latency": clients.measure_latency,
    "memory": memory.measure,
    "shards": shards.measure,
    "json": json_comparison.measure,
    "pages": pages.measure,
}
"""What adds a part's rows to a report, by its name; takes whether it is to be quick."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures the parts that are asked for; returns the exit status."""
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        type=_parts,
        default=tuple(PARTS),
        metavar="PARTS",
        help=f"parts to measure, between commas, of {', '.join(PARTS)}; all without it",
    )
    options = parser.parse_args(arguments)
    report = Report("Wire: weights over loopback", packages=["numpy", "tornado", "msgpack"])
    for part in options.only:
        PARTS[part](report, options.quick)
    return report.conclude(options.json, options.out)


def _parts(text: str) -> tuple[str, ...]:
    """In the order of `PARTS`, each once."""
    names = {name.strip() for name in text.split(",")}
    unknown = sorted(names - set(PARTS))
    if unknown:
        raise argparse.ArgumentTypeError(f"expected parts of {', '.join(PARTS)}, got {', '.join(map(repr, unknown))}")
    return tuple(part for part in PARTS if part in names)


if __name__ == "__main__":
    sys.exit(main())
