"""gketrace's core: what a packet meets on a Kubernetes node, and why.

Standard library only and no input or output; importable by anybody.

``packet``      a packet's header fields and its connection-tracking tuples
``conntrack``   a connection-tracking entry
``snapshot``    what one network namespace's kernel says at one moment
``ruleset``     iptables and nftables rules, parsed from what the kernel's tools print
``simulate``    the walk of a packet through one node: hooks, matches, targets, routing, NAT
``trace``       the answer's model: Trace → Path → Hop → Step, each step with its citation
``stitch``      walks of several nodes joined into paths, there and back
``findings``    what is wrong, by code
``errors``      the exception tree, exit codes

Time, randomness and files come in as arguments.  What is not known is a value, never a guess.
"""
