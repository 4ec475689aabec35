"""What people type → who is meant: nodes by suffix or address, ``pod/NAME``, ``[fd00::1]:80/udp``.

Pure: the objects come in as arguments.  A miss raises with the names that come close.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from ipaddress import ip_address
from typing import Final

from gketrace.errors import GketraceError, NotFoundError, UsageError
from gketrace.objects import Node
from gketrace.packet import IPAddress, protocol_number

__all__ = [
    "Kind",
    "Named",
    "close_names",
    "find_node",
    "node_of_address",
    "parse_named",
    "parse_pod_name",
    "short_names",
    "with_close_names",
]


class Kind(Enum):
    """What a name is the name of."""

    POD = "pod"
    SERVICE = "service"
    NODE = "node"
    ADDRESS = "address"


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """One end of a trace as it was typed."""

    kind: Kind
    text: str
    """As typed."""
    name: str = ""
    namespace: str = ""
    """Empty: the command's."""
    address: IPAddress | None = None
    """For `Kind.ADDRESS`."""
    port: str = ""
    """Number or name; empty: not given."""
    protocol: int | None = None
    """IANA number; None: not given."""


_KINDS: Final[Mapping[str, Kind]] = {
    **dict.fromkeys(("pod", "pods", "po"), Kind.POD),
    **dict.fromkeys(("service", "services", "svc"), Kind.SERVICE),
    **dict.fromkeys(("node", "nodes", "no"), Kind.NODE),
}
_PROTOCOLS: Final = frozenset({"tcp", "udp", "sctp", "icmp", "icmpv6"})
_PORT: Final = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
_FORMS: Final = "use pod/NAME, svc/NAME, node/NAME or an IP address; [ADDRESS]:PORT for IPv6"


def parse_named(text: str) -> Named:
    """``pod/web-0``, ``svc/shop/web:http``, ``node/2jdh:31830``, ``10.0.0.1:53/udp``, ``[::1]:80``.

    Raises `UsageError`.
    """
    body, protocol = text, None
    head, slash, last = text.rpartition("/")
    if slash and last.lower() in _PROTOCOLS and head.lower() not in _KINDS:
        body, protocol = head, protocol_number(last)
    address = _split_address(body)
    if address is not None:
        ip, port = address
        return Named(
            kind=Kind.ADDRESS, text=text, address=ip, port=_port(port, text), protocol=protocol
        )
    kind_text, slash, rest = body.partition("/")
    kind = _KINDS.get(kind_text.lower())
    if not slash or kind is None:
        raise UsageError(f"cannot tell what {text!r} is", hint=_FORMS)
    by_address = _split_address(rest) if kind is Kind.NODE else None
    if by_address is not None:
        rest, port = str(by_address[0]), by_address[1]
    else:
        rest, _, port = rest.partition(":")
    namespace, _, name = rest.rpartition("/")
    if kind is Kind.NODE and namespace:
        raise UsageError(f"{text!r}: a node has no namespace", hint="use node/NAME")
    good = bool(_NAME.fullmatch(name)) and (not namespace or bool(_NAME.fullmatch(namespace)))
    if not good and by_address is None:
        raise UsageError(f"{text!r} is no name of a {kind.value}", hint=_FORMS)
    return Named(
        kind=kind,
        text=text,
        name=name,
        namespace=namespace,
        port=_port(port, text),
        protocol=protocol,
    )


def _port(port: str, text: str) -> str:
    if not port:
        return ""
    good = 0 < int(port) < 65536 if port.isdigit() else _PORT.fullmatch(port) is not None
    if not good:
        raise UsageError(f"{text!r}: {port!r} is no port", hint="1 to 65535, or a port's name")
    return port


def _split_address(text: str) -> tuple[IPAddress, str] | None:
    """``10.0.0.1:80`` → (address, ``"80"``); None when it does not begin with an address."""
    bracketed = re.fullmatch(r"\[([^\]]+)\](?::(.*))?", text)
    if bracketed:
        try:
            return ip_address(bracketed[1]), bracketed[2] or ""
        except ValueError:
            raise UsageError(f"not an IP address: {bracketed[1]!r}") from None
    for host, port in ((text, ""), tuple(text.rpartition(":")[::2])):
        try:
            found = ip_address(host)
        except ValueError:
            continue
        if port and found.version == 6:
            raise UsageError(f"{text!r}: which part is the port?", hint=f"write [{host}]:{port}")
        return found, port
    return None


def parse_pod_name(text: str, namespace: str) -> tuple[str, str]:
    """``NAME``, ``pod/NAME``, ``NS/NAME`` or ``pod/NS/NAME`` → (namespace, name).

    Raises `UsageError`.
    """
    parts = text.split("/")
    if len(parts) > 1 and _KINDS.get(parts[0].lower()) is Kind.POD:
        parts = parts[1:]
    elif len(parts) > 1 and parts[0].lower() in _KINDS and len(parts) == 2:
        raise UsageError(f"{text!r} is not a pod", hint="use gketrace service or gketrace trace")
    if len(parts) > 2 or not all(_NAME.fullmatch(part) for part in parts):
        raise UsageError(f"{text!r} is no name of a pod", hint="use NAME or NAMESPACE/NAME")
    return (parts[0], parts[1]) if len(parts) == 2 else (namespace, parts[0])


def node_of_address(address: IPAddress, nodes: Iterable[Node]) -> Node | None:
    """The node that owns the address, by its status."""
    text = str(address)
    return next((n for n in nodes if text in n.internal_ips or text in n.external_ips), None)


def find_node(text: str, nodes: Sequence[Node]) -> Node:
    """By full name, address or unique suffix.  Raises `NotFoundError`, `UsageError`."""
    for node in nodes:
        if text in (node.name, node.hostname, *node.internal_ips, *node.external_ips):
            return node
    matches = [node for node in nodes if node.name.endswith(text)] if text else []
    exact = [node for node in matches if node.name.endswith(f"-{text}")]
    for unique in (exact, matches):
        if len(unique) == 1:
            return unique[0]
    if matches:
        names = ", ".join(node.name for node in matches[:5])
        raise UsageError(f"node {text!r} is not unique", hint=f"it fits {names}")
    raise NotFoundError(
        f"no node {text!r} in the cluster", hint=close_names(text, [n.name for n in nodes])
    )


def short_names(nodes: Iterable[str]) -> dict[str, str]:
    """Node name → its shortest unique suffix after a dash; the name itself when there is none."""
    names = list(nodes)
    short = {}
    for name in names:
        short[name] = name
        parts = name.split("-")
        for count in range(1, len(parts)):
            suffix = "-".join(parts[-count:])
            if sum(1 for other in names if other.endswith(suffix)) == 1:
                short[name] = suffix
                break
    return short


def close_names(text: str, names: Iterable[str]) -> str:
    """A hint with the names that come close to `text`, or with all when they are few."""
    known = sorted(set(names))
    if not known:
        return "there is none"
    close = [n for n in known if text and (n.startswith(text) or text in n)]
    close += [n for n in difflib.get_close_matches(text, known, n=3) if n not in close]
    if close:
        more = f" and {len(close) - 5} more" if len(close) > 5 else ""
        return f"did you mean {', '.join(close[:5])}{more}?"
    if len(known) <= 5:
        return f"there is {', '.join(known)}"
    return f"there are {len(known)}, none with a name like it"


def with_close_names(
    error: GketraceError, text: str, names: Iterable[str], where: str
) -> NotFoundError:
    """`error` again, with the names that come close as its hint."""
    return NotFoundError(error.message, hint=f"{where}: {close_names(text, names)}")
