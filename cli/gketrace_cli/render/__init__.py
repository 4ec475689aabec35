"""Writes answers: ``documents`` (JSON, YAML), ``trace`` and ``pod`` (text); ``layout`` is shared.

Nothing here decides or asks; it only draws what it is given.
"""

from __future__ import annotations
