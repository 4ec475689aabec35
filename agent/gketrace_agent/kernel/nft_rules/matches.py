"""xtables' matches, from the structs of the kernel's uapi to the options that print them.

One function for each name and revision; the revision is the one that iptables-nft 1.8.7 to 1.8.11
write.  A flag, a mode or a length that is not known raises NotRendered: nothing is guessed.

Source: include/uapi/linux/netfilter/xt_*.h; iptables extensions/libxt_*.c, libipt_*.c, libip6t_*.c
(the functions named in ``.save``).
"""

from __future__ import annotations

from typing import Final

from gketrace_agent.kernel.nft_rules.extension import Renderers
from gketrace_agent.kernel.nft_rules.matches_header import HEADER_MATCHES
from gketrace_agent.kernel.nft_rules.matches_state import STATE_MATCHES

__all__ = ["MATCHES"]

MATCHES: Final[Renderers] = {**HEADER_MATCHES, **STATE_MATCHES}
