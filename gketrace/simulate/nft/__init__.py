"""nftables as the kernel runs it: expressions, statements, and the way through a base chain.

::

    values.py       what an expression gives: a value, BREAK, or not known; branches of it
    datatypes.py    nft's data types: constants of the JSON → numbers, ranges, flags
    sets.py         elements of sets and maps, indexed; look-ups with fields that are not known
    scene.py        the packet, its surroundings and its table, as expressions see them
    payload.py      header fields
    meta.py         meta, ct, fib, socket and the like
    expressions.py  evaluate(expression) → branches
    matching.py     match, and the look-ups of vmap and map
    changes.py      mangle, and the updates of sets
    nat.py          dnat, snat, masquerade, redirect
    statements.py   one rule's statements, one after the other
    ways.py         what may come of one: verdicts, branches, what is not known
    run.py          traverse(): jumps, goto, verdicts, policies

Each expression writes a register in the kernel (net/netfilter/nft_*.c); one that cannot do so sets
NFT_BREAK, and the rule does not match.  Here it gives `BREAK`.
"""

from __future__ import annotations
