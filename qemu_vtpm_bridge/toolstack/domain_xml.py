"""What a libvirt domain's XML says to the bridge, and what the bridge has written into one.

Theory of operation.  A hook gets the whole XML of a domain on standard input.  Four things
matter in it: the name, the UUID, the emulator, and an element of this program's own in the
metadata, for who would rather keep a guest's TPM with the guest than in the guests file:

    <metadata>
      <tpm:vtpm xmlns:tpm="urn:qemu-vtpm-bridge:domain:1" backend="vtpm-of-guest"/>
    </metadata>

Its attributes are the guests file's keys.  Everything else is passed over while it is read,
so that the size of what is kept does not depend on the size of the XML.

Keeps P9 and P10.  Who may lie: whoever defines a domain chooses what the XML holds.  It is
bounded, and a document type is refused altogether, since that is where entities come from
which expand to more than was sent or to other files; libvirt never writes one.

Source: libvirt's formatdomain and drvxen documents, and its domain.rng.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final
from xml.parsers import expat
from xml.sax.saxutils import quoteattr

from ..errors import ConfigError

NAMESPACE: Final = "urn:qemu-vtpm-bridge:domain:1"
XML_MAX_BYTES: Final = 4 << 20
"""libvirt itself takes no more than this from a client as one string."""

DEPTH_MAX: Final = 64
TEXT_MAX_CHARS: Final = 4096

_NAME: Final = ("domain", "name")
_UUID: Final = ("domain", "uuid")
_EMULATOR: Final = ("domain", "devices", "emulator")
_TEXTS: Final = (_NAME, _UUID, _EMULATOR)
_VTPM: Final = ("domain", "metadata", f"{NAMESPACE} vtpm")


@dataclass(frozen=True, slots=True)
class Domain:
    """What was found in a domain's XML; texts are as they were written."""

    name: str = ""
    uuid: str = ""
    emulator: str = ""
    """The program that libvirt starts as the guest's QEMU; empty where it chooses one."""
    vtpm: dict[str, str] | None = None
    """The attributes of our element in the metadata; None where there is none."""


@dataclass
class _Reader:
    """Follows the parser, and keeps only what is asked for."""

    path: list[str] = field(default_factory=list)
    texts: dict[tuple[str, ...], str] = field(default_factory=dict)
    vtpm: dict[str, str] | None = None

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self.path.append(name)
        if len(self.path) > DEPTH_MAX:
            raise _refused(f"elements lie more than {DEPTH_MAX} deep in each other")
        place = tuple(self.path)
        if place in _TEXTS:
            if place in self.texts:
                raise _refused(f"<{name}> is there twice")
            self.texts[place] = ""
        if place == _VTPM:
            if self.vtpm is not None:
                raise _refused("its metadata have two <vtpm> elements")
            self.vtpm = dict(attributes)

    def end(self, name: str) -> None:
        del name
        self.path.pop()

    def text(self, data: str) -> None:
        place = tuple(self.path)
        if place in self.texts:
            self.texts[place] += data
            if len(self.texts[place]) > TEXT_MAX_CHARS:
                raise _refused(f"<{place[-1]}> has more than {TEXT_MAX_CHARS} characters")

    def doctype(self, *_: Any) -> None:
        raise _refused("it declares a document type")


def _refused(why: str) -> ConfigError:
    return ConfigError(
        f"the domain's XML cannot be used: {why}",
        state="it is read from standard input, as libvirt gives it to a hook",
        next_step="see `virsh dumpxml` of that domain",
    )


def parse_domain(raw: bytes) -> Domain:
    """Return what a domain's XML says; raises ConfigError where it is none."""
    if len(raw) > XML_MAX_BYTES:
        raise _refused(f"it has more than {XML_MAX_BYTES >> 20} MiB")
    reader = _Reader()
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.text
    parser.StartDoctypeDeclHandler = reader.doctype
    try:
        parser.Parse(raw, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise _refused(str(error)) from error
    if _NAME not in reader.texts:
        raise _refused("there is no <domain> with a <name>")
    name, uuid, emulator = (reader.texts.get(place, "") for place in _TEXTS)
    return Domain(name, uuid, emulator, reader.vtpm)


# What goes into a domain's XML.


def xen_snippet(arguments: list[str]) -> str:
    """Return the element that hands QEMU's words through libvirt's Xen driver."""
    lines = "".join(f"  <xen:arg value={quoteattr(word)}/>\n" for word in arguments)
    return (
        "<xen:commandline xmlns:xen='http://libvirt.org/schemas/domain/xen/1.0'>\n"
        f"{lines}</xen:commandline>"
    )


def kvm_snippet(socket: str, device: str) -> str:
    """Return the element that gives a guest of libvirt's QEMU driver its TPM."""
    return (
        f"<tpm model={quoteattr(device)}>\n"
        "  <backend type='external'>\n"
        f"    <source type='unix' mode='connect' path={quoteattr(socket)}/>\n"
        "  </backend>\n"
        "</tpm>"
    )
