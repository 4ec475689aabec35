"""The command line: asks the cluster and the agents, and draws what they say.

One question goes through these modules, in this order:

``main``       runs the program: error → one line and an exit code; never a traceback
``app``        the commands, registered one by one
``options``    what every command understands (namespace, context, output, …) → `Options`
``session``    opens the cluster and the agents at the same time, and closes them again
``cluster``    the Kubernetes API → `gketrace.objects` (typed pods, services, endpoints, nodes)
``agents``     gRPC to one agent per node, all nodes at once; who does not answer is `Missing`
``names``      ``pod/NAME``, ``2jdh``, ``[fd00::1]:80``: what people type → who is meant
``frontdoors`` a Service → the questions to ask: which door, from whom, on which node
``commands``   one file per verb; gathers, asks, judges, prints
``verdict``    paths → one sentence and an exit code
``render``     text, JSON and YAML; writes only, decides nothing

Larger commands have a package of their own, whose docstring says how it works: ``capture``,
``follow``, ``bundle`` (and ``diff``), ``checking`` (`gketrace check`, and findings beside answers).
``conntrack_*`` are the parts of `gketrace conntrack`.

Heavy imports (grpc, the Kubernetes client) are made where they are used, so that ``--help`` and
a usage error answer at once.
"""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
