"""Rule sets of the size of large clusters, in the shapes and the order of kube-proxy 1.36's.

The model is tests/data/worlds/kube-proxy-1.36-*.  Each service has a ClusterIP and one TCP port;
every tenth has a NodePort as well.  As in kube-proxy, rules of endpoints carry no comments once
there are more than 1,000 endpoints (largeClusterEndpointsThreshold).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

from gketrace.kubenames import (
    ChainRole,
    ServicePort,
    endpoint_chain,
    nft_service_chain,
    service_chain,
)

__all__ = ["NFACCT", "BenchService", "iptables_text", "make_services", "nft_table"]

NFACCT: Final = ("ct_state_invalid_dropped_pkts", "localhost_nps_accepted_pkts")
"""Accounting objects that the rules name; make them in the namespace first."""
_LARGE: Final = 1000
_CLUSTER_CIDR: Final = "10.40.0.0/14"
_FIRST_CLUSTER_IP: Final = int(IPv4Address("10.96.0.10"))
_FIRST_POD: Final = int(IPv4Address("10.40.0.10"))
_NODE_PORT_EVERY: Final = 10

_FILTER: Final = """\
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -j KUBE-FIREWALL
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -m nfacct --nfacct-name ct_state_invalid_dropped_pkts -j DROP
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*mangle
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-PROXY-CANARY - [0:0]
COMMIT
"""  # noqa: E501 - as iptables-save prints it
_NAT_BEGIN: Final = """\
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
"""  # noqa: E501


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchService:
    """One service port."""

    port: ServicePort
    cluster_ip: str
    node_port: int | None
    endpoints: tuple[str, ...]
    """Addresses; all listen on 8080."""


def make_services(services: int, endpoints: int) -> tuple[BenchService, ...]:
    """`services` of them with `endpoints` each; the same for the same numbers."""
    return tuple(
        BenchService(
            port=ServicePort(namespace=f"team-{number % 50}", service=f"svc-{number}", port="http"),
            cluster_ip=str(IPv4Address(_FIRST_CLUSTER_IP + number)),
            node_port=None if number % _NODE_PORT_EVERY else 30000 + number // _NODE_PORT_EVERY,
            endpoints=tuple(
                str(IPv4Address(_FIRST_POD + number * endpoints + one)) for one in range(endpoints)
            ),
        )
        for number in range(services)
    )


def iptables_text(services: tuple[BenchService, ...]) -> Iterator[str]:
    """Pieces of the text for iptables-restore."""
    commented = sum(len(service.endpoints) for service in services) <= _LARGE
    yield _FILTER
    yield "*nat\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n"
    yield ":POSTROUTING ACCEPT [0:0]\n"
    names = ["KUBE-MARK-MASQ", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-PROXY-CANARY"]
    for service in services:
        if service.node_port is not None:
            names.append(service_chain(ChainRole.EXTERNAL, service.port))
        names.append(service_chain(ChainRole.SERVICE, service.port))
        names += [endpoint_chain(service.port, f"{ip}:8080") for ip in service.endpoints]
    names.append("KUBE-SERVICES")
    yield "".join(f":{name} - [0:0]\n" for name in sorted(names))
    yield _NAT_BEGIN
    for service in services:
        yield from _iptables_service(service, commented)
    yield '-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must '
    yield 'be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n'
    yield "COMMIT\n"


def _iptables_service(service: BenchService, commented: bool) -> Iterator[str]:
    port = service.port
    main, external = (service_chain(r, port) for r in (ChainRole.SERVICE, ChainRole.EXTERNAL))
    to_cluster_ip = (
        f'-d {service.cluster_ip}/32 -p tcp -m comment --comment "{port} cluster IP" '
        "-m tcp --dport 80"
    )
    yield f"-A KUBE-SERVICES {to_cluster_ip} -j {main}\n"
    if service.node_port is not None:
        to_port = f'-p tcp -m comment --comment "{port}" -m tcp --dport {service.node_port}'
        yield f"-A KUBE-NODEPORTS -d 127.0.0.0/8 {to_port} "
        yield f"-m nfacct --nfacct-name {NFACCT[1]} -j {external}\n"
        yield f"-A KUBE-NODEPORTS {to_port} -j {external}\n"
        yield f'-A {external} -m comment --comment "masquerade traffic for {port} '
        yield f'external destinations" -j KUBE-MARK-MASQ\n-A {external} -j {main}\n'
    yield f"-A {main} ! -s {_CLUSTER_CIDR} {to_cluster_ip} -j KUBE-MARK-MASQ\n"
    count = len(service.endpoints)
    for index, address in enumerate(service.endpoints):
        chain = endpoint_chain(port, f"{address}:8080")
        balance = f' -m comment --comment "{port} -> {address}:8080"' if commented else ""
        own = f' -m comment --comment "{port}"' if commented else ""
        if left := count - index - 1:
            balance += f" -m statistic --mode random --probability {1 / (left + 1):.10f}"
        yield f"-A {main}{balance} -j {chain}\n"
        yield f"-A {chain} -s {address}/32{own} -j KUBE-MARK-MASQ\n"
        yield f"-A {chain} -p tcp{own} -m tcp -j DNAT --to-destination {address}:8080\n"


_NFT_CHAINS: Final = """\
  chain filter-prerouting-pre-dnat {
    type filter hook prerouting priority -110; policy accept;
    ct state new jump firewall-check
  }
  chain filter-output-pre-dnat {
    type filter hook output priority -110; policy accept;
    ct state new jump firewall-check
  }
  chain filter-input {
    type filter hook input priority 0; policy accept;
    ct state new jump nodeport-endpoints-check
    ct state new jump service-endpoints-check
  }
  chain filter-forward {
    type filter hook forward priority 0; policy accept;
    ct state new jump service-endpoints-check
    ct state new jump cluster-ips-check
  }
  chain filter-output {
    type filter hook output priority 0; policy accept;
    ct state new jump service-endpoints-check
    ct state new jump cluster-ips-check
  }
  chain nat-prerouting {
    type nat hook prerouting priority -100; policy accept;
    jump services
  }
  chain nat-output {
    type nat hook output priority -100; policy accept;
    jump services
  }
  chain nat-postrouting {
    type nat hook postrouting priority 100; policy accept;
    jump masquerading
  }
  chain nodeport-endpoints-check {
    ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
  }
  chain service-endpoints-check {
    ip daddr . meta l4proto . th dport vmap @no-endpoint-services
  }
  chain firewall-check {
    ip daddr . meta l4proto . th dport vmap @firewall-ips
  }
  chain services {
    ip daddr @cluster-ips ip saddr != 10.40.0.0/14 meta mark set meta mark | 0x4000 comment "masquerade clusterIP traffic from outside cluster"
    ip daddr . meta l4proto . th dport vmap @service-ips
    ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
  }
  chain masquerading {
    meta mark & 0x4000 != 0 meta mark set meta mark ^ 0x4000 masquerade fully-random
    ct status dnat ip saddr . ip daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random
  }
  chain cluster-ips-check {
    ip daddr @cluster-ips reject comment "Reject traffic to invalid ports of ClusterIPs"
    ip daddr 10.96.0.0/16 drop comment "Drop traffic to unallocated ClusterIPs"
  }
  chain reject-chain {
    comment "helper for @no-endpoint-services / @no-endpoint-nodeports"
    reject
  }
