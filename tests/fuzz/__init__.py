"""Mutation fuzzing of whatever the agent and the CLI read.

``python -m tests.fuzz NAME --seconds N --json``.  Seeds are real: the dumps under tests/data, what
this machine's kernel answers, an agent's own requests; each input is a seed with a few mutations.
An input must be read or be refused with the errors that its reader may raise (a `ParseError` names
its source, line and text), within `fuzzer.LIMIT` seconds; anything else is a crash.  The memory of
what is fuzzed must not grow.

    targets   what is fuzzed, by name         fuzzer   runs one, and counts
    mutate    text and JSON                   binary   messages
    netlink   all kinds of netlink sockets    files    /proc, kubeconfig, API objects, packets
    live      a runtime that answers nonsense, an agent that is asked it
"""
