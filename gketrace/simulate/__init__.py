"""The walk of a packet through the network namespaces of one node.

::

    here.py         a packet's walk on one node: where it comes in, the walk itself, what it lacks
    query.py        what a walk is asked
    walk.py         `walk`: from one hook to the next, until a packet's way ends; the tree of ways
    cursor.py       where a walk is: one packet at one point of one namespace, and the ways on
    namespace.py    one namespace as a walk uses it: its hooks as data, links, routing, sysctls
    state.py        what travels with a packet beside its header: mark, tracking, interfaces

    station.py, order.py, ties.py      what stands on a hook; in which order, and where that is open
    stations.py                        a packet past the stations of one hook
    station_chain.py, station_nat.py, station_conntrack.py   one kind of station each

    traversal.py    which evaluator goes through a chain: `chains` (iptables) or ``nft/``
    running.py, threads.py             what both have in common: the ways through a chain
    matches/, targets/                 iptables' extensions, one class each
    tracking.py, nat.py                nf_conntrack_in; nf_nat_setup_info, over tuples

    arrival.py      by which interface a packet from the network comes in
    bridging.py, ports.py              bridges, br_netfilter, whose a link address is
    routing.py, fib/                   `Fib`: route look-ups, as the kernel does them
    routes.py       what a routing decision means for the walk, and the steps that cite it
    transmit.py     out of a namespace: neighbour, device, the other end of a veth
    delivery.py     which socket takes it, or who refuses it

    paths.py, recall.py, watched.py, evolve.py   for speed alone: answers are the same without

A walk takes a `NodeView` of what was observed, and does no input or output.  Where the kernel draws
lots, or where something is not known, it forks (`gketrace.simulate.cursor.Way`): each way has its
chance, `None` where that is not known, and the condition that it rests on.
"""
