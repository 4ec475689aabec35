"""Which words of a capture filter may be names."""

from __future__ import annotations

import pytest

from gketrace.capture.filter_names import names_in


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tcp port 80",
        "host 10.0.0.1 and not (port http or portrange 80-90 or port 443)",
        "net 10.0.0.0/8 or net 10.0.0.0 mask 255.0.0.0",
        "ip6 host fd00::1 or dst ::1 or ether host 00:11:22:33:44:5f",
        "tcp[tcpflags]&(tcp-syn|tcp-fin)!=0 and ip[6:2] & 0x1fff = 0",
        "vlan 3 and ip proto \\tcp",
    ],
)
def test_numbers_services_and_keywords_need_no_name_server(text: str) -> None:
    assert names_in(text) == ()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("host web.example.org and port 80", ("web.example.org",)),
        ("src foo or bar or foo", ("foo", "bar")),
        ("host \\tcp", ("\\tcp",)),
        ("host 1.2.3.4.5", ("1.2.3.4.5",)),
        ("host 80-90", ("80-90",)),
        ("host abc:5", ("abc:5",)),
        ("host TCP", ("TCP",)),
    ],
)
def test_what_may_be_a_name_is_one(text: str, names: tuple[str, ...]) -> None:
    assert names_in(text) == names
