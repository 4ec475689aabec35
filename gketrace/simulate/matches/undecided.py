"""Matches that are understood and whose answer cannot be known from what is read.

They hang on a counter, a clock, a payload or a state of the kernel that nobody shows.  They are
kept word for word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from gketrace.ruleset.model import Match
from gketrace.ruleset.options import Option, quote
from gketrace.simulate.matches.base import negation
from gketrace.simulate.state import Answer, Environment, PacketState, unknown

if TYPE_CHECKING:
    from typing import Self

__all__ = ["UNDECIDED", "UndecidedMatch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UndecidedMatch(Match):
    """Base of the matches below."""

    module: ClassVar[str] = ""
    REASON: ClassVar[str] = ""
    """What is not known, one clause."""

    options: tuple[Option, ...]

    @classmethod
    def parse(cls, options: tuple[Option, ...], family: int) -> Self:
        return cls(options=options)

    def evaluate(self, state: PacketState, env: Environment) -> Answer:
        return unknown(f"{self.module}: {self.REASON}")

    def render(self) -> str:
        words = [f"-m {self.module}"]
        for option in self.options:
            words.append(negation(option.negated) + option.name)
            words.extend(arg if _BARE.fullmatch(arg) else quote(arg) for arg in option.args)
        return " ".join(words)


_BARE: Final = re.compile(r"[\w.:/,%+=@-]+", re.ASCII)
_RATE: Final = "how many packets came before is the kernel's secret"
_IPSEC: Final = "which IPsec policy applied is not read"
_EXTENSION: Final = "IPv6 extension headers are not modelled"

_LIST: Final[tuple[tuple[str, str, Mapping[str, int]], ...]] = (
    ("ah", "the SPI is not known", {"--ahspi": 1, "--ahlen": 1, "--ahres": 0}),
    ("bpf", "a BPF program decides", {"--bytecode": 1, "--object-pinned": 1}),
    ("cgroup", "the sender's cgroup is not known", {"--path": 1, "--cgroup": 1}),
    (
        "cluster",
        "a hash of the connection decides",
        {
            "--cluster-total-nodes": 1,
            "--cluster-local-node": 1,
            "--cluster-local-nodemask": 1,
            "--cluster-hash-seed": 1,
        },
    ),
    (
        "connbytes",
        "the connection's counters are not read",
        {"--connbytes": 1, "--connbytes-mode": 1, "--connbytes-dir": 1},
    ),
    ("connlabel", "connection labels are not read", {"--label": 1, "--set": 0}),
    (
        "connlimit",
        "how many connections there are is not read",
        {
            "--connlimit-upto": 1,
            "--connlimit-above": 1,
            "--connlimit-mask": 1,
            "--connlimit-saddr": 0,
            "--connlimit-daddr": 0,
        },
    ),
    ("cpu", "which CPU takes the packet is chance", {"--cpu": 1}),
    ("devgroup", "interface groups are not read", {"--src-group": 1, "--dst-group": 1}),
    ("dst", _EXTENSION, {"--dst-len": 1, "--dst-opts": 1}),
    ("esp", "the SPI is not known", {"--espspi": 1}),
    ("eui64", "the frame's source MAC address is not compared", {}),
    (
        "frag",
        _EXTENSION,
        {
            "--fragid": 1,
            "--fraglen": 1,
            "--fragres": 0,
            "--fragfirst": 0,
            "--fragmore": 0,
            "--fraglast": 0,
        },
    ),
    (
        "hashlimit",
        _RATE,
        {
            "--hashlimit": 1,
            "--hashlimit-upto": 1,
            "--hashlimit-above": 1,
            "--hashlimit-burst": 1,
            "--hashlimit-mode": 1,
            "--hashlimit-srcmask": 1,
            "--hashlimit-dstmask": 1,
            "--hashlimit-name": 1,
            "--hashlimit-htable-size": 1,
            "--hashlimit-htable-max": 1,
            "--hashlimit-htable-expire": 1,
            "--hashlimit-htable-gcinterval": 1,
            "--hashlimit-rate-match": 0,
            "--hashlimit-rate-interval": 1,
        },
    ),
    ("hbh", _EXTENSION, {"--hbh-len": 1, "--hbh-opts": 1}),
    ("helper", "the connection's helper is not read", {"--helper": 1}),
    ("ipcomp", "the CPI is not known", {"--ipcompspi": 1, "--ipcompres": 0}),
    ("ipv6header", _EXTENSION, {"--header": 1, "--soft": 0}),
    (
        "ipvs",
        "IPVS's own table is not read",
        {
            "--ipvs": 0,
            "--vproto": 1,
            "--vaddr": 1,
            "--vport": 1,
            "--vdir": 1,
            "--vmethod": 1,
            "--vportctl": 1,
        },
    ),
    (
        "l2tp",
        "the L2TP header is not modelled",
        {"--tid": 1, "--sid": 1, "--pversion": 1, "--type": 1},
    ),
    ("limit", _RATE, {"--limit": 1, "--limit-burst": 1}),
    ("mh", "the mobility header is not modelled", {"--mh-type": 1}),
    ("osf", "a fingerprint of the sender decides", {"--genre": 1, "--ttl": 1, "--log": 1}),
    ("pkttype", "how the frame was addressed is not modelled", {"--pkt-type": 1}),
    (
        "policy",
        _IPSEC,
        {
            "--dir": 1,
            "--pol": 1,
            "--strict": 0,
            "--reqid": 1,
            "--spi": 1,
            "--proto": 1,
            "--mode": 1,
            "--tunnel-src": 1,
            "--tunnel-dst": 1,
            "--next": 0,
        },
    ),
    ("quota", "how much of the quota is left is not read", {"--quota": 1}),
    (
        "rateest",
        _RATE,
        {
            "--rateest": 1,
            "--rateest1": 1,
            "--rateest2": 1,
            "--rateest-delta": 0,
            "--rateest-bps": 1,
            "--rateest-bps1": 1,
            "--rateest-bps2": 1,
            "--rateest-pps": 1,
            "--rateest-pps1": 1,
            "--rateest-pps2": 1,
            "--rateest-lt": 0,
            "--rateest-gt": 0,
            "--rateest-eq": 0,
        },
    ),
    ("realm", "routing realms are not read", {"--realm": 1}),
    (
        "rt",
        _EXTENSION,
        {
            "--rt-type": 1,
            "--rt-segsleft": 1,
            "--rt-len": 1,
            "--rt-0-res": 0,
            "--rt-0-addrs": 1,
            "--rt-0-not-strict": 0,
        },
    ),
    (
        "socket",
        "which socket the packet belongs to is not known",
        {"--transparent": 0, "--nowildcard": 0, "--restore-skmark": 0},
    ),
    (
        "srh",
        _EXTENSION,
        dict.fromkeys(
            (
                "--srh-next-hdr",
                "--srh-hdr-len-eq",
                "--srh-hdr-len-gt",
                "--srh-hdr-len-lt",
                "--srh-segs-left-eq",
                "--srh-segs-left-gt",
                "--srh-segs-left-lt",
                "--srh-last-entry-eq",
                "--srh-last-entry-gt",
                "--srh-last-entry-lt",
                "--srh-tag",
                "--srh-psid",
                "--srh-nsid",
                "--srh-lsid",
            ),
            1,
        ),
    ),
    (
        "string",
        "the payload is not known",
        {"--string": 1, "--hex-string": 1, "--algo": 1, "--from": 1, "--to": 1, "--icase": 0},
    ),
    ("tcpmss", "the TCP MSS option is not known", {"--mss": 1}),
    (
        "time",
        "the kernel's clock and time zone decide",
        {
            "--timestart": 1,
            "--timestop": 1,
            "--datestart": 1,
            "--datestop": 1,
            "--monthdays": 1,
            "--weekdays": 1,
            "--kerneltz": 0,
            "--contiguous": 0,
            "--utc": 0,
            "--localtz": 0,
        },
    ),
    ("u32", "bytes of the packet that are not known decide", {"--u32": 1}),
)


def _class(module: str, reason: str, options: Mapping[str, int]) -> type[UndecidedMatch]:
    name = f"{module.title()}Match"
    fields = {
        "__doc__": f"``-m {module}``: {reason}.",
        "__module__": __name__,
        "__slots__": (),
        "module": module,
        "REASON": reason,
        "OPTIONS": options,
    }
    return type(name, (UndecidedMatch,), fields)


UNDECIDED: Final[tuple[type[UndecidedMatch], ...]] = tuple(_class(*row) for row in _LIST)
"""One class for each."""
