"""The pod that somebody means: by its name, or by its workload's.

``hello-server`` is the pod ``hello-server-579859fb5b-szrwh`` as long as it is the only one whose
name Kubernetes made of that; with several, they are named and nothing is chosen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NoReturn

from gketrace.errors import GketraceError, GoneError, NotFoundError, UsageError
from gketrace_cli.names import close_names, parse_pod_name

if TYPE_CHECKING:
    from gketrace.objects import Pod
    from gketrace_cli.session import Session

__all__ = ["find_pod", "find_pod_named", "pods_of_workload", "refuse_ended"]

_ALPHABET: Final = "[bcdfghjklmnpqrstvwxz2456789]"
_MADE: Final = re.compile(rf"-\d+|(-{_ALPHABET}{{6,10}}|-\d+)?-{_ALPHABET}{{5}}")
"""What a controller puts behind its name: an ordinal (StatefulSet); or five letters (DaemonSet,
ReplicaSet, Job), after a hash of the pod template (Deployment) or a number (CronJob, indexed Job).

Source: k8s.io/apimachinery/pkg/util/rand String(), SafeEncodeString().
"""
_OVER: Final = frozenset({"Succeeded", "Failed"})


def find_pod_named(session: Session, text: str) -> Pod:
    """By ``NAME``, ``pod/NAME`` or ``NAMESPACE/NAME``; with ``-A`` in any namespace.

    Raises `NotFoundError` with the names that come close; `UsageError`; `GketraceError`.
    """
    namespace, name = parse_pod_name(text, session.namespace)
    if not session.options.all_namespaces or "/" in text.removeprefix("pod/"):
        return find_pod(session, namespace, name)
    listed = session.cluster.pods()
    found = [one for one in listed if one.name == name] or pods_of_workload(name, listed)
    return _only(found, name) or _missing(name, "any namespace", listed)


def find_pod(session: Session, namespace: str, name: str) -> Pod:
    """Raises: `NotFoundError` with the names that come close; `UsageError`; `GketraceError`."""
    try:
        return session.cluster.pod(namespace, name)
    except NotFoundError as error:
        absent = session.check_namespace(namespace)
        if absent is not None:
            raise absent from error
        try:
            listed = session.cluster.pods(namespace)
        except GketraceError:  # the rest is a courtesy; the answer is that there is no such pod
            raise error from None
    found = _only(pods_of_workload(name, listed), name)
    return found or _missing(name, f'namespace "{namespace}"', listed)


def refuse_ended(pod: Pod) -> None:
    """Raises `GoneError` for a pod that is over: another one may have its addresses by now."""
    if pod.phase in _OVER:
        why = f" ({pod.reason})" if pod.reason else ""
        raise GoneError(f"pod {pod.key} has ended: {pod.phase}{why}; its network is gone")


def pods_of_workload(name: str, pods: Sequence[Pod]) -> list[Pod]:
    """Those whose names Kubernetes made of the workload's `name`; pods that are over, or are being
    deleted, only where there is no other."""
    made = [
        one
        for one in pods
        if one.name.startswith(f"{name}-") and _MADE.fullmatch(one.name[len(name) :])
    ]
    live = [one for one in made if one.phase not in _OVER and not one.deletion_timestamp]
    return live or made


def _only(found: Sequence[Pod], name: str) -> Pod | None:
    if len(found) < 2:
        return found[0] if found else None
    spaces = sorted({one.namespace for one in found})
    if len(spaces) > 1:
        raise UsageError(
            f'pod "{name}" is in several namespaces', hint=f"-n one of {', '.join(spaces)}"
        )
    names = sorted(one.name for one in found)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    raise UsageError(
        f'"{name}" has {len(names)} pods in namespace "{spaces[0]}"',
        hint=f"name one: {', '.join(names[:5])}{more}",
    )


def _missing(name: str, where: str, listed: Sequence[Pod]) -> NoReturn:
    hint = close_names(name, [one.name for one in listed])
    raise NotFoundError(f'pod "{name}" not found in {where}', hint=hint)
