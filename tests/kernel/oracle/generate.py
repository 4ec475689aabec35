"""Random rule sets and packets that use every match and target that this kernel has.

Values come from small pools that packets draw from too, so that rules are hit.  Every base chain
jumps to user chains of its own hook: what a rule may do depends on the hooks it is reached from.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_interface

from gketrace.packet import Packet, Protocol, TcpFlags
from tests.kernel.oracle.bed import Bed
from tests.kernel.oracle.fixtures import Case

__all__ = ["HOOKS", "IPSETS", "MATCHES", "NFACCT", "TARGETS", "Generator", "probe_kernel"]

HOOKS = {
    "raw": ("PREROUTING", "OUTPUT"),
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
    "security": ("INPUT", "FORWARD", "OUTPUT"),
}
_INCOMING = ("PREROUTING", "INPUT", "FORWARD")
_OUTGOING = ("FORWARD", "OUTPUT", "POSTROUTING")
_LOCAL = ("OUTPUT", "POSTROUTING")
NFACCT = "gkoracle"

PORTS = (53, 80, 443, 8080, 31830)
ADDRESSES = {
    4: ("10.142.0.8", "10.142.0.6", "10.40.0.6", "10.40.0.10", "10.40.0.1", "203.0.113.10",
        "198.51.100.7", "10.43.240.10", "10.50.0.1", "8.8.8.8"),
    6: ("fd00:142::8", "fd00:142::6", "fd00:40::6", "fd00:40::10", "fd00:40::1", "2001:db8::10",
        "2001:db8:1::7", "fd00:43::10", "fd00:50::1", "2001:db8:8::8"),
}  # fmt: skip
INSIDE = {
    4: ("10.40.0.6", "10.40.0.10", "10.142.0.6"),
    6: ("fd00:40::6", "fd00:40::10", "fd00:142::6"),
}
NETS = {
    4: ("10.0.0.0/8", "10.40.0.0/24", "10.142.0.0/24", "203.0.113.0/24", "0.0.0.0/1", "128.0.0.0/1"),
    6: ("fd00::/16", "fd00:40::/64", "fd00:142::/64", "2001:db8::/32", "::/1", "fd00:40::/48"),
}  # fmt: skip
IPSETS = {
    "gk-ip": ("hash:ip", ("10.40.0.6", "203.0.113.10")),
    "gk-net": ("hash:net", ("10.40.0.0/24", "10.40.0.10 nomatch", "198.51.100.0/24")),
    "gk-ipport": ("hash:ip,port", ("10.40.0.6,tcp:8080", "10.142.0.8,udp:53", "10.40.0.10,tcp:80")),
    "gk-ipportip": ("hash:ip,port,ip", ("10.40.0.6,tcp:8080,10.40.0.10", "10.142.0.8,tcp:80,203.0.113.10")),
    "gk-ipportnet": ("hash:ip,port,net", ("10.40.0.6,tcp:8080,203.0.113.0/24", "10.142.0.8,udp:53,10.0.0.0/8")),
    "gk-netport": ("hash:net,port", ("10.40.0.0/24,tcp:80", "10.142.0.0/24,udp:53")),
    "gk-bitmap": ("bitmap:port range 0-65535", ("80", "8080-8090")),
    "gk-netiface": ("hash:net,iface", ("203.0.113.0/24,eth0", "10.40.0.0/24,cbr0")),
    "gk-list": ("list:set", ("gk-ip",)),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """One match or target that the generator knows to write."""

    name: str
    """As in the coverage table: the module's name."""
    write: Callable[[random.Random, int, str], str]
    """(random, family, hook) → option text."""
    hooks: tuple[str, ...] = ()
    """Empty: every hook."""
    tables: tuple[str, ...] = ()
    families: tuple[int, ...] = (4, 6)
    protocol: str = ""
    """Needs ``-p`` this; ``ports``: tcp or udp."""


def _not(rng: random.Random) -> str:
    return "! " if rng.random() < 0.3 else ""


