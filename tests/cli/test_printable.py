"""Hostile text from the cluster does nothing to the terminal, and leaves documents whole."""

from __future__ import annotations

import io
import json

import pytest
import yaml

from gketrace_cli.options import Output
from gketrace_cli.printable import PrintableStream, printable
from gketrace_cli.render.documents import dump
from gketrace_cli.render.layout import Page

EVIL = "\x1b]0;title\x07\x1b[2J\x9b31m\x7f\u202e\r"
SHOWN = r"\u001b]0;title\u0007\u001b[2J\u009b31m\u007f\u202e\u000d"


def written(text: str) -> str:
    plain = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="")
    stream = PrintableStream.over(plain)
    stream.write(text)
    stream.flush()
    data: bytes = plain.buffer.getvalue()
    return data.decode()


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert printable(f"a{EVIL}b\tc\n") == f"a{SHOWN}b\tc\n"
    assert written(f"a{EVIL}b\tc\n→ é\n") == f"a{SHOWN}b\tc\n→ é\n"


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", r"caf\xe9 \u2192 \ud800"), ("utf-8", r"café → \ud800")]
)
def test_what_the_encoding_cannot_show_fails_nothing(encoding: str, shown: str) -> None:
    plain = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    stream = PrintableStream.over(plain)
    stream.write("café → \ud800")
    stream.flush()
    assert plain.buffer.getvalue().decode(encoding) == shown


def test_a_page_keeps_its_own_colours_only() -> None:
    page = Page(colored=True)
    page.line("\x1b[32mworks\x1b[0m", "bold", "red")
    page.entry("label", "\x1b[32mworks")
    page.command("run", "kubectl get '\x1b[32m'")
    text = written(page.text())
    assert text.splitlines()[0] == "\x1b[1;31m\\u001b[32mworks\\u001b[0m\x1b[0m"
    assert "\x1b[32m" not in text
    progress = "\r\x1b[Kreading …"
    assert written(progress) == progress


@pytest.mark.parametrize("output", [Output.JSON, Output.YAML])
def test_documents_stay_documents(output: Output) -> None:
    comment = b"caf\xe9 ".decode("utf-8", "surrogateescape") + EVIL
    text = written(dump({"rules": [{"text": comment, "name": "é→"}]}, output))
    read = json.loads(text) if output is Output.JSON else yaml.safe_load(text)
    assert read == {"rules": [{"text": r"caf\xe9 " + EVIL, "name": "é→"}]}
    assert printable(text) == text
