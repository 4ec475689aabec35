"""The sysctls that decide what becomes of a packet.

Those of single interfaces come with the links (`gketrace_agent.observe.links`).

Source: kernel Documentation/networking/ip-sysctl.rst, nf_conntrack-sysctl.rst,
net/bridge/br_netfilter_hooks.c.
"""

from __future__ import annotations

import errno
import os
from typing import Final

from gketrace_agent.kernel.reader import KernelReader

__all__ = ["observe_sysctls"]

_GLOBAL: Final = (
    "net.ipv4.ip_forward",
    "net.ipv4.ip_forward_update_priority",
    "net.ipv4.ip_forward_use_pmtu",
    "net.ipv4.ip_default_ttl",
    "net.ipv4.ip_no_pmtu_disc",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_nonlocal_bind",
    "net.ipv4.ip_early_demux",
    "net.ipv4.fib_multipath_hash_policy",
    "net.ipv4.fib_multipath_use_neigh",
    "net.ipv4.fwmark_reflect",
    "net.ipv4.icmp_echo_ignore_all",
    "net.ipv4.icmp_errors_use_inbound_ifaddr",
    "net.ipv4.tcp_fwmark_accept",
    "net.ipv4.tcp_l3mdev_accept",
    "net.ipv4.udp_l3mdev_accept",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_mtu_probing",
    "net.ipv4.tcp_max_syn_backlog",
    "net.ipv4.tcp_abort_on_overflow",
    "net.ipv4.vs.conntrack",
    "net.ipv6.bindv6only",
    "net.ipv6.fib_multipath_hash_policy",
    "net.ipv6.fwmark_reflect",
    "net.ipv6.icmp.echo_ignore_all",
    "net.ipv6.ip_nonlocal_bind",
    "net.core.somaxconn",
    "net.sctp.max_burst",
    "net.netfilter.nf_conntrack_acct",
    "net.netfilter.nf_conntrack_buckets",
    "net.netfilter.nf_conntrack_checksum",
    "net.netfilter.nf_conntrack_count",
    "net.netfilter.nf_conntrack_helper",
    "net.netfilter.nf_conntrack_log_invalid",
    "net.netfilter.nf_conntrack_max",
    "net.netfilter.nf_conntrack_tcp_be_liberal",
    "net.netfilter.nf_conntrack_tcp_loose",
    "net.netfilter.nf_conntrack_tcp_timeout_close_wait",
    "net.netfilter.nf_conntrack_tcp_timeout_established",
    "net.netfilter.nf_conntrack_udp_timeout",
    "net.netfilter.nf_conntrack_udp_timeout_stream",
    "net.netfilter.nf_hooks_lwtunnel",
    "net.bridge.bridge-nf-call-iptables",
    "net.bridge.bridge-nf-call-ip6tables",
    "net.bridge.bridge-nf-call-arptables",
    "net.bridge.bridge-nf-filter-vlan-tagged",
    "net.bridge.bridge-nf-filter-pppoe-tagged",
    "net.bridge.bridge-nf-pass-vlan-input-dev",
)
_INET: Final = (
    "accept_local",
    "accept_redirects",
    "accept_source_route",
    "arp_accept",
    "arp_announce",
    "arp_filter",
    "arp_ignore",
    "arp_notify",
    "bc_forwarding",
    "forwarding",
    "ignore_routes_with_linkdown",
    "log_martians",
    "proxy_arp",
    "proxy_arp_pvlan",
    "route_localnet",
    "rp_filter",
    "send_redirects",
    "shared_media",
    "src_valid_mark",
)
_INET6: Final = (
    "accept_ra",
    "accept_redirects",
    "accept_source_route",
    "disable_ipv6",
    "force_forwarding",
    "forwarding",
    "ignore_routes_with_linkdown",
    "proxy_ndp",
)
NAMES: Final = (
    *_GLOBAL,
    *(f"net.ipv4.conf.{who}.{name}" for who in ("all", "default") for name in _INET),
    *(f"net.ipv6.conf.{who}.{name}" for who in ("all", "default") for name in _INET6),
)
_LONGEST: Final = 1 << 16


def observe_sysctls(reader: KernelReader) -> dict[str, str]:
    """Dotted name → value, for the namespace that the calling thread is in.

    A name that this kernel does not have (a module is not loaded, a namespace is not given it) is
    absent.  Values are as the file prints them, tabs as blanks.
    """
    root = os.fspath(reader.paths.proc / "sys")
    found: dict[str, str] = {}
    for name in NAMES:
        try:
            fd = os.open(f"{root}/{name.replace('.', '/')}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                continue
            raise
        try:
            found[name] = " ".join(os.read(fd, _LONGEST).decode("ascii", "replace").split())
        finally:
            os.close(fd)
    return found
