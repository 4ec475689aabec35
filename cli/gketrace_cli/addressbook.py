"""Addresses → whose they are: pods, Services, nodes.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import ip_network

from gketrace.objects import Node, Pod, Service
from gketrace.packet import IPAddress, protocol_name

__all__ = ["AddressBook"]


class AddressBook:
    """Names by address, or by address, port and protocol; as the API said, a moment ago."""

    def __init__(
        self,
        *,
        nodes: Iterable[Node],
        pods: Iterable[Pod],
        services: Iterable[Service],
        seen: Mapping[str, Iterable[IPAddress]] | None = None,
    ) -> None:
        """`seen`: node → the addresses that its agent found on it, a bridge's among them."""
        self._hosts: dict[str, str] = {}
        self._ranges = [
            (ip_network(text, strict=False), node.name) for node in nodes for text in node.pod_cidrs
        ]
        self._strangers: dict[IPAddress, str] = {}
        for name, addresses in (seen or {}).items():
            own = (str(one) for one in addresses if not one.is_loopback and not one.is_link_local)
            self._hosts.update(dict.fromkeys(own, f"node/{name}"))
        self._doors: dict[tuple[str, int, str], str] = {}
        self._node_ports: dict[tuple[int, str], str] = {}
        self._node_ips: set[str] = set()
        for pod in pods:
            if not pod.host_network:
                self._hosts.update(dict.fromkeys(pod.pod_ips, f"pod/{pod.key}"))
        for node in nodes:
            told = (*node.internal_ips, *node.external_ips)
            self._hosts.update(dict.fromkeys(told, f"node/{node.name}"))
            self._node_ips.update(told)
        for service in services:
            vips = (*service.cluster_ips, *service.external_ips)
            vips += tuple(entry.ip for entry in service.ingress if entry.ip)
            self._hosts.update(dict.fromkeys(vips, f"svc/{service.key}"))
            for port in service.ports:
                for ip in vips:
                    self._doors[ip, port.port, port.protocol.lower()] = f"svc/{service.key}"
                if port.node_port:
                    key = port.node_port, port.protocol.lower()
                    self._node_ports[key] = f"svc/{service.key}"

    def host(self, address: IPAddress) -> str:
        """``pod/NS/NAME``, ``svc/NS/NAME``, ``node/NAME``; empty: nobody's in the cluster."""
        return self._hosts.get(str(address), "")

    def stranger(self, address: IPAddress) -> str:
        """What an address is that is nobody's: ``outside`` the cluster, a ``multicast group``, or
        in a node's range of pods, where there is no pod with it now."""
        found = self._strangers.get(address)
        if found is None:
            found = self._strangers[address] = self._stranger(address)
        return found

    def _stranger(self, address: IPAddress) -> str:
        if address.is_multicast:
            return "multicast group"
        for network, node in self._ranges:
            if address in network:
                return f"no pod now, in the range of node/{node}"
        return "outside"

    def door(self, address: IPAddress, port: int | None, protocol: int) -> str:
        """The Service that an address and port is a front door of; otherwise as `host`."""
        if port is not None:
            text, kind = str(address), protocol_name(protocol)
            door = self._doors.get((text, port, kind))
            if door is None and text in self._node_ips:
                door = self._node_ports.get((port, kind))
            if door is not None:
                return door
        return self.host(address)