def _value_mask(rng: random.Random) -> str:
    return rng.choice(("0x1", "0x2/0x2", "0x4000/0x4000", "0x0/0x3", "0x1/0xf", "0x5"))


def _range(rng: random.Random) -> str:
    return rng.choice((*map(str, PORTS), "0:1023", "1024:65535", "80:8080"))


def _ports(rng: random.Random) -> str:
    return ",".join(map(str, rng.sample(PORTS, 2))) + rng.choice(("", ",8000:9000"))


def _hop_field(rng: random.Random, family: int, _: str) -> str:
    if family == 4:
        return (
            f"-m ttl {rng.choice(('--ttl-eq 64', '--ttl-lt 64', '--ttl-gt 32', '! --ttl-eq 63'))}"
        )
    return f"-m hl {rng.choice(('--hl-eq 64', '--hl-lt 64', '--hl-gt 32', '! --hl-eq 63'))}"


def _icmp(rng: random.Random, family: int, _: str) -> str:
    if family == 4:
        kind = rng.choice(("echo-request", "echo-reply", "8/0", "any", "destination-unreachable"))
        return f"-m icmp {_not(rng)}--icmp-type {kind}"
    kind = rng.choice(("echo-request", "echo-reply", "128/0", "destination-unreachable"))
    return f"-m icmp6 {_not(rng)}--icmpv6-type {kind}"


def _conntrack(rng: random.Random, family: int, _: str) -> str:
    states = ("NEW", "ESTABLISHED", "RELATED,ESTABLISHED", "INVALID", "UNTRACKED", "DNAT", "SNAT",
              "NEW,DNAT", "INVALID,UNTRACKED")  # fmt: skip
    options = (
        lambda: f"{_not(rng)}--ctstate {rng.choice(states)}",
        lambda: (
            f"{_not(rng)}--ctstatus {rng.choice(('NONE', 'SEEN_REPLY', 'CONFIRMED', 'ASSURED'))}"
        ),
        lambda: f"{_not(rng)}--ctorigsrc {rng.choice(NETS[family])}",
        lambda: f"{_not(rng)}--ctorigdst {rng.choice(ADDRESSES[family])}",
        lambda: f"{_not(rng)}--ctreplsrc {rng.choice(NETS[family])}",
        lambda: f"{_not(rng)}--ctrepldst {rng.choice(NETS[family])}",
        lambda: f"--ctproto tcp {_not(rng)}--ctorigdstport {rng.choice(PORTS)}",
        lambda: f"--ctproto udp {_not(rng)}--ctreplsrcport {_range(rng)}",
        lambda: f"--ctdir {rng.choice(('ORIGINAL', 'REPLY'))}",
    )
    return f"-m conntrack {rng.choice(options)()}"


def _addrtype(rng: random.Random, family: int, hook: str) -> str:
    # ip6tables knows no broadcast.
    kind = rng.choice(("LOCAL", "UNICAST", "MULTICAST", "BROADCAST" if family == 4 else "LOCAL"))
    side = rng.choice(("--src-type", "--dst-type"))
    limit = ""
    if rng.random() < 0.2:
        limit = " --limit-iface-in" if hook in ("PREROUTING", "INPUT") else ""
        limit = " --limit-iface-out" if hook in ("POSTROUTING", "OUTPUT") else limit
    return f"-m addrtype {_not(rng)}{side} {kind}{limit}"


def _recent(rng: random.Random, family: int, _: str) -> str:
    full = "255.255.255.255" if family == 4 else "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
    name = f"gk{family}-{rng.randrange(3)}"
    side = rng.choice(("--rsource", "--rdest"))
    what = rng.choice(("--set", "--rcheck --seconds 600", "--rcheck --seconds 600 --reap",
                       "--update --seconds 600", "! --rcheck", "--remove"))  # fmt: skip
    return f"-m recent {what} --name {name} --mask {full} {side}"


def _statistic(rng: random.Random, _: int, __: str) -> str:
    return f"-m statistic --mode random {_not(rng)}--probability {rng.choice((0.33333333349, 0.5, 0.25))}"


