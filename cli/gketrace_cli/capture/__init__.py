"""Captures of many agents at once.

``stream``   calls to the agents; what comes back, as events
``batch``    packets that came together, as NumPy columns
``merge``    events of several taps in time order
``pcapng``   files, written block by block
``reader``   files, read
``lines``    packets as text
"""
