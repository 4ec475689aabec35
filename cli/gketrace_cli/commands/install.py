"""``gketrace install`` and ``gketrace uninstall``: all that a cluster needs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gketrace_cli.options import Options, Output

if TYPE_CHECKING:
    from gketrace_cli.cluster import Cluster
    from gketrace_cli.installation import Change

__all__ = ["install", "uninstall"]


def install(
    options: Options,
    apply: Annotated[
        bool, typer.Option("--apply", help="Put it into the cluster (default: print it).")
    ] = False,
    image: Annotated[str, typer.Option("--image", metavar="NAME", help="The agents' image.")] = "",
    renew: Annotated[
        bool,
        typer.Option("--renew", help="A new certificate, even if the old one is good."),
    ] = False,
) -> None:
    """Print, or apply, all that a cluster needs: namespace, roles, certificate, agents.

    It may be run again: it changes what differs, and renews the certificate when that ends within
    60 days.  What is printed without --apply has a new private key in it.

    For example:  gketrace install --apply --image registry.example/gketrace-agent:0.1.0
    """
    from gketrace_cli.installation import certificate_objects, manifests
    from gketrace_cli.render.documents import dump
    from gketrace_cli.render.layout import write

    options.check_own_namespace("install")
    namespace = options.agents_in
    objects = manifests(namespace=namespace, image=image)
    if not apply:
        objects += certificate_objects(None, namespace)
        if options.format is Output.JSON:
            listed = {"apiVersion": "v1", "kind": "List", "items": objects}
            write(dump(listed, Output.JSON))
        else:
            write("---\n".join(dump(one, Output.YAML) for one in objects))
        return
    # The certificate goes before the DaemonSet, whose pods wait for it.
    last = [one for one in objects if one["kind"] == "DaemonSet"]
    with _open(options) as cluster:
        changes = [_apply(options, cluster, one) for one in objects if one not in last]
        secret = certificate_objects(cluster.api, namespace, renew=renew)
        changes += [_apply(options, cluster, one) for one in (*secret, *last)]
    _finish(options, changes)


def uninstall(
    options: Options,
    apply: Annotated[
        bool, typer.Option("--apply", help="Remove it (default: print what would be removed).")
    ] = False,
) -> None:
    """Remove from the cluster what 'gketrace install' put there.

    For example:  gketrace uninstall --apply
    """
    from gketrace_cli.installation import manifests, remove
    from gketrace_cli.render.layout import write

    options.check_own_namespace("uninstall")
    namespace = options.agents_in
    if not apply:
        for one in manifests(namespace=namespace):
            where = one["metadata"].get("namespace")
            write(f"{one['kind']} {one['metadata']['name']}{f' in {where}' if where else ''}\n")
        write(f"and the certificate in {namespace}; --apply removes them\n")
        return
    changes = []
    with _open(options) as cluster:
        for change in remove(cluster.api, namespace):
            _tell(options, change)
            changes.append(change)
    _finish(options, changes)


def _open(options: Options) -> Cluster:
    from gketrace_cli.cluster import Cluster

    return Cluster.open(
        kubeconfig=options.kubeconfig or "",
        context=options.context or "",
        timeout=options.seconds,
    )


def _apply(options: Options, cluster: Cluster, wanted: dict[str, Any]) -> Change:
    from gketrace_cli.installation import apply_object

    change = apply_object(cluster.api, wanted)
    _tell(options, change)
    return change


def _tell(options: Options, change: Change) -> None:
    from gketrace_cli.render.layout import write

    if not options.format.machine:
        write(f"{change}\n")


def _finish(options: Options, changes: list[Change]) -> None:
    from gketrace_cli.render.documents import dump, envelope
    from gketrace_cli.render.layout import write

    if options.format.machine:
        listed = [asdict(change) for change in changes]
        write(dump(envelope("Installation", {"changes": listed}), options.format))