def _set(rng: random.Random, _: int, __: str) -> str:
    name = rng.choice(tuple(IPSETS))
    words = IPSETS[name][0].split()[0].split(":")[1].split(",")
    flags = ",".join(rng.choice(("src", "dst")) for _ in words)
    if name == "gk-netiface":
        flags = rng.choice(("src,src", "dst,dst"))
    return f"-m set {_not(rng)}--match-set {name} {flags}"


def _physdev(rng: random.Random, _: int, hook: str) -> str:
    options = [f"{_not(rng)}--physdev-is-in", f"{_not(rng)}--physdev-in veth{rng.randrange(3)}"]
    if hook in ("FORWARD", "POSTROUTING"):
        options += [f"{_not(rng)}--physdev-is-bridged"]
    return f"-m physdev {rng.choice(options)}"


MATCHES: tuple[Part, ...] = (
    Part("source", lambda r, f, h: f"{_not(r)}-s {r.choice((*NETS[f], *ADDRESSES[f]))}"),
    Part("destination", lambda r, f, h: f"{_not(r)}-d {r.choice((*NETS[f], *ADDRESSES[f]))}"),
    Part("in-interface", lambda r, f, h: f"{_not(r)}-i {r.choice(('eth0', 'eth+', 'cbr0', 'lo'))}", _INCOMING),
    Part("out-interface", lambda r, f, h: f"{_not(r)}-o {r.choice(('eth0', 'eth+', 'cbr0', 'lo'))}", _OUTGOING),
    Part("protocol", lambda r, f, h: f"{_not(r)}-p {r.choice(('tcp', 'udp', 'sctp', '47', 'icmp' if f == 4 else 'ipv6-icmp'))}"),
    Part("tcp", lambda r, f, h: "-m tcp " + r.choice((f"{_not(r)}--dport {_range(r)}", f"{_not(r)}--sport {_range(r)}", "--tcp-flags SYN,ACK SYN", "! --tcp-flags FIN,SYN,RST,ACK SYN", "--tcp-flags ALL SYN,ACK", "--tcp-option 2", "! --tcp-option 8")), protocol="tcp"),
    Part("udp", lambda r, f, h: f"-m udp {_not(r)}{r.choice(('--dport', '--sport'))} {_range(r)}", protocol="udp"),
    Part("sctp", lambda r, f, h: "-m sctp " + r.choice((f"{_not(r)}--dport {_range(r)}", f"{_not(r)}--sport {_range(r)}")), protocol="sctp"),
    Part("icmp", _icmp, protocol="icmp"),
    Part("multiport", lambda r, f, h: f"-m multiport {_not(r)}{r.choice(('--dports', '--sports', '--ports'))} {_ports(r)}", protocol="ports"),
    Part("iprange", lambda r, f, h: f"-m iprange {_not(r)}{r.choice(('--src-range', '--dst-range'))} {'-'.join(sorted((r.choice(ADDRESSES[f]), r.choice(ADDRESSES[f])), key=lambda a: int(ip_address(a))))}"),
    Part("comment", lambda r, f, h: '-m comment --comment "a \\"quoted\\" remark"'),
    Part("conntrack", _conntrack),
    Part("state", lambda r, f, h: f"-m state {_not(r)}--state {r.choice(('NEW', 'ESTABLISHED', 'INVALID', 'RELATED,ESTABLISHED', 'UNTRACKED'))}"),
    Part("mark", lambda r, f, h: f"-m mark {_not(r)}--mark {_value_mask(r)}"),
    Part("connmark", lambda r, f, h: f"-m connmark {_not(r)}--mark {_value_mask(r)}"),
    Part("addrtype", _addrtype),
    Part("statistic", _statistic),
    Part("nth", lambda r, f, h: "-m statistic --mode nth --every 2 --packet 0"),
    Part("recent", _recent),
    Part("set", _set, families=(4,)),
    Part("physdev", _physdev, ("PREROUTING", "FORWARD", "POSTROUTING")),
    Part("mac", lambda r, f, h: f"-m mac {_not(r)}--mac-source @MAC@", _INCOMING),
    Part("owner", lambda r, f, h: f"-m owner {_not(r)}--uid-owner {r.choice((0, 1000))}", _LOCAL),
    Part("limit", lambda r, f, h: "-m limit --limit 1000/sec --limit-burst 1000"),
    Part("hashlimit", lambda r, f, h: "-m hashlimit --hashlimit-upto 1000/sec --hashlimit-burst 1000 --hashlimit-mode srcip --hashlimit-name gk"),
    Part("nfacct", lambda r, f, h: f"-m nfacct --nfacct-name {NFACCT}"),
    Part("rpfilter", lambda r, f, h: f"-m rpfilter {r.choice(('', '--loose', '--validmark', '--invert', '--loose --invert'))}", ("PREROUTING",), ("raw", "mangle")),
    Part("tos", lambda r, f, h: f"-m tos {_not(r)}--tos {r.choice(('0x10/0x3f', '0x00/0xff', '0x08/0xff'))}"),
    Part("dscp", lambda r, f, h: f"-m dscp {_not(r)}--dscp {r.choice(('0x00', '0x04', '0x2e'))}"),
    Part("ecn", lambda r, f, h: f"-m ecn {_not(r)}--ecn-ip-ect {r.choice((0, 1))}"),
    Part("length", lambda r, f, h: f"-m length {_not(r)}--length {r.choice(('0:40', '41:1500', '28', '40:60'))}"),
    Part("ttl", _hop_field),
    Part("u32", lambda r, f, h: '-m u32 --u32 "0x6&0xff=0x1"'),
    Part("bpf", lambda r, f, h: '-m bpf --bytecode "1,6 0 0 65535"'),
)  # fmt: skip
"""Every match; lines as long as they need to be, one each."""


