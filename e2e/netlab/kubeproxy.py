"""The part of kube-proxy that is not rules: its health ports, and in its 1.20 era its listeners.

- :10256 `/healthz` and `/livez` (pkg/proxy/healthcheck/proxy_health.go).
- each healthCheckNodePort: 200 when the service has endpoints on this node, else 503
  (pkg/proxy/healthcheck/service_health.go).
- 1.20 holds a listening socket on every node port, so that nobody else takes it
  (pkg/proxy/iptables/proxier.go, portsMap).
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket

from e2e.netlab.world import World

__all__ = ["HEALTH_PORT", "serve_kube_proxy"]

HEALTH_PORT = 10256


def serve_kube_proxy(world: World, node: str) -> None:
    """Answers health checks of `node` in this network namespace, for ever."""
    selector = selectors.DefaultSelector()
    checks: dict[int, tuple[str, str]] = {}
    taken = {HEALTH_PORT}
    held = []
    for service in world.services:
        meta, spec = service["metadata"], service["spec"]
        if spec.get("healthCheckNodePort"):
            checks[spec["healthCheckNodePort"]] = (meta["namespace"], meta["name"])
    for port in (HEALTH_PORT, *checks):
        selector.register(_listen(port), selectors.EVENT_READ, port)
    taken |= set(checks)
    if world.era == "1.20":
        for service in world.services:
            for item in service["spec"].get("ports", ()):
                port = item.get("nodePort")
                if port and item["protocol"] == "TCP" and port not in taken:
                    held.append(_listen(port, socket.AF_INET))
                    taken.add(port)
    while True:
        for key, _ in selector.select():
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            connection, _ = sock.accept()
            with connection, contextlib.suppress(OSError):  # a checker that hung up
                connection.settimeout(1)
                words = connection.recv(4096).split()
                path = words[1].decode() if len(words) > 1 else "/"
                connection.sendall(_answer(world, node, key.data, path, checks))


def _listen(port: int, family: socket.AddressFamily = socket.AF_INET6) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("" if family == socket.AF_INET else "::", port))
    sock.listen(16)
    return sock


def _answer(
    world: World, node: str, port: int, path: str, checks: dict[int, tuple[str, str]]
) -> bytes:
    head = ""
    if port in checks:
        namespace, name = checks[port]
        local = world.local_endpoints(namespace, name, node)
        status = "200 OK" if local else "503 Service Unavailable"
        body: dict[str, object] = {
            "service": {"namespace": namespace, "name": name},
            "localEndpoints": local,
        }
        if world.era != "1.20":
            body["serviceProxyHealthy"] = True
            head = f"X-Load-Balancing-Endpoint-Weight: {local}\r\n"
        text = json.dumps(body)
    elif path in ("/healthz", "/livez"):
        when = "2026-11-22 01:01:00 +0000 UTC"
        status = "200 OK"
        text = json.dumps({"lastUpdated": when, "currentTime": when})
    else:
        status, text = "404 Not Found", "404 page not found"
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{head}"
        f"Content-Length: {len(text)}\r\nConnection: close\r\n\r\n{text}"
    ).encode()
