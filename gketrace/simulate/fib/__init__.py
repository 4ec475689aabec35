"""Routing tables, policy rules and source selection of one namespace.

`gketrace.simulate.routing.Fib` is the way in.
"""
