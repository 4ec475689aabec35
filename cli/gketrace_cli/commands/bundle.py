"""``gketrace bundle``: saves what an answer needs, to be asked later and elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from gketrace.errors import ExitCode, UsageError
from gketrace_cli.options import Options

if TYPE_CHECKING:
    from gketrace_cli.bundle.model import Bundle
    from gketrace_cli.session import Session

__all__ = ["bundle"]


def bundle(
    options: Options,
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[SERVICE|pod/NAME]",
            help="Whose pods' namespaces are saved; all, with -A.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write it.")
    ] = None,
    redact: Annotated[
        bool, typer.Option("--redact", help="Mask addresses and names, the same way everywhere.")
    ] = False,
) -> None:
    """Save the objects, and each node's rules, routes and connections, in one file.

    It never holds secrets; docs/bundles.md lists what it holds. Commands answer from it with
    --bundle FILE, and gketrace diff compares two.

    For example:  gketrace bundle -A -o before.gkt
    """
    from gketrace_cli.bundle.record import record
    from gketrace_cli.bundle.store import write_bundle
    from gketrace_cli.session import Session

    if not output:
        raise UsageError("bundle needs -o FILE")
    if (what is None) == (not options.all_namespaces):
        raise UsageError(
            "bundle takes a Service, a pod, or -A for everything",
            hint="for example: gketrace bundle -A -o all.gkt",
        )
    with Session(options) as session:
        scope = ("-A",) if what is None else (what,)
        inside = None if what is None else _pods_of(session, what)
        saved = record(session, scope, inside)
        session.progress.clear()
    if redact:
        from gketrace_cli.bundle.redact import redact_bundle

        saved = redact_bundle(saved)
    size = write_bundle(saved, output)
    gaps = _gaps(saved)
    print(  # noqa: T201
        f"{output}: {len(saved.nodes)} nodes, "
        f"{sum(len(node.pods) for node in saved.nodes.values())} pods, {size >> 10} KiB"
    )
    for text in gaps:
        print(f"not saved: {text}", file=sys.stderr)  # noqa: T201
    raise typer.Exit(int(ExitCode.PARTIAL if gaps else ExitCode.OK))


def _pods_of(session: Session, what: str) -> frozenset[str]:
    """The pods that the answer meets: the one named; or a Service's endpoints."""
    from gketrace_cli.commands.service import find_service, parse_service_name
    from gketrace_cli.find_pod import find_pod
    from gketrace_cli.names import parse_pod_name

    if what.startswith(("pod/", "pods/", "po/")):
        namespace, name = parse_pod_name(what, session.namespace)
        return frozenset({find_pod(session, namespace, name).key})
    namespace, name = parse_service_name(what, session.namespace)
    _, endpoints = find_service(session, namespace, name)
    return frozenset(one.pod_key for one in endpoints if one.pod)


def _gaps(saved: Bundle) -> list[str]:
    """What could not be read, one line each."""
    from gketrace.errors import GketraceError

    found = [f"{name}: {one.error.message}" for name, one in saved.lists.items() if one.error]
    for name, node in saved.nodes.items():
        errors: list[tuple[str, object]] = [("agent", node.error), ("node", node.snapshot_error)]
        errors += [(f"pod {key}", reply) for key, reply in node.pods.items()]
        for key, table in node.tables.items():
            errors += [(f"connections of {key or 'the node'}", table.entries_error)]
        found += [
            f"{name}: {what}: {error.message}"
            for what, error in errors
            if isinstance(error, GketraceError)
        ]
    return found
