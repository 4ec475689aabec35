"""Who calls, and what they may: before every call.

* ``apiserver``   the Kubernetes API as the agent's own ServiceAccount.
* ``cache``       answers for a while, at most so many, one question at a time for each key.
* ``seats``       who asks now: the known before others, others in turn.
* ``identity``    bearer token → `Caller`, by TokenReview.
* ``permission``  `Caller`, call and target → allowed or not, by SubjectAccessReview.
* ``scope``       what of a reply a caller may see who has permission for some namespaces only.
* ``masking``     the addresses and names of other namespaces out of messages.
* ``edge``        what a request may be made of.
* ``bounds``      calls at once, by class and by user; memory.
* ``guard``       all of the above around one call.

Everything fails closed: what cannot be asked is refused, and the refusal says why.  A caller on
the unix socket (mode 0600) is root on the node: nothing that an agent could refuse is refused.
"""

from __future__ import annotations

__all__: list[str] = []
