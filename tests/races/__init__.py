"""Pods, namespaces and agents that go away in the middle of a call.

``python -m tests.races --times N --json``.  In a PID, mount and network namespace of its own, an
agent is asked about a pod which is killed at a random moment of the call; at once another pod
begins, with the same PID.  Each pod has an address, a route and a tracked connection that no other
has, so that an answer from another namespace shows, also where the kernel used an inode again.

    pods    a pod: a process in a cgroup and a network namespace, with the PID that is wanted
    calls   the calls, and what proves that an answer is of the right namespace
    agent   the agent's process, as often as it is started
    inside  the rounds, and what is left behind
"""
