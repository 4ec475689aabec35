"""What goes over the wire: generated stubs and the codec between them and the core's types.

``v1alpha1``  the agent's own API
``cri``       the few calls of the container runtime interface that the agent makes
``codec``     core dataclass ↔ message, mapped by field name
"""
