"""What is wrong, with evidence and remedy: pure functions over what was read of a cluster.

::

    model.py        Finding, Evidence, Severity, Confidence
    registry.py     every code: its title, family and usual severity
    world.py        World: objects, each node's snapshots, connections, traced ways
    programme.py    what kube-proxy programmed on one node, read from its rules
    expected.py     what it should have programmed, from Services and EndpointSlices
    detect.py       the detectors, in the order of the registry; `find` runs them and groups
    grouping.py     by cause: what one rule, route, switch or node explains is one finding
    making.py       how findings and their evidence are put together
    services.py     Services alone: no endpoints, none ready, policies, names of ports, ranges
    listeners.py    who listens where an endpoint should
    proxy.py        kube-proxy: drift, canaries, backends, health, affinity
    tables.py       connection tracking's room: full, losses, ports, INVALID
    flows.py        its entries: stale, older than a rule, one-sided, unreplied
    ways.py         traced ways that fail: which rule, route, switch or neighbour stopped them
    undelivered.py  where the last link is down, or nobody has the address there
    balancers.py    load balancers' health checks that do not get through
    stop.py         where one of them ended, and answers that nobody translates back
    routes.py       routes of every node to every pod, and of every pod
    links.py        interfaces, bridges, neighbours, MTU
    masquerade.py   masquerading, and what stands in the way of answers
    kinds.py        what is not an ordinary pod or node: data planes, sandboxes, hostNetwork

Where a walk tells (`gketrace.simulate`), a detector asks the walk and does not second-guess it.  A
detector says nothing about what it could not see; what was not seen is `World.missing`.
"""
