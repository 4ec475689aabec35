"""Captured packets.

``packets``  a tap (one interface of one namespace of one node) and a packet that passed it
``ring``     how a packet lies in the kernel's blocks
``dissect``, ``layers``  what is in a packet
"""
