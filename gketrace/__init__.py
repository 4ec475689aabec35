"""gketrace's core: what a packet meets on a Kubernetes node, and why.

Standard library only and no input or output; importable by anybody.

``packet``       a packet's header fields and its connection-tracking tuples
``conntrack``    a connection-tracking entry; ``conntrack_text``, ``_records``, ``_filter``: as
                 conntrack(8) prints it, packed, and which are wanted
``snapshot``     what one network namespace's kernel says at one moment
``objects``      the Kubernetes objects that answers rest on; ``topology``: whose an address is
``ruleset``      iptables and nftables rules, parsed from what the kernel's tools print
``simulate``     the walk of a packet through one node: hooks, matches, targets, routing, NAT
``trace``        the answer's model: Trace → Path → Hop → Step, each step with its citation
``stitch``       walks of several nodes joined into paths, there and back; ``crossing``: from one
                 node to the next
``connections``  entries of many nodes joined into connections, by their ``tuple_keys``;
                 ``follow``: the same, live
``capture``      captured packets, joined through NAT
``findings``     what is wrong, by code
``access``       who may ask an agent for what, by name
``kubenames``    kube-proxy's names of chains and sets
``errors``       the exception tree, exit codes

Time, randomness and files come in as arguments.  What is not known is a value, never a guess.
"""
