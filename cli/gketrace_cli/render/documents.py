"""Answers as JSON and YAML: the versioned documents that docs/schema describes.

Keys are camelCase.  A key is always there; what is not known is ``null``, and what does not apply
is ``null`` or an empty list, never a made-up value.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, Final

from gketrace.conntrack import ConntrackEntry
from gketrace.packet import Packet, Tuple5, protocol_name
from gketrace.trace import Citation, Flow, Hop, Missing, Path, Source, Step
from gketrace.utf8 import as_utf8
from gketrace_cli.options import Output

__all__ = [
    "API_VERSION",
    "dump",
    "envelope",
    "missing_document",
    "netns_text",
    "packet_document",
    "path_document",
    "probability",
]

API_VERSION: Final = "gketrace.dev/v1alpha1"

_RULES: Final = frozenset({Source.RULE, Source.POLICY})


def envelope(kind: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """``{apiVersion, kind, …}``."""
    return {"apiVersion": API_VERSION, "kind": kind, **body}


def dump(document: Mapping[str, Any], output: Output) -> str:
    """The document as text, in `Output.JSON` or `Output.YAML`: UTF-8, whatever rules say."""
    try:
        text = _dump(document, output)
        text.encode()
    except UnicodeEncodeError:
        return _dump(_as_utf8(document), output)
    return text


def _as_utf8(value: Any) -> Any:
    if isinstance(value, str):
        return as_utf8(value)
    if isinstance(value, Mapping):
        return {_as_utf8(key): _as_utf8(one) for key, one in value.items()}
    return [_as_utf8(one) for one in value] if isinstance(value, list | tuple) else value


def _dump(document: Mapping[str, Any], output: Output) -> str:
    if output is Output.YAML:
        import yaml

        # libyaml's is ten times as fast, and not everywhere.
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
        text: str = yaml.dump(
            dict(document), Dumper=dumper, sort_keys=False, allow_unicode=True, width=100
        )
        return text
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def probability(chance: Fraction | None) -> float | None:
    """Rounded to 12 digits, so that 1/3 and what the kernel holds (k/2^31) stay apart."""
    return None if chance is None else round(float(chance), 12)


def missing_document(items: Iterable[Missing]) -> list[dict[str, Any]]:
    return [
        {"what": m.what, "why": m.why, "node": m.node or None, "netns": m.netns or None}
        for m in items
    ]


def packet_document(packet: Packet) -> dict[str, Any]:
    """A port that is null is not known yet (the kernel picks it) or not there (ICMP)."""
    document: dict[str, Any] = {
        "src": str(packet.src),
        "dst": str(packet.dst),
        "protocol": protocol_name(packet.protocol),
        "sport": packet.sport,
        "dport": packet.dport,
        "mark": packet.mark,
    }
    if packet.icmp_type is not None:
        document |= {"icmpType": packet.icmp_type, "icmpCode": packet.icmp_code}
    return document


def netns_text(hop: Hop) -> str | None:
    """``host``, ``pod/NS/NAME``, ``netns/INODE``; None: the network between nodes."""
    if not hop.netns.node:
        return None
    text = str(hop.netns)
    kind, space, name = text.partition(" ")
    return f"{kind}/{name}" if space else text


def path_document(path: Path) -> dict[str, Any]:
    """One element of ``paths``; ``return`` is an element of the same shape, or null."""
    outcome = path.outcome
    return {
        "frontDoor": path.front_door,
        "from": path.source,
        "target": path.target,
        "probability": probability(path.chance),
        "probabilityExact": None if path.chance is None else str(path.chance),
        "because": list(path.because),
        "outcome": outcome.disposition.value,
        "detail": outcome.detail or None,
        "rejectWith": outcome.reject_with or None,
        "decidedBy": _citation(outcome.citation),
        "endpoint": path.endpoint or None,
        "sourceSeen": path.source_seen or None,
        "delivered": packet_document(outcome.packet) if path.source_seen else None,
        "missing": missing_document(path.missing),
        "flows": [_flow(flow) for flow in path.flows],
        "hops": [_hop(hop) for hop in path.hops],
        "return": None if path.reply is None else path_document(path.reply),
    }


def _hop(hop: Hop) -> dict[str, Any]:
    return {
        "node": hop.netns.node or None,
        "netns": netns_text(hop),
        "netnsInode": hop.netns.inode or None,
        "interface": hop.ingress.interface or None,
        "steps": [_step(step) for step in hop.steps],
    }


def _step(step: Step) -> dict[str, Any]:
    cited = step.citation
    rule = cited if cited is not None and cited.source in _RULES else None
    return {
        "kind": step.kind.value,
        "action": step.action.value,
        "hook": step.hook.value if step.hook else None,
        "table": rule.table if rule else None,
        "chain": rule.chain if rule else None,
        "position": (rule.position or None) if rule else None,
        "rule": rule.text if rule else None,
        "interface": step.interface or None,
        "nextHop": str(step.next_hop) if step.next_hop else None,
        "note": step.note or None,
        "citation": _citation(cited),
        "before": packet_document(step.before),
        "after": packet_document(step.after),
    }


def _citation(cited: Citation | None) -> dict[str, Any] | None:
    if cited is None:
        return None
    return {
        "source": cited.source.value,
        "text": cited.text,
        "backend": cited.backend or None,
        "table": cited.table or None,
        "chain": cited.chain or None,
        "position": cited.position or None,
        "handle": cited.handle,
        "packets": cited.packets,
        "bytes": cited.bytes,
    }


def _tuple(half: Tuple5) -> dict[str, Any]:
    return {
        "src": str(half.src),
        "dst": str(half.dst),
        "protocol": protocol_name(half.protocol),
        "sport": half.sport,
        "dport": half.dport,
    }


def _flow(flow: Flow) -> dict[str, Any]:
    entry: ConntrackEntry = flow.entry
    return {
        "node": flow.netns.node,
        "netns": str(flow.netns),
        "assumed": flow.assumed,
        "original": _tuple(entry.orig),
        "reply": _tuple(entry.reply),
        "dstNat": entry.dst_nat,
        "srcNat": entry.src_nat,
        "text": str(entry),
    }
