"""``gketrace auth can-i``: what is allowed, and what would allow the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gketrace.errors import ExitCode, GketraceError
from gketrace_cli.options import Options
from gketrace_cli.permissions import Level

if TYPE_CHECKING:
    from gketrace_cli.permissions import Answer, As
    from gketrace_cli.render.layout import Page

__all__ = ["can_i"]


def can_i(
    options: Options,
    level: Annotated[
        Level, typer.Option("--for", help="What is to be done: each allows more.")
    ] = Level.VIEWER,
) -> None:
    """Say what you and the ServiceAccount that you ask agents as may do, and print as YAML the
    roles that would allow what is missing.

    With -n NAME: about the pods of that namespace alone, as a tenant.

    For example:  gketrace auth can-i --for capturer -n shop
    """
    from gketrace_cli.cluster import Cluster
    from gketrace_cli.permissions import (
        Answer,
        As,
        account_rights,
        as_account,
        ask,
        grants,
        user_rights,
        who,
    )
    from gketrace_cli.render.documents import dump, envelope
    from gketrace_cli.render.layout import Page, write

    namespace = "" if options.all_namespaces else options.namespace or ""
    account = options.account
    with Cluster.open(
        kubeconfig=options.kubeconfig or "",
        context=options.context or "",
        timeout=options.seconds,
    ) as cluster:
        user = As(name=who(cluster.api))
        answers = {user: ask(cluster.api, user_rights(options.agents_in, account, namespace))}
        asked_as = As(name=account.user, account=account)
        rights = account_rights(level, namespace)
        try:
            speaking = as_account(cluster.api, account, options.seconds)
        except GketraceError as error:
            answers[asked_as] = [
                Answer(right=right, allowed=False, unknown=error.message) for right in rights
            ]
        else:
            try:
                answers[asked_as] = ask(speaking, rights)
            finally:
                speaking.close()
    wanted: list[dict[str, Any]] = []
    for subject, given in answers.items():
        wanted += grants(subject, (a.right for a in given if not a.allowed and not a.unknown))
    fine = all(answer.allowed for given in answers.values() for answer in given)
    if options.format.machine:
        body = {
            "subjects": [_document(subject, given) for subject, given in answers.items()],
            "grants": wanted,
        }
        write(dump(envelope("Permissions", body), options.format))
    else:
        page = Page.of(options)
        page.line(
            _verdict(level, namespace, answers), "green" if fine else "yellow", "bold", hang=2
        )
        for subject, given in answers.items():
            _draw(page, subject, given)
        write(page.text())
        if wanted:
            from gketrace_cli.options import Output

            write("\nWhat is missing would be granted by:\n\n")
            write("---\n".join(dump(one, Output.YAML) for one in wanted))
    raise typer.Exit(int(ExitCode.OK if fine else ExitCode.FORBIDDEN))


def _verdict(level: Level, namespace: str, answers: dict[As, list[Answer]]) -> str:
    """``yes - …``, ``no - …``, as ``kubectl auth can-i`` begins."""
    asked = [answer for given in answers.values() for answer in given]
    lacking = [str(a.right) for a in asked if not a.allowed and not a.unknown]
    unknown = sum(1 for answer in asked if answer.unknown)
    what = f"what a {level.value} needs" + (f" in namespace {namespace}" if namespace else "")
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        return f"no - of {what}, this is missing: {lacking[0]}{more}"
    if unknown:
        return f"could not tell - of {what}, {unknown} of {len(asked)} rights could not be asked"
    return f"yes - {what} is allowed"


def _draw(page: Page, subject: As, answers: list[Answer]) -> None:
    page.blank()
    page.line(f"As {subject.name}:", "bold")
    unknown = {answer.unknown for answer in answers if answer.unknown}
    for answer in answers:
        if answer.allowed:
            page.entry("yes", f"{answer.right}", column=5)
        else:
            word = "?" if answer.unknown else "no"
            why = f" ({answer.right.why})" if answer.right.why else ""
            page.entry(word, f"{answer.right}{why}", "yellow", column=5)
    for text in sorted(unknown):
        page.line(f"could not be asked: {text}", "yellow", indent=3, hang=2)


def _document(subject: As, answers: list[Answer]) -> dict[str, Any]:
    return {
        "name": subject.name,
        "serviceAccount": str(subject.account) if subject.account else None,
        "rights": [
            {
                "verb": answer.right.verb,
                "group": answer.right.group,
                "resource": answer.right.resource,
                "namespace": answer.right.namespace or None,
                "name": answer.right.name or None,
                "allowed": answer.allowed,
                "unknown": answer.unknown or None,
            }
            for answer in answers
        ],
    }
