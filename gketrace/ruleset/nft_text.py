"""nftables' JSON → the syntax in which ``nft list ruleset`` prints it.

Source: src/json.c and the ``*_print`` functions of nftables 1.0.6; libnftables-json(5).  What has
no form here is printed as its JSON, so that nothing of a rule is lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

__all__ = ["element_text", "expression_text", "rule_text", "statement_text"]

Json: TypeAlias = Any

_BARE_META: Final = frozenset(("iif", "iifname", "iifgroup", "oif", "oifname", "oifgroup"))
_QUOTED: Final = frozenset(
    ("iif", "iifname", "oif", "oifname", "iifgroup", "oifgroup", "iifkind", "oifkind", "ibrname",
     "obrname", "hour", "day", "time", "helper", "name", "sdifname")
)  # fmt: skip
_HEX: Final = {"mark": 8, "dscp": 2, "@": 1}
"""Digits of constants that are printed in hexadecimal."""
_BINARY: Final = frozenset(("&", "|", "^", "<<", ">>"))
_FLAGS: Final = frozenset(("flags", "state", "status"))
_DEFAULT_REJECT: Final[dict[str, Json]] = {
    "ip": {"reject": {"type": "icmp", "expr": "port-unreachable"}},
    "ip6": {"reject": {"type": "icmpv6", "expr": "port-unreachable"}},
}


_MISFITS: Final = (
    KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration, RecursionError,
)  # fmt: skip
"""What comes of JSON of another shape than libnftables-json(5) has."""


def rule_text(statements: Sequence[Json], comment: str = "", family: str = "inet") -> str:
    """A whole rule; `family` is its table's, which decides what goes without saying."""
    default = _DEFAULT_REJECT.get(family)
    parts = [
        "reject" if statement == default else statement_text(statement) for statement in statements
    ]
    if comment:
        parts.append(f'comment "{comment}"')
    return " ".join(part for part in parts if part)


def statement_text(statement: Json) -> str:
    if not isinstance(statement, dict) or len(statement) != 1:
        return json.dumps(statement)
    ((kind, body),) = statement.items()
    write = _STATEMENTS.get(kind)
    if write is None:
        return json.dumps(statement)
    try:
        return write(kind, body)
    except _MISFITS:
        # Another shape than the schema's: shown as it is.
        return json.dumps(statement)


def expression_text(value: Json, key: str = "") -> str:
    """An expression or constant; `key` names what it is compared with, which decides how
    constants are printed."""
    if isinstance(value, bool):
        return "exists" if value else "missing"
    if isinstance(value, int):
        return f"0x{value:0{_HEX[key]}x}" if key in _HEX else str(value)
    if isinstance(value, str):
        return f'"{value}"' if key in _QUOTED and not value.startswith("@") else value
    if isinstance(value, list):
        return ",".join(expression_text(item, key) for item in value)
    if not isinstance(value, dict) or len(value) != 1:
        return json.dumps(value)
    ((kind, body),) = value.items()
    if kind in _BINARY:
        inner = _key_of(body[0]) or key
        return f" {kind} ".join(expression_text(part, inner) for part in body)
    write = _EXPRESSIONS.get(kind)
    return json.dumps(value) if write is None else write(body, key)


def _key_of(expression: Json) -> str:
    """What decides how constants beside `expression` are printed."""
    if not isinstance(expression, dict) or len(expression) != 1:
        return ""
    ((kind, body),) = expression.items()
    if kind in ("meta", "ct", "socket", "osf"):
        return str(body["key"])
    if kind == "fib":
        return "iifname" if body["result"] in ("oif", "oifname") else ""
    if kind == "payload":
        return str(body.get("field", "@"))
    if kind in _BINARY:
        return _key_of(body[0])
    return ""


def _payload(body: Json, _: str) -> str:
    if "base" in body:
        return f"@{body['base']},{body['offset']},{body['len']}"
    return f"{body['protocol']} {body['field']}"


def _meta(body: Json, _: str) -> str:
    return body["key"] if body["key"] in _BARE_META else f"meta {body['key']}"


def _ct(body: Json, _: str) -> str:
    direction = f"{body['dir']} " if "dir" in body else ""
    family = f"{body['family']} " if "family" in body else ""
    return f"ct {direction}{family}{body['key']}"


def _fib(body: Json, _: str) -> str:
    return f"fib {' . '.join(_listed(body['flags']))} {body['result']}"


def _numgen(body: Json, _: str) -> str:
    offset = f" offset {body['offset']}" if body.get("offset") else ""
    return f"numgen {body['mode']} mod {body['mod']}{offset}"


def _hash(name: str) -> Callable[[Json, str], str]:
    def write(body: Json, _: str) -> str:
        of = f" {expression_text(body['expr'])}" if "expr" in body else ""
        seed = f" seed 0x{body['seed']:x}" if body.get("seed") else ""
        offset = f" offset {body['offset']}" if body.get("offset") else ""
        return f"{name}{of} mod {body['mod']}{seed}{offset}"

    return write


