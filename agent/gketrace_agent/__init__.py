"""The node agent: observes one node's kernel, walks packets over what it sees, serves gRPC.

    main, config   the command line, checked and turned into one `Config`
    server         sockets, health, reflection, signals: the process from start to stop
    interceptor    one place where calls are logged and exceptions become gRPC statuses
    access/        who calls, and what they may; tls: the agent's certificate
    service        the RPCs, each a few lines over the packages below
    info           what data plane this node has, and by which signs
    walks          a packet's walk on this node: the view it walks over, the uplink it comes in by
    snapshots      all that decides about packets on this node, namespace by namespace
    namespaces     a request's target and the namespaces around it, opened for one call
    rulesets       rule sets as text, in pieces for the wire
    conntracks     lists and follows of connection tracking, as messages, lines or records
    captures       captures; capture_taps, _limits, _counts, _finish: their parts
    stall          ends a stream whose client has stopped reading
    metrics        Prometheus on a port of its own, over samples; calls: what its own calls cost
    messages       requests → the agent's own types, and back
    resolve/       pod → sandbox, containers, PIDs, network namespace
    observe/       what one namespace's kernel says, as the core's data
    kernel/        the only place that touches the kernel

A call runs in one pool thread; whatever must happen inside another network namespace runs in a
short-lived thread of its own (`gketrace_agent.kernel.netns`).  Nothing here forks without exec.
"""
