"""Captured packets.

``packets``  a tap (one interface of one namespace of one node) and a packet that passed it
``ring``     how a packet lies in the kernel's blocks
``dissect``, ``layers``  what is in a packet
``plan``, ``filters``    from a trace to taps, and each one's filter
``segments``, ``conversations``, ``passages``, ``stitch``
             the same packet at each tap, through NAT; connections made of them
``verdicts``  how a connection went, where it died
``clock``    how far nodes' clocks are apart, with a bound
"""
