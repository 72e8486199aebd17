"""`glassbus export`: what ships with the package, written out for those who run it."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from glassbus.cli.common import EXIT_OK, CommandError, count, printable
from glassbus.export import DASHBOARDS_URL, KINDS, RUNBOOKS_URL, Kubernetes, Links, Written, exported, write

_NOTES = """\
dashboards  JSON for Grafana                                    --kubernetes: a ConfigMap each, label grafana_dashboard
alerts      rules, Alertmanager's routes, a runbook an alert    --kubernetes: a PrometheusRule; apply routes yourself
collector   otel-collector.yaml                                 --kubernetes: a ConfigMap
compose     the whole stack with the demo: then `docker compose up --build --detach` in DIR

Files in DIR that differ from what would be written are left alone, and nothing is written, unless --force.
Exit status: 0 done, 2 when it could not be done.
"""
#: Folders with more files than this are told by their number.
_LISTED_MAX = 12


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _NOTES
    parser.add_argument("kind", choices=KINDS, metavar="|".join(KINDS), help="what to write")
    parser.add_argument("folder", type=Path, metavar="DIR", help="where; made if it is missing")
    parser.add_argument(
        "--runbooks-url",
        default=RUNBOOKS_URL,
        metavar="URL",
        help="where runbooks are: /ALERT is appended, or put where the URL has {alert} "
        "(default: %(default)s, which the demo serves)",
    )
    parser.add_argument(
        "--dashboards-url", default=DASHBOARDS_URL, metavar="URL", help="where Grafana is (default: %(default)s)"
    )
    parser.add_argument("--kubernetes", action="store_true", help="objects for kubectl apply instead of plain files")
    parser.add_argument("--namespace", default="", metavar="NAME", help="of these objects (default: that of kubectl)")
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a further label of these objects, such as the one by which your Prometheus selects its rules; repeatable",
    )
    parser.add_argument("--force", action="store_true", help="replace files that differ")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if not arguments.kubernetes and (arguments.namespace or arguments.label):
        raise CommandError("--namespace and --label are for objects of Kubernetes: give --kubernetes too")
    kubernetes = (
        Kubernetes(namespace=arguments.namespace, labels=dict(_label(text) for text in arguments.label))
        if arguments.kubernetes
        else None
    )
    links = Links(runbooks=arguments.runbooks_url, dashboards=arguments.dashboards_url)
    files = exported(arguments.kind, links, kubernetes)
    try:
        written = write(files, arguments.folder, force=arguments.force)
    except OSError as error:
        where = error.filename or arguments.folder
        raise CommandError(f"{printable(str(where))} cannot be written: {error.strerror or error}") from None
    _tell(written, arguments.folder)
    return EXIT_OK


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise CommandError(f"--label {text!r} is not KEY=VALUE")
    return key, value


def _tell(written: Written, folder: Path) -> None:
    tops = Counter(_top(name) for name in written.made)
    for name in written.made:
        if tops[_top(name)] <= _LISTED_MAX:
            print(f"wrote {printable(str(folder / name))}")
    for top, files in tops.items():
        if files > _LISTED_MAX:
            print(f"wrote {printable(str(folder / top))}/ ({count(files, 'file')})")
    if written.unchanged:
        print(f"{count(len(written.unchanged), 'file was', 'files were')} as they must be already")


def _top(name: str) -> str:
    return name.rpartition("/")[0].partition("/")[0]
