"""The lab's Kubernetes API server.

A small HTTPS server that speaks enough of the Kubernetes API for the stock Python client, for
kubectl and for gketrace: discovery, get, list, watch, writes, TokenRequest, TokenReview,
SubjectAccessReview and pods/portforward. It starts from the objects of a captured cluster
(``kubectl get -o json`` lists), so what a client reads is what a real API server answered.

How it is put together, from the bottom:

* ``config``      the JSON configuration file, parsed and checked.
* ``resources``   the table of served resources and the discovery documents made from it.
* ``selectors``   label and field selectors.
* ``errors``      ``ApiError`` and the ``Status`` objects it becomes, with the stock messages.
* ``store``       the objects, their resourceVersions and the log of changes that feeds watches.
* ``patch``       JSON merge patch (RFC 7396) and JSON patch (RFC 6902).
* ``tokens``      ServiceAccount tokens: JWTs signed with a key of the server's own.
* ``rbac``        who may do what, from the RBAC objects in the store.
* ``certs``       the CA and the server certificate, and the kubeconfig.
* ``netns``       sockets inside another process's network namespace.
* ``websocket``   RFC 6455 framing, server side.
* ``portforward`` the relay between a WebSocket and a port in a pod's namespace.
* ``watch``       one watch request.
* ``api``         routes a request to what answers it.
* ``http``        connections, TLS, threads, start and stop.

One thread serves one connection. The server's own process stays in the root namespaces; a socket
for a pod is made by a short-lived thread that enters the pod's network namespace and ends.

Run it: ``python -m e2e.kubeapi --config FILE.json``; it prints ``ready KUBECONFIG`` when it serves
and stops on SIGTERM.

What it is not: a scheduler, a kubelet or an admission chain. Objects change only when a client (or
the configuration) changes them. Defaulting and validation are what the tests need, no more;
strategic merge patch, server-side apply, protobuf and SPDY are refused with the proper status.
"""

from __future__ import annotations

__all__: list[str] = []
