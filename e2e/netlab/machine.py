"""What every machine of the lab starts with, and the machines that are only a network namespace."""

from __future__ import annotations

import errno
import os
import signal
import socket
from pathlib import Path
from typing import NoReturn

from e2e.netlab import linux
from e2e.netlab.state import Cgroup

__all__ = ["forget_mounts", "holder", "quiet_ipv6", "sysctl"]


def sysctl(name: str, value: str) -> None:
    Path("/proc/sys", name.replace(".", "/")).write_text(value)


def quiet_ipv6() -> None:
    """Addresses of links made from here on are usable at once (no duplicate address detection)."""
    for scope in ("all", "default"):
        sysctl(f"net.ipv6.conf.{scope}.accept_dad", "0")
        sysctl(f"net.ipv6.conf.{scope}.accept_ra", "0")


def forget_mounts() -> None:
    """Unmounts the namespaces that this machine names in /run from a new mount namespace.

    The copies that a mount namespace starts with would keep them alive after their deletion.
    """
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        target = line.split()[4]
        if line.split(" - ")[1].startswith("nsfs ") or target.startswith("/run/"):
            try:
                linux.umount(target)
            except OSError as error:
                # Somebody's namespace that ended meanwhile: its unmounting comes here, too.
                if error.errno != errno.EINVAL:
                    raise


def holder(name: str, cgroup: Cgroup, ready: int, *, forwards: bool) -> NoReturn:
    """A machine that is only a network namespace (switch, router, client): waits to be killed."""
    linux.die_with_parent()
    cgroup.join()
    linux.unshare(linux.CLONE_NEWNET | linux.CLONE_NEWNS | linux.CLONE_NEWUTS)
    linux.make_mounts_private()
    forget_mounts()
    linux.mount("sysfs", "/sys", "sysfs")
    socket.sethostname(name)
    quiet_ipv6()
    for scope in ("all", "default"):
        sysctl(f"net.ipv4.conf.{scope}.send_redirects", "0")
        sysctl(f"net.ipv4.conf.{scope}.accept_redirects", "0")
        sysctl(f"net.ipv4.conf.{scope}.rp_filter", "0")
    if forwards:
        sysctl("net.ipv4.ip_forward", "1")
        sysctl("net.ipv6.conf.all.forwarding", "1")
        # For links to come: without the subnet's anycast address, as in NodeInit.sysctls.
        sysctl("net.ipv6.conf.default.forwarding", "0")
    linux.set_process_title(name, f"gketrace-lab {name}")
    os.write(ready, b"1")
    os.close(ready)
    while True:
        signal.pause()
