"""Captures of many agents at once.

``stream``   calls to the agents; what comes back, as events
``batch``    packets that came together, as NumPy columns
``merge``    events of several taps in time order
``pcapng``   files, written block by block; ``packet_blocks``: packets' blocks, many at a time
``reader``   files, read
``lines``    packets as text
"""
