"""Sockets that can receive: TCP and SCTP listeners, unconnected UDP (sock_diag), raw sockets.

Raw sockets are read from /proc/net: their sock_diag is a module that many kernels lack.

Source: kernel net/core/sock_diag.c, net/ipv4/inet_diag.c, tcp_diag.c, udp_diag.c,
net/sctp/diag.c; include/uapi/linux/inet_diag.h; net/ipv4/raw.c raw_sock_seq_show(),
net/ipv6/raw.c.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from gketrace.packet import Protocol
from gketrace.snapshot import Maybe, Socket, Unavailable
from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netlink import attributes
from gketrace_agent.kernel.reader import KernelReader

__all__ = ["observe_sockets"]

_SOCK_DIAG_BY_FAMILY: Final = 20
_TCPF_CLOSE: Final = 1 << 7
_TCPF_LISTEN: Final = 1 << 10
_TCP_LISTEN: Final = 10
_INET_DIAG_SKV6ONLY: Final = 11
_REQUEST: Final = struct.Struct("=BBBxI48x")
"""struct inet_diag_req_v2: family, protocol, extensions, states, and an empty socket id."""
_MESSAGE: Final = struct.Struct("=BBBB2s2s16s16sI8sIIIII")
"""struct inet_diag_msg: family, state, timer, retransmissions; id: sport, dport, source,
destination, interface, cookie; expires, receive queue, send queue, uid, inode."""
_RAW_UNCONNECTED: Final = "07"
"""TCP_CLOSE, the state of a raw socket that takes packets from anybody."""
_IPPROTO_RAW: Final = 255
"""Sockets of this protocol only send."""
_SOCKET_LINK: Final = "socket:["


def observe_sockets(
    reader: KernelReader,
    pids: Iterable[int],
    runtime_handler: str,
    link_name: Callable[[int], str],
) -> Maybe[tuple[Socket, ...]]:
    """All receiving sockets of the namespace; their owners are looked for among `pids`."""
    if runtime_handler == "gvisor":
        return Unavailable(
            reason="a gVisor sandbox keeps its sockets in user space: listeners are not observable"
        )
    wanted = [(Protocol.TCP, _TCPF_LISTEN), (Protocol.UDP, _TCPF_CLOSE)]
    if os.path.isdir(reader.paths.thread_net("sctp")):
        # Only where SCTP is loaded: asking would load it.
        wanted.append((Protocol.SCTP, _TCPF_LISTEN))
    found = [
        _socket(message.body, protocol, link_name)
        for protocol, states in wanted
        for family in (socket.AF_INET, socket.AF_INET6)
        for message in reader.messages(
            "sockets",
            reader.diag.dump(
                _SOCK_DIAG_BY_FAMILY,
                _REQUEST.pack(family, protocol, 0, states),
                what=f"{protocol.name} sockets",
            ),
        )
    ]
    found += _raw_sockets(reader.paths)
    owners = _owners(reader.paths, pids, {one.inode for one in found})
    return tuple(
        replace(one, pid=owners[one.inode], process=_command(reader.paths, owners[one.inode]))
        if one.inode in owners
        else one
        for one in found
    )


def _socket(body: bytes, protocol: Protocol, link_name: Callable[[int], str]) -> Socket:
    (family, state, _, _, port, _, source, _, interface, _, _, receive, send, uid, inode) = (
        _MESSAGE.unpack_from(body)
    )
    v4 = family == socket.AF_INET
    only = attributes(body, _MESSAGE.size).get(_INET_DIAG_SKV6ONLY)
    listens = state == _TCP_LISTEN
    return Socket(
        family=4 if v4 else 6,
        protocol=protocol,
        address=IPv4Address(source[:4]) if v4 else IPv6Address(source),
        port=int.from_bytes(port, "big"),
        state="LISTEN" if listens else "UNCONN",
        v6only=None if v4 or only is None else bool(only[0]),
        interface=link_name(interface) if interface else "",
        inode=inode,
        uid=uid,
        # Of a listener the queues are connections; of a datagram socket they are bytes.
        queue=receive if listens else None,
        backlog=send if listens else None,
    )


def _raw_sockets(paths: HostPaths) -> list[Socket]:
    """SOCK_RAW sockets that are not connected; their port is 0, as they take any."""
    found: list[Socket] = []
    for family, name in ((4, "raw"), (6, "raw6")):
        try:
            lines = paths.thread_net(name).read_text().splitlines()[1:]
        except FileNotFoundError:
            continue  # a kernel without IPv6
        for line in lines:
            # sl, local address:protocol, remote address:0, state, queues, timer, retransmissions,
            # uid, timeout, inode, …
            _, local, _, state, _, _, _, uid, _, inode, *_ = line.split()
            address, _, number = local.partition(":")
            protocol = int(number, 16)
            if state == _RAW_UNCONNECTED and protocol != _IPPROTO_RAW:
                found.append(
                    Socket(
                        family=family,
                        protocol=protocol,
                        address=_proc_address(address),
                        port=0,
                        state="RAW",
                        inode=int(inode),
                        uid=int(uid),
                    )
                )
    return found


def _proc_address(text: str) -> IPv4Address | IPv6Address:
    """Words of 32 bits in hexadecimal, each as the machine orders its bytes."""
    packed = bytes.fromhex(text)
    if sys.byteorder == "little":
        packed = b"".join(packed[at : at + 4][::-1] for at in range(0, len(packed), 4))
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


def _owners(paths: HostPaths, pids: Iterable[int], inodes: set[int]) -> dict[int, int]:
    """Socket inode → a process that holds it, by the links in /proc/PID/fd."""
    owners: dict[int, int] = {}
    missing = {inode for inode in inodes if inode}
    for pid in pids:
        if not missing:
            break
        directory = paths.pid(pid, "fd")
        try:
            names = os.listdir(directory)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended, or is not ours to look into: its sockets stay without an owner
        for name in names:
            try:
                target = os.readlink(f"{directory}/{name}")
            except (FileNotFoundError, ProcessLookupError):
                continue  # closed meanwhile
            except PermissionError:
                break
            if target.startswith(_SOCKET_LINK):
                inode = int(target[len(_SOCKET_LINK) : -1])
                if inode in missing:
                    owners[inode] = pid
                    missing.discard(inode)
    return owners


def _command(paths: HostPaths, pid: int) -> str:
    try:
        return paths.pid(pid, "comm").read_text(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""
