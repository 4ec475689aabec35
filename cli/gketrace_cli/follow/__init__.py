"""``--follow``: connections live, from the agents' conntrack events to lines and a summary.

- ``scope``: what is followed: the filters that agents are sent, and whose a connection is.
- ``request``: what was asked for.
- ``world``, ``objects``: the cluster's objects as they were read last; what became different.
- ``streams``: one call to each agent that does not end; reconnects, and says what was missed.
- ``intake``: what came over them, for the core's joiner: clocks, losses, returns.
- ``packet_plan``, ``packets``, ``seen``: with ``--packets``: where they are captured, those of each
  connection, and what they say of it.
- ``counting``: packets and bytes of entries, read from the tables.
- ``rulebook``: walks that tell which rules translate, with what odds, and where a packet would die.
- ``view``: a connection with names, rules and remarks; what of it was asked for.
- ``records``: holds each connection until its rules and packets are known, shows and counts it.
- ``tally``: what the summary counts.
- ``show``, ``output``: lines or documents; a thread that writes them, so that a slow reader never
  holds up the reading, and the sample that a terminal gets.
- ``run``: puts them together until it is interrupted.
"""