def _mark_target(rng: random.Random, _: int, __: str) -> str:
    return "-j MARK " + rng.choice(
        ("--set-xmark 0x4000/0x4000", "--set-xmark 0x4000/0x0", "--set-xmark 0x1/0xffffffff",
         "--set-mark 0x2/0x3", "--or-mark 0x4", "--and-mark 0xffff", "--xor-mark 0x1")
    )  # fmt: skip


def _connmark_target(rng: random.Random, _: int, __: str) -> str:
    return "-j CONNMARK " + rng.choice(
        ("--set-xmark 0x1/0xffffffff", "--save-mark --nfmask 0xffffffff --ctmask 0xffffffff",
         "--restore-mark --nfmask 0x4000 --ctmask 0x4000", "--restore-mark", "--or-mark 0x2",
         "--save-mark --mask 0xff", "--set-mark 0x5/0xf")
    )  # fmt: skip


def _destination(rng: random.Random, family: int, port: str) -> str:
    first = rng.choice(INSIDE[family])
    if rng.random() < 0.15:
        first = f"{INSIDE[family][0]}-{INSIDE[family][1]}"
        return f"{first}{port}" if family == 4 else (f"[{first}]{port}" if port else first)
    return f"{first}{port}" if family == 4 or not port else f"[{first}]{port}"


def _dnat(rng: random.Random, family: int, _: str) -> str:
    port = rng.choice(("", ":8080", ":8080", ":8000-8005"))
    extra = rng.choice(("", "", " --persistent", " --random"))
    return f"-j DNAT --to-destination {_destination(rng, family, port)}{extra}"


def _snat(rng: random.Random, family: int, _: str) -> str:
    own = "10.142.0.8" if family == 4 else "fd00:142::8"
    port = rng.choice(("", "", ":40000-40100"))
    extra = rng.choice(("", "", " --random", " --random-fully", " --persistent"))
    where = own + port if family == 4 else (f"[{own}]{port}" if port else own)
    return f"-j SNAT --to-source {where}{extra}"


_REJECTS = {
    4: ("icmp-port-unreachable", "icmp-net-unreachable", "icmp-host-prohibited", "icmp-admin-prohibited"),
    6: ("icmp6-port-unreachable", "icmp6-no-route", "icmp6-adm-prohibited", "icmp6-addr-unreachable"),
}  # fmt: skip

