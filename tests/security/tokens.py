"""Tokens that nobody made."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

from gketrace.access import audience

__all__ = ["claims_of", "forged"]


def claims_of(token: str) -> dict[str, Any]:
    """What a token says."""
    body = token.split(".")[1]
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    return found


def forged(node: str, account: str = "default:admin") -> str:
    """A token that says all the right things, signed by nobody."""

    def part(document: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(document).encode()).decode().rstrip("=")

    claims = {
        "aud": [audience(node)],
        "exp": int(time.time()) + 600,
        "sub": f"system:serviceaccount:{account}",
    }
    return f"{part({'alg': 'ES256'})}.{part(claims)}.{'A' * 86}"
