"""Addresses → whose they are: pods, Services, nodes.  Pure."""

from __future__ import annotations

from collections.abc import Iterable

from gketrace.objects import Node, Pod, Service
from gketrace.packet import IPAddress, protocol_name

__all__ = ["AddressBook"]


class AddressBook:
    """Names by address, or by address, port and protocol; as the API said, a moment ago."""

    def __init__(
        self, *, nodes: Iterable[Node], pods: Iterable[Pod], services: Iterable[Service]
    ) -> None:
        self._hosts: dict[str, str] = {}
        self._doors: dict[tuple[str, int, str], str] = {}
        self._node_ports: dict[tuple[int, str], str] = {}
        self._node_ips: set[str] = set()
        for pod in pods:
            if not pod.host_network:
                self._hosts.update(dict.fromkeys(pod.pod_ips, f"pod/{pod.key}"))
        for node in nodes:
            addresses = (*node.internal_ips, *node.external_ips)
            self._hosts.update(dict.fromkeys(addresses, f"node/{node.name}"))
            self._node_ips.update(addresses)
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
