"""A libvirt domain's XML: what is taken from it, what is refused, what is written into it."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_vtpm_bridge.errors import ConfigError
from qemu_vtpm_bridge.toolstack.domain_xml import (
    DEPTH_MAX,
    NAMESPACE,
    TEXT_MAX_CHARS,
    XML_MAX_BYTES,
    Domain,
    kvm_snippet,
    parse_domain,
    xen_snippet,
)

WHOLE = f"""\
<?xml version='1.0' encoding='UTF-8'?>
<domain type='xen'>
  <name>web &amp; mail/..</name>
  <uuid>5f0d4b5e-7a34-4ee2-8a0d-6e5c54a1b0c7</uuid>
  <metadata>
    <other:thing xmlns:other='urn:other'><name>not this one</name></other:thing>
    <tpm:vtpm xmlns:tpm='{NAMESPACE}' backend='vtpm' handle='1'/>
  </metadata>
  <devices><emulator>/usr/bin/dm</emulator><disk><name>nor this</name></disk></devices>
</domain>
"""


def named(name: str) -> bytes:
    return f"<domain><name>{name}</name></domain>".encode()


def test_name_uuid_and_our_element_are_found_and_nothing_else() -> None:
    assert parse_domain(WHOLE.encode()) == Domain(
        "web & mail/..",
        "5f0d4b5e-7a34-4ee2-8a0d-6e5c54a1b0c7",
        "/usr/bin/dm",
        {"backend": "vtpm", "handle": "1"},
    )
    assert parse_domain(named("guest")) == Domain("guest")


def test_an_element_of_another_namespace_is_not_ours() -> None:
    other = WHOLE.replace(NAMESPACE, "urn:somebody-else")
    assert parse_domain(other.encode()).vtpm is None
    without = WHOLE.replace(f" xmlns:tpm='{NAMESPACE}'", "").replace("tpm:vtpm", "vtpm")
    assert parse_domain(without.encode()).vtpm is None


BOMB = (
    "<!DOCTYPE domain [<!ENTITY a 'aaaaaaaaaa'>"
    + "".join(
        f"<!ENTITY {b} '{'&' + a + ';'}{'&' + a + ';'}'>"
        for a, b in zip("abcdef", "bcdefg", strict=True)
    )
    + "]><domain><name>&g;</name></domain>"
)
FILE = (
    "<!DOCTYPE domain [<!ENTITY secret SYSTEM 'file:///etc/passwd'>]>"
    "<domain><name>&secret;</name></domain>"
)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "no element found"),
        (b"\0\xff\xfe", "invalid token|not well-formed|syntax error"),
        (b"<domain><name>guest</name>", "no element found"),
        (b"<domain/>", "no <domain> with a <name>"),
        (b"<hookData><network><name>net</name></network></hookData>", "no <domain>"),
        (b"<?xml version='1.0' encoding='no-such'?><domain/>", "unknown encoding"),
        (BOMB.encode(), "document type"),
        (FILE.encode(), "document type"),
        (b"<domain><name>a</name><name>b</name></domain>", "<name> is there twice"),
        (named("x" * (TEXT_MAX_CHARS + 1)), f"more than {TEXT_MAX_CHARS} characters"),
        (b"<a>" * (DEPTH_MAX + 1), f"more than {DEPTH_MAX} deep"),
        (b" " * (XML_MAX_BYTES + 1), "more than 4 MiB"),
        (
            f"<domain><name>a</name><metadata xmlns:t='{NAMESPACE}'>"
            "<t:vtpm/><t:vtpm/></metadata></domain>".encode(),
            "two <vtpm> elements",
        ),
    ],
)
def test_what_is_no_domain_or_would_grow_is_refused_with_the_reason(raw: bytes, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        parse_domain(raw)
    assert "virsh dumpxml" in caught.value.next_step


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_P9_any_bytes_are_a_domain_or_refused(raw: bytes) -> None:
    for whole in (raw, b"<domain><name>" + raw, b"<domain><name>a</name>" + raw + b"</domain>"):
        with suppress(ConfigError):
            assert len(parse_domain(whole).name) <= TEXT_MAX_CHARS


ODD = "/run/a'b\"c<d>&e.sock"


@pytest.mark.skipif(
    shutil.which("virt-xml-validate") is None or shutil.which("xmllint") is None,
    reason="libvirt-clients or libxml2-utils is not installed",
)
def test_the_snippets_are_valid_where_they_belong(tmp_path: Path) -> None:
    """libvirt's own schemas judge them, whatever a path holds."""
    arguments = ["-chardev", f"socket,id=chrtpm,path={ODD}", "-device", "tpm-crb,tpmdev=tpm0"]
    for kind, in_devices, beside in (
        ("xen", "", xen_snippet(arguments)),
        ("qemu", kvm_snippet(ODD, "tpm-crb"), ""),
    ):
        domain = tmp_path / f"{kind}.xml"
        domain.write_text(
            f"<domain type='{kind}'><name>guest</name><memory>65536</memory>"
            f"<metadata><t:vtpm xmlns:t='{NAMESPACE}' backend='vtpm'/></metadata>"
            "<os><type>hvm</type></os>"
            f"<devices>{in_devices}</devices>{beside}</domain>",
            encoding="utf-8",
        )
        done = subprocess.run(
            ["virt-xml-validate", str(domain), "domain"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert parse_domain(domain.read_bytes()).vtpm == {"backend": "vtpm"}
