"""From a session to findings.

::

    sights.py   reads the nodes: one Snapshot call each, connections, statistics at the end
    offline.py  walks over what was read, without asking an agent again
    probes.py   which ways to trace in a check of the whole cluster
    health.py   the probes of load balancers' health checks
    ways.py     answers → the ways that detectors look at
"""
