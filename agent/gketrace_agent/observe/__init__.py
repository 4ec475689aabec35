"""What one namespace's kernel says, as the data of `gketrace.snapshot`.

One module for each noun, of the same name as the snapshot's field: ``observe_NOUN(reader, …)``
takes a `KernelReader` and gives data, gives `Unavailable`, or raises.  `snapshot.Observer` runs
them all in one thread inside the namespace, times each, and turns whatever fails into
`Unavailable` and a `Missing`: one failure never sinks the snapshot.  `view.LiveNodeView` is how a
walk reaches the node's namespaces.

Nothing here does I/O itself: that is `gketrace_agent.kernel`.
"""
