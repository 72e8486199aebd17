"""`glassbus demo`: a realistic service on a durable bus, and everything that goes wrong in it.

`service.py` is the service, and is meant to be read; `world.py` is what it depends on; `feed.py` is what comes
in; the rest runs and shows it.
"""

from __future__ import annotations

import argparse

from glassbus.cli.common import number

_NOTES = """\
Input lines are JSON objects: a GitHub webhook {"event": ..., "payload": ...} goes to the topic github.<event>,
an object with a valid "topic" to that topic, any other to input.record. With --seconds an input that ends early is
replayed from its start; without, it is read once. Without --input the demo makes up its own and runs until Ctrl-C.

/metrics, /healthz and /readyz are served at $GLASSBUS_HTTP (default 127.0.0.1:9464, or a free port when that is in
use). With OTEL_EXPORTER_OTLP_ENDPOINT set, traces are exported there.

Exit status: 0 when the ledger balances, the audit finds nothing wrong and a --fault had the consequences it must have;
1 when not, 2 when it could not run.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _NOTES
    parser.add_argument("--input", metavar="FILE", help="JSON lines to publish; - for stdin (default: made up)")
    parser.add_argument(
        "--seconds", type=number(0, 1e7, above=True), metavar="N", help="take messages in for N seconds, then end"
    )
    parser.add_argument(
        "--rate", type=number(0, 10_000, above=True), default=20.0, metavar="N", help="records a second (default: 20)"
    )
    parser.add_argument(
        "--url", metavar="URL", help="the bus, such as sqlite:///demo.db (default: a file in a fresh temporary folder)"
    )
    parser.add_argument("--plain", action="store_true", help="plain lines instead of a live screen")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="seed of what is made up (default: 1)")
    parser.add_argument(
        "--serve",
        nargs="?",
        const="",
        metavar="HOST:PORT",
        help="insist on serving /metrics, there if given: an error when that cannot be done",
    )
    parser.add_argument(
        "--fault",
        metavar="NAME",
        help="have this go wrong, in place of the outage that the demo makes up ('glassbus faults list' names them)",
    )
    parser.add_argument("--allow-crash", action="store_true", help="allow --fault crash, which kills this process")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from glassbus.cli.demo.conductor import Options, conduct

    return conduct(
        Options(
            source=arguments.input,
            seconds=arguments.seconds,
            rate=arguments.rate,
            url=arguments.url,
            plain=arguments.plain,
            seed=arguments.seed,
            serve=arguments.serve,
            fault=arguments.fault,
            allow_crash=arguments.allow_crash,
        )
    )
