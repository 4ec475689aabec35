"""Connections followed live: events of many places' connection tracking → one record for each.

- ``entries``: what is known of one entry in one place, from its first event to its last.
- ``flow``: the entries of one connection, as far as they have come.
- ``generations``: which connection of its tuples an entry is of.
- ``places``, ``remembered``: what is known of a place, and of entries that were told.
- ``recording``: a flow as it is → what is told of it (``model``).
- ``joiner``: events in any order between places, in their order within one → records of
  connections as they open, change and close.  Which entries make one connection is
  `gketrace.connections`' to say; here is only decided which generation of a tuple an entry is of.
- ``outcome``: what became of a connection, and what that rests on.

Pure: time comes in with each event, in seconds since the epoch, by the clock of the place.
"""
