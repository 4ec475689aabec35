"""Mutation fuzzing of the parsers and of walks over what they accept.

``python -m tests.fuzz NAME --seconds N --json``.  Seeds are the real dumps under tests/data; each
input is a seed with a few mutations.  An input must be read or be refused with a `ParseError` that
names its source, line and text, within `fuzzer.LIMIT` seconds; anything else is a crash.
"""
