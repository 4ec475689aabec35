"""A ServiceAccount, as which agents are asked."""

from __future__ import annotations

from dataclasses import dataclass

from gketrace.errors import UsageError

__all__ = ["Account", "parse_account"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A ServiceAccount."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def user(self) -> str:
        """As roles and audit name it."""
        return f"system:serviceaccount:{self.namespace}:{self.name}"


def parse_account(text: str) -> Account:
    """``NS/NAME``.  Raises `UsageError`."""
    namespace, slash, name = text.partition("/")
    if not (slash and namespace and name) or "/" in name:
        raise UsageError(f"--as-serviceaccount {text}: not NAMESPACE/NAME")
    return Account(namespace=namespace, name=name)
