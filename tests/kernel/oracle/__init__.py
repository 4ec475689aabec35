"""The judge: real packets through real rules, and the kernel's own trace of each.

``bed``        namespaces under test, packets in, links out
``inject``     packets as bytes, and the sockets that send them
``tracing``    the kernel's rule-by-rule trace (nftables trace events, the kernel log for legacy)
``compare``    the kernel's story of one packet against the simulator's
``fixtures``   cases over the real kube-proxy dumps
``generate``   random rule sets and packets (``generate_nft``: tables of nftables)
``fixed_sets`` sets of our own making
``mutate``     deliberate faults in the simulator, each of which must be caught
``__main__``   ``python -m tests.kernel.oracle --cases N --seed S --json``

How a packet is traced without touching the rules under test: a table of our own sets
``meta nftrace`` at the earliest priority, which turns on the trace of both backends
(skb->nf_trace),
and has a last chain in each final hook that shows the packet as it leaves.
"""