TARGETS: tuple[Part, ...] = (
    Part("ACCEPT", lambda r, f, h: "-j ACCEPT"),
    Part("DROP", lambda r, f, h: "-j DROP", tables=("raw", "mangle", "filter", "security")),
    Part("REJECT", lambda r, f, h: f"-j REJECT --reject-with {r.choice(_REJECTS[f])}", tables=("filter",)),
    Part("RETURN", lambda r, f, h: "-j RETURN"),
    Part("none", lambda r, f, h: ""),
    Part("DNAT", _dnat, ("PREROUTING", "OUTPUT"), ("nat",), protocol="ports"),
    Part("SNAT", _snat, ("POSTROUTING", "INPUT"), ("nat",), protocol="ports"),
    Part("MASQUERADE", lambda r, f, h: "-j MASQUERADE" + r.choice(("", " --random-fully", " --random", " --to-ports 40000-41000")), ("POSTROUTING",), ("nat",), protocol="ports"),
    Part("REDIRECT", lambda r, f, h: "-j REDIRECT" + r.choice(("", " --to-ports 8080")), ("PREROUTING", "OUTPUT"), ("nat",), protocol="ports"),
    Part("NETMAP", lambda r, f, h: f"-j NETMAP --to {'10.40.0.0/24' if f == 4 else 'fd00:40::/64'}", ("PREROUTING", "POSTROUTING"), ("nat",)),
    Part("MARK", _mark_target),
    Part("CONNMARK", _connmark_target, tables=("mangle", "nat", "filter", "security")),
    Part("CT", lambda r, f, h: "-j CT " + r.choice(("--notrack", "--zone 5")), tables=("raw",)),
    Part("NOTRACK", lambda r, f, h: "-j NOTRACK", tables=("raw",)),
    Part("TPROXY", lambda r, f, h: "-j TPROXY --on-port 9999 --tproxy-mark 0x1/0x1", ("PREROUTING",), ("mangle",), protocol="ports"),
    Part("LOG", lambda r, f, h: '-j LOG --log-prefix "gk " --log-level 7', tables=("filter",)),
    Part("NFLOG", lambda r, f, h: "-j NFLOG --nflog-group 9"),
    Part("NFQUEUE", lambda r, f, h: "-j NFQUEUE --queue-num 7 --queue-bypass", tables=("mangle",)),
    Part("TCPMSS", lambda r, f, h: "-j TCPMSS " + ("--set-mss 1300" if h != "FORWARD" else "--clamp-mss-to-pmtu"), ("FORWARD", "OUTPUT", "POSTROUTING"), ("mangle",), protocol="syn"),
    Part("TRACE", lambda r, f, h: "-j TRACE", tables=("raw",)),
    Part("AUDIT", lambda r, f, h: "-j AUDIT --type accept", tables=("filter",)),
    Part("CHECKSUM", lambda r, f, h: "-j CHECKSUM --checksum-fill", ("POSTROUTING",), ("mangle",)),
    Part("DSCP", lambda r, f, h: f"-j DSCP --set-dscp {r.choice(('0x04', '0x2e'))}", tables=("mangle",)),
    Part("TOS", lambda r, f, h: f"-j TOS --set-tos {r.choice(('0x10/0x3f', '0x00/0xff', '0x08/0xff'))}", tables=("mangle",)),
    Part("TTL", lambda r, f, h: ("-j TTL " + r.choice(("--ttl-set 50", "--ttl-dec 1", "--ttl-inc 2"))) if f == 4 else ("-j HL " + r.choice(("--hl-set 50", "--hl-dec 1", "--hl-inc 2"))), tables=("mangle",)),
    Part("SET", lambda r, f, h: f"-j SET --add-set gk-ip {r.choice(('src', 'dst'))}", families=(4,)),
    Part("NFACCT", lambda r, f, h: f"-m nfacct --nfacct-name {NFACCT}"),
)  # fmt: skip
"""Every target; ``NFACCT`` is a match without a target, as iptables has it."""