"""  # noqa: E501

_KEY: Final = "ipv4_addr . inet_proto . inet_service"


def nft_table(services: tuple[BenchService, ...], node: str) -> Iterator[str]:
    """Pieces of the text for ``nft -f``; `node` is the node's address."""
    yield 'table ip kube-proxy {\n  comment "rules for kube-proxy"\n'
    mine = services[0].endpoints[0]
    yield _set("set hairpin-connections", "ipv4_addr . " + _KEY, [f"{mine} . {mine} . tcp . 8080"])
    yield _set("set cluster-ips", "ipv4_addr", [service.cluster_ip for service in services])
    yield _set("set nodeport-ips", "ipv4_addr", [node])
    yield _set("map no-endpoint-services", f"{_KEY} : verdict", [])
    yield _set("map no-endpoint-nodeports", "inet_proto . inet_service : verdict", [])
    yield _set("map firewall-ips", f"{_KEY} : verdict", [])
    # Chains before the maps that lead to them.
    for service in services:
        main = nft_service_chain("service-", service.port)
        choice = ", ".join(f"{n} : {ip} . 8080" for n, ip in enumerate(service.endpoints))
        yield f"  chain {main} {{\n    meta l4proto tcp dnat ip to numgen random "
        yield f"mod {len(service.endpoints)} map {{ {choice} }}\n  }}\n"
        if service.node_port is not None:
            yield f"  chain {nft_service_chain('external-', service.port)} {{\n"
            yield '    meta mark set meta mark | 0x4000 comment "masquerade"\n'
            yield f"    goto {main}\n  }}\n"
    yield _set(
        "map service-ips",
        f"{_KEY} : verdict",
        [
            f"{s.cluster_ip} . tcp . 80 : goto {nft_service_chain('service-', s.port)}"
            for s in services
        ],
    )
    yield _set(
        "map service-nodeports",
        "inet_proto . inet_service : verdict",
        [
            f"tcp . {s.node_port} : goto {nft_service_chain('external-', s.port)}"
            for s in services
            if s.node_port is not None
        ],
    )
    yield _NFT_CHAINS
    yield "}\n"


def _set(head: str, kind: str, elements: list[str]) -> str:
    body = f"    elements = {{ {', '.join(elements)} }}\n" if elements else ""
    return f"  {head} {{\n    type {kind}\n{body}  }}\n"
