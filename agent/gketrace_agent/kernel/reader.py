"""Everything that is read in one namespace goes through one `KernelReader`."""

from __future__ import annotations

import os
from typing import Final

from gketrace_agent.kernel.hostpaths import HostPaths
from gketrace_agent.kernel.netlink import (
    NETLINK_NETFILTER,
    NETLINK_ROUTE,
    NETLINK_SOCK_DIAG,
    Dump,
    Message,
    NetlinkSocket,
)

__all__ = ["KernelReader"]


class KernelReader:
    """The netlink sockets of one namespace, opened when first needed, and its files.

    Make it inside the namespace (`run_in_netns`).  Its sockets work from any thread afterwards; its
    files (`read_net`, `read_sysctl`) are those of the *calling* thread, so read them inside
    `run_in_netns` only.
    """

    def __init__(self, paths: HostPaths, inode: int) -> None:
        self.paths: Final = paths
        self.inode: Final = inode
        self.inconsistent: Final[list[str]] = []
        """Names of the tables that changed under every attempt to read them."""
        self._sockets: dict[int, NetlinkSocket] = {}

    def _socket(self, protocol: int) -> NetlinkSocket:
        if protocol not in self._sockets:
            if os.stat("/proc/thread-self/ns/net").st_ino != self.inode:
                raise RuntimeError("a reader's socket must be opened inside its namespace")
            self._sockets[protocol] = NetlinkSocket(protocol)
        return self._sockets[protocol]

    @property
    def rtnl(self) -> NetlinkSocket:
        return self._socket(NETLINK_ROUTE)

    @property
    def diag(self) -> NetlinkSocket:
        return self._socket(NETLINK_SOCK_DIAG)

    @property
    def netfilter(self) -> NetlinkSocket:
        return self._socket(NETLINK_NETFILTER)

    def messages(self, name: str, dump: Dump) -> list[Message]:
        """The dump's messages; remembers under `name` when they are not one moment's."""
        if not dump.consistent and name not in self.inconsistent:
            self.inconsistent.append(name)
        return dump.messages

    def read_net(self, *parts: str) -> str:
        """A file under /proc/net.  Raises FileNotFoundError and other OSErrors."""
        with open(self.paths.thread_net(*parts), "rb") as file:
            return file.read().decode("utf-8", "backslashreplace")

    def list_net(self, *parts: str) -> list[str]:
        """Names in a directory under /proc/net."""
        return sorted(os.listdir(self.paths.thread_net(*parts)))

    def close(self, *, keep: frozenset[int] = frozenset()) -> None:
        """Closes the sockets but those of the protocols in `keep`; may be called again."""
        for protocol in set(self._sockets) - keep:
            self._sockets.pop(protocol).close()