def _prefix(body: Json, key: str) -> str:
    return f"{expression_text(body['addr'], key)}/{body['len']}"


def _range(body: Json, key: str) -> str:
    return f"{expression_text(body[0], key)}-{expression_text(body[1], key)}"


def _concat(body: Json, _: str) -> str:
    return " . ".join(expression_text(part, "") for part in body)


def _set(body: Json, key: str) -> str:
    return "{ " + ", ".join(element_text(item, key) for item in _items(body)) + " }"


def element_text(item: Json, key: str = "", data_key: str = "") -> str:
    """One element of a set, or ``[key, data]`` of a map; JSON of another shape as it is."""
    try:
        return _element(item, key, data_key)
    except _MISFITS:
        return json.dumps(item)


def _element(item: Json, key: str, data_key: str) -> str:
    if isinstance(item, list) and len(item) == 2:
        return f"{element_text(item[0], key)} : {_data(item[1], data_key)}"
    if isinstance(item, dict) and "elem" in item:
        body = item["elem"]
        text = expression_text(body["val"], key)
        text += f" timeout {body['timeout']}s" if "timeout" in body else ""
        text += f" expires {body['expires']}s" if "expires" in body else ""
        return text + (f' comment "{body["comment"]}"' if "comment" in body else "")
    return expression_text(item, key)


def _data(value: Json, key: str) -> str:
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in _VERDICTS:
        return statement_text(value)
    return expression_text(value, key)


def _map(body: Json, key: str) -> str:
    return f"{expression_text(body['key'])} map {_mapping(body, key)}"


def _mapping(body: Json, data_key: str = "") -> str:
    data = body["data"]
    if isinstance(data, str):
        return data
    key = _key_of(body["key"])
    inner = ", ".join(element_text(item, key, data_key) for item in _items(data["set"]))
    return "{ " + inner + " }"


def _elem(body: Json, key: str) -> str:
    return element_text({"elem": body}, key)


def _named(name: str) -> Callable[[Json, str], str]:
    """``tcp option``, ``exthdr`` and their like."""

    def write(body: Json, _: str) -> str:
        if "base" in body:
            return f"@{body['base']},{body['offset']},{body['len']}"
        field = f" {body['field']}" if "field" in body else ""
        if name == "exthdr" and field:
            return f"{body['name']}{field}"
        return f"{name} {body['name']}{field}"

    return write


def _rt(body: Json, _: str) -> str:
    family = f"{body['family']} " if "family" in body else ""
    return f"rt {family}{body['key']}"


_EXPRESSIONS: Final[dict[str, Callable[[Json, str], str]]] = {
    "payload": _payload,
    "meta": _meta,
    "ct": _ct,
    "fib": _fib,
    "numgen": _numgen,
    "jhash": _hash("jhash"),
    "symhash": _hash("symhash"),
    "prefix": _prefix,
    "range": _range,
    "concat": _concat,
    "set": _set,
    "map": _map,
    "elem": _elem,
    "tcp option": _named("tcp option"),
    "ip option": _named("ip option"),
    "sctp chunk": _named("sctp chunk"),
    "exthdr": _named("exthdr"),
    "rt": _rt,
    "socket": lambda body, _: f"socket {body['key']}",
    "osf": lambda body, _: f"osf {body['key']}",
}


def _match(_: str, body: Json) -> str:
    left, op, right = body["left"], body["op"], body["right"]
    key = _key_of(left)
    binary = isinstance(left, dict) and next(iter(left)) in _BINARY
    if (
        binary
        and op == "=="
        and next(iter(left)) == "&"
        and isinstance(left["&"][1], list)
        and not isinstance(right, bool)
    ):
        mask = expression_text(left["&"][1], key)
        return f"{expression_text(left['&'][0])} {expression_text(right, key)} / {mask}"
    plain = op == "in" or (op == "==" and not binary)
    if op == "==" and key in _FLAGS and isinstance(right, str) and not right.startswith("@"):
        plain = False
    sign = " " if plain else f" {op} "
    return f"{expression_text(left)}{sign}{expression_text(right, key)}"


def _mangle(_: str, body: Json) -> str:
    key = _key_of(body["key"])
    return f"{expression_text(body['key'])} set {expression_text(body['value'], key)}"


def _vmap(_: str, body: Json) -> str:
    return f"{expression_text(body['key'])} vmap {_mapping(body)}"


def _verdict(kind: str, body: Json) -> str:
    return f"{kind} {body['target']}" if isinstance(body, dict) else kind


def _counter(kind: str, body: Json) -> str:
    if body is None:
        return kind
    if isinstance(body, dict) and "packets" in body:
        return f"counter packets {body['packets']} bytes {body['bytes']}"
    return f"{kind} name {_object(body)}"


def _object(body: Json) -> str:
    return f'"{body}"' if isinstance(body, str) else expression_text(body)