@dataclass(slots=True, kw_only=True)
class Generator:
    """Writes rule sets.  `absent` are parts that this kernel (or its iptables) lacks."""

    rng: random.Random
    family: int
    backend: str
    """``nft`` or ``legacy``."""
    absent: frozenset[str] = frozenset()
    coverage: Counter[str] = field(default_factory=Counter)
    mac: str = ""

    def ruleset(self) -> str:
        """iptables-restore text with all five tables."""
        lines: list[str] = []
        for table, hooks in HOOKS.items():
            rules: list[str] = []
            chains = [f"{h}-{i}" for h in hooks for i in range(3)]
            lines.append(f"*{table}")
            droppable = table in ("filter", "security", "mangle", "raw")
            for hook in hooks:
                policy = "DROP" if droppable and self.rng.random() < 0.06 else "ACCEPT"
                lines.append(f":{hook} {policy} [0:0]")
            lines += [f":{chain} - [0:0]" for chain in chains]
            for hook in hooks:
                for level, chain in enumerate((hook, *(f"{hook}-{i}" for i in range(3)))):
                    for _ in range(self.rng.randrange(1, 5)):
                        rules.append(f"-A {chain} {self._rule(table, hook, level)}")
            lines += rules
            lines.append("COMMIT")
        return "\n".join(lines) + "\n"

    def _rule(self, table: str, hook: str, level: int) -> str:
        rng = self.rng
        protocol = ""
        chosen: list[Part] = []
        target = self._pick(TARGETS, table, hook)
        branches = target.name in ("ACCEPT", "RETURN")
        if level < 3 and rng.random() < 0.4:
            branches = True
            jump = rng.choice(("-j", "-j", "-g"))
            text, name = (
                f"{jump} {hook}-{rng.randrange(level, 3)}",
                "goto" if jump == "-g" else "jump",
            )
        else:
            text, name = target.write(rng, self.family, hook), target.name
            protocol = target.protocol
        for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3))):
            part = self._pick(MATCHES, table, hook)
            if any(part.name == other.name for other in chosen):
                continue
            if branches and part.name in OPEN:
                # Where both ways lead to the same, a walk does not say which one was taken.
                continue
            if part.protocol and protocol and not _compatible(part.protocol, protocol):
                continue
            protocol = _narrower(protocol, part.protocol)
            chosen.append(part)
        if protocol and any(part.name == "protocol" for part in chosen):
            chosen = [part for part in chosen if part.name != "protocol"]
        words = [self._protocol(protocol)]
        for part in sorted(chosen, key=lambda p: p.name not in _FIRST):
            words.append(part.write(rng, self.family, hook).replace("@MAC@", self.mac))
            self.coverage[f"match {part.name}"] += 1
        self.coverage[f"target {name}"] += 1
        return " ".join(filter(None, (*words, text)))

    def _pick(self, parts: tuple[Part, ...], table: str, hook: str) -> Part:
        return self.rng.choice(
            [
                part
                for part in parts
                if self.family in part.families
                and (not part.hooks or hook in part.hooks)
                and (not part.tables or table in part.tables)
                and f"{self.backend}/{self.family}/{part.name}" not in self.absent
            ]
        )

    def _protocol(self, wanted: str) -> str:
        if wanted == "ports":
            return f"-p {self.rng.choice(('tcp', 'udp'))}"
        if wanted == "syn":
            return "-p tcp -m tcp --tcp-flags SYN,RST SYN"
        if wanted == "icmp":
            return "-p icmp" if self.family == 4 else "-p ipv6-icmp"
        return f"-p {wanted}" if wanted else ""

    def cases(self, bed: Bed) -> Iterator[Case]:
        """Endless packets: forwarded, local in, local out; each a connection of its own."""
        rng, family = self.rng, self.family
        node = bed.node
        own = [str(ip_interface(a).ip) for a in (*node.eth0, *node.cbr0, *node.eth1)]
        own = [a for a in own if ip_address(a).version == family]
        pods = [next(a for a in pod if ip_address(a).version == family) for pod in node.pods]
        while True:
            ingress = rng.choice(("eth0", "eth0", "eth1", "", "", "veth0", "veth1"))
            if ingress == "":
                src = rng.choice(own)
            elif ingress.startswith("veth"):
                src = pods[int(ingress[4:])]
            elif ingress == "eth1":
                src = "10.50.0.9" if family == 4 else "fd00:50::9"
            else:
                src = rng.choice([a for a in ADDRESSES[family] if a not in own and a not in pods])
            dst = rng.choice((*ADDRESSES[family], *pods, *own))
            if src == dst:
                continue
            protocol = rng.choice((6, 6, 6, 17, 17, 132, 1 if family == 4 else 58, 47))
            icmp = protocol in (Protocol.ICMP, Protocol.ICMPV6)
            ports = protocol in (Protocol.TCP, Protocol.UDP, Protocol.SCTP)
            flags = rng.choice((TcpFlags.SYN, TcpFlags.SYN, TcpFlags.SYN, TcpFlags.ACK,
                                TcpFlags.SYN | TcpFlags.ACK, TcpFlags.RST))  # fmt: skip
            options = rng.choice(((), (2,), (2, 4))) if protocol == Protocol.TCP else None
            size = {6: 20 + -(-sum({2: 4, 4: 2}[o] for o in options or ()) // 4) * 4,
                    17: 8, 132: 32, 1: 8, 58: 8, 47: 8}[protocol]  # fmt: skip
            yield Case(
                ingress=ingress,
                packet=Packet(
                    src=ip_address(src),
                    dst=ip_address(dst),
                    protocol=protocol,
                    sport=rng.randrange(1024, 65536) if ports else None,
                    dport=rng.choice(PORTS) if ports else None,
                    icmp_type=(8 if family == 4 else 128) if icmp else None,
                    icmp_code=0 if icmp else None,
                    icmp_id=rng.randrange(65536) if icmp else None,
                    tcp_flags=flags,
                    tcp_options=options,
                    ttl=64,
                    dscp=rng.choice((0, 0, 0, 4, 0x2E)),
                    length=(20 if family == 4 else 40) + size,
                    src_mac=bed.peer_mac(ingress) if ingress else None,
                    mark=rng.choice((0, 0, 0, 1)) if not ingress else 0,
                ),
                label=f"{src} ({ingress or 'local'}) to {dst}/{protocol}",
            )


OPEN = frozenset({"limit", "hashlimit", "u32", "bpf", "owner", "nth"})
"""Matches that no simulator can decide: they rest on what no snapshot shows."""

_FIRST = ("source", "destination", "in-interface", "out-interface", "protocol")
_WIDE = {"ports": ("tcp", "udp"), "syn": ("tcp",)}


def _compatible(one: str, other: str) -> bool:
    return one == other or one in _WIDE.get(other, ()) or other in _WIDE.get(one, ())


def _narrower(one: str, other: str) -> str:
    if not one or not other:
        return one or other
    return other if other in _WIDE.get(one, ()) else one


def probe_kernel(bed: Bed) -> frozenset[str]:
    """``backend/family/part`` of each part that cannot be restored here, found by trying."""
    absent: set[str] = set()
    for backend in ("nft", "legacy"):
        for family in (4, 6):
            tool = f"{'ip' if family == 4 else 'ip6'}tables-{backend}-restore"
            for part in (*MATCHES, *TARGETS):
                if family not in part.families:
                    continue
                rng = random.Random(1)
                table = part.tables[0] if part.tables else "mangle"
                hook = next(h for h in HOOKS[table] if not part.hooks or h in part.hooks)
                maker = Generator(rng=rng, family=family, backend=backend, mac="02:00:00:00:00:01")
                words = f"{maker._protocol(part.protocol)} {part.write(rng, family, hook)}"
                text = f"*{table}\n-A {hook} {words.replace('@MAC@', maker.mac)}\nCOMMIT\n"
                try:
                    bed.command([tool], text=text)
                except RuntimeError:
                    absent.add(f"{backend}/{family}/{part.name}")
            for table in HOOKS:
                bed.command([tool], text=f"*{table}\nCOMMIT\n")
    return frozenset(absent)
