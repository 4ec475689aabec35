"""Pod → sandbox, containers, PIDs and network namespace.

    model      `PodRef` (who is meant), `ResolvedPod` (what was found, and by which steps)
    cgroup     pure: /proc/PID/cgroup text → pod UID, container id, which runtime's naming
    process    what /proc says of one process, guarded against PID re-use
    host       the node's own network namespace
    scan       all processes of the node by pod UID and container id
    cri        the container runtime's own answer (CRI v1 over its unix socket)
    directory  many pods' namespaces at once, for a walk
    by_runtime the search through the runtime, by_cgroup the one through the scan
    resolver   `Resolver`: the runtime first, the cgroup scan where it cannot tell

The runtime knows a pod by namespace and name; the cgroup scan only by UID or container id, as
nothing else is in a cgroup's path.  Whichever way it went, the namespace is opened (so that it
cannot vanish or change identity), and what the two sources say of it is compared: the inode of the
sandbox's path, of its process and of its containers' processes must be one and the same.
"""