def _limit(kind: str, body: Json) -> str:
    if not isinstance(body, dict) or "rate" not in body:
        return f"limit name {_object(body)}"
    over = "over " if body.get("inv") else ""
    unit = body.get("rate_unit", "packets")
    rate = f"{body['rate']}" if unit == "packets" else f"{body['rate']} {unit}"
    text = f"limit rate {over}{rate}/{body['per']}"
    if body.get("burst") and (body["burst"] != 5 or unit != "packets"):
        text += f" burst {body['burst']} {body.get('burst_unit', 'packets')}"
    return text


def _quota(kind: str, body: Json) -> str:
    if not isinstance(body, dict) or "val" not in body:
        return f"quota name {_object(body)}"
    over = "over " if body.get("inv") else ""
    return f"quota {over}{body['val']} {body.get('val_unit', 'bytes')}"


def _log(_: str, body: Json) -> str:
    text = "log"
    for name, value in (body or {}).items():
        if name == "prefix":
            text += f' prefix "{value}"'
        else:
            text += f" {name} {expression_text(value)}"
    return text


def _reject(_: str, body: Json) -> str:
    if not body:
        return "reject"
    kind, code = body.get("type"), body.get("expr")
    if kind == "icmpx" and code == "port-unreachable":
        return "reject"
    if code is None:
        return f"reject with {kind}"
    return f"reject with {kind} {expression_text(code)}"


def _nat(kind: str, body: Json) -> str:
    body = body or {}
    text = kind
    if "family" in body:
        text += f" {body['family']}"
    prefix = "prefix" in _listed(body.get("type_flags", ()))
    text += " prefix" if prefix else ""
    address, port = body.get("addr"), body.get("port")
    if address is not None or port is not None:
        text += " to "
    if address is not None:
        where = expression_text(address)
        text += f"[{where}]" if port is not None and ":" in where else where
    if port is not None:
        text += f":{expression_text(port)}"
    flags = [flag for flag in _listed(body.get("flags", ())) if flag != "netmap"]
    return text + (f" {','.join(flags)}" if flags else "")


def _dynamic(_: str, body: Json) -> str:
    element = element_text(body["elem"])
    if "data" in body:
        element += f" : {_data(body['data'], '')}"
    inner = " ".join([element, *(statement_text(s) for s in body.get("stmt", ()))])
    return f"{body['op']} {body.get('set') or body.get('map')} {{ {inner} }}"


def _ct_count(_: str, body: Json) -> str:
    return f"ct count {'over ' if body.get('inv') else ''}{body['val']}"


def _queue(_: str, body: Json) -> str:
    if not body:
        return "queue"
    flags = f" flags {','.join(_listed(body['flags']))}" if "flags" in body else ""
    return f"queue{flags} to {expression_text(body.get('num', 0))}"


def _tproxy(_: str, body: Json) -> str:
    family = f"{body['family']} " if "family" in body else ""
    address = expression_text(body["addr"]) if "addr" in body else ""
    port = f":{expression_text(body['port'])}" if "port" in body else ""
    return f"tproxy {family}to {address}{port}"


def _synproxy(_: str, body: Json) -> str:
    if not isinstance(body, dict):
        return "synproxy" if body is None else f"synproxy name {_object(body)}"
    parts = [f"{name} {body[name]}" for name in ("mss", "wscale") if name in body]
    return " ".join(["synproxy", *parts, *_listed(body.get("flags", ()))])


def _xt(_: str, body: Json) -> str:
    if isinstance(body, dict):
        return f"xt {body.get('type', '')} {body.get('name', '')}".strip()
    return "xt"


_VERDICTS: Final = frozenset(("accept", "drop", "continue", "return", "jump", "goto"))
_STATEMENTS: Final[dict[str, Callable[[str, Json], str]]] = {
    **dict.fromkeys(_VERDICTS, _verdict),
    "match": _match,
    "mangle": _mangle,
    "vmap": _vmap,
    "counter": _counter,
    "limit": _limit,
    "quota": _quota,
    "log": _log,
    "reject": _reject,
    **dict.fromkeys(("dnat", "snat", "masquerade", "redirect"), _nat),
    "set": _dynamic,
    "map": _dynamic,
    "notrack": lambda kind, _: kind,
    "ct count": _ct_count,
    "ct helper": lambda kind, body: f"ct helper set {_object(body)}",
    "ct timeout": lambda kind, body: f"ct timeout set {_object(body)}",
    "ct expectation": lambda kind, body: f"ct expectation set {_object(body)}",
    "flow": lambda _, body: f"flow {body['op']} {body['flowtable']}",
    "dup": lambda _, body: (
        f"dup to {expression_text(body['addr'])}"
        + (f" device {expression_text(body['dev'])}" if "dev" in body else "")
    ),
    "fwd": lambda _, body: f"fwd to {expression_text(body['dev'])}",
    "queue": _queue,
    "tproxy": _tproxy,
    "synproxy": _synproxy,
    "xt": _xt,
    "last": lambda kind, _: kind,
}


def _items(body: Json) -> list[Json]:
    return body if isinstance(body, list) else [body]


def _listed(value: Json) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
