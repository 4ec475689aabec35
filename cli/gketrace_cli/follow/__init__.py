"""``--follow``: connections live, from the agents' conntrack events to lines and a summary.

- ``scope``: what is followed: the filters that agents are sent, and whose a connection is.
- ``streams``: one call to each agent that does not end; reconnects, and says what was missed.
- ``rulebook``: walks that tell which rules translate, with what odds, and where a packet would die.
- ``view``: a connection with names, rules and remarks; what of it was asked for.
- ``tally``: what the summary counts.
- ``output``: a thread that writes, so that a slow reader never holds up the reading.
- ``run``: puts them together until it is interrupted.
"""
