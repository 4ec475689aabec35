"""``python -m gketrace_agent.kernel.nft_rules 4|6``: iptables-nft's tables of one family.

On standard output those that are known here; on standard error one line for each of the others:
its name, a tab, and the reason.  1, and a line on stderr, when nothing could be read.
"""

from __future__ import annotations

import sys

from gketrace.errors import GketraceError
from gketrace_agent.kernel.netlink import NETLINK_NETFILTER, NetlinkSocket
from gketrace_agent.kernel.nfnetlink import nft_tables
from gketrace_agent.kernel.nft_rules.save import nft_chains, nft_text

__all__ = ["main"]

_NFT_FAMILY = {"4": "ip", "6": "ip6"}


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in _NFT_FAMILY:
        sys.stderr.write("usage: nft_rules 4|6\n")
        return 2
    family = int(arguments[0])
    netfilter = NetlinkSocket(NETLINK_NETFILTER)
    try:
        names = {t.name for t in nft_tables(netfilter) if t.family == _NFT_FAMILY[arguments[0]]}
        found = nft_text(netfilter, family, names, nft_chains(netfilter, family))
    except (GketraceError, ValueError) as error:  # ValueError: broken attributes
        sys.stderr.write(f"{error}\n")
        return 1
    finally:
        netfilter.close()
    sys.stdout.buffer.write(found.text)
    sys.stdout.buffer.flush()
    for table in found.left:
        sys.stderr.write(f"{table.table}\t{table.reason}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
