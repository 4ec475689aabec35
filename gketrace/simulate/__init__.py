"""The walk of a packet through the network namespaces of one node."""
