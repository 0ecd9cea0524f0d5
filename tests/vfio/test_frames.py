"""The frames: construct's formats and the structs of the fast way say the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qemu_vtpm_bridge.bridge import vfio_user_frames as frames
from qemu_vtpm_bridge.bridge.pci_config import bar_bytes

U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))


@given(st.tuples(U16, U16, U32, U32, U32))
def test_the_header_is_the_one_that_construct_declares(fields: tuple[int, ...]) -> None:
    names = ("message_id", "command", "size", "flags", "error")
    raw = frames.HEADER_STRUCT.pack(*fields)
    assert frames.HEADER.build(dict(zip(names, fields, strict=True))) == raw
    assert [frames.HEADER.parse(raw)[name] for name in names] == list(fields)


@given(st.tuples(U16, U16, U32, U32, U32, U64, U32, U32))
def test_an_access_is_the_one_that_construct_declares(fields: tuple[int, ...]) -> None:
    raw = frames.ACCESS_STRUCT.pack(*fields)
    header = frames.HEADER.parse(raw)
    body = frames.REGION_ACCESS.parse(raw[frames.HEADER_BYTES :])
    found = [header.message_id, header.command, header.size, header.flags, header.error]
    assert [*found, body.offset, body.region, body.count] == list(fields)
    assert frames.HEADER.build(header) + frames.REGION_ACCESS.build(body) == raw


def test_the_formats_have_the_sizes_of_linux_vfio_h() -> None:
    assert frames.HEADER_BYTES == 16
    assert frames.ACCESS_BYTES == 32
    sizes = {
        frames.DMA_MAP: 32,
        frames.DMA_UNMAP: 24,
        frames.DEVICE_INFO: 16,
        frames.REGION_INFO: 32,
        frames.REGION_IO_FDS: 16,
        frames.IRQ_INFO: 16,
    }
    for form, size in sizes.items():
        assert form.sizeof() == size


@given(st.integers(1, 1 << 30))
def test_a_bar_is_a_power_of_two_that_holds_its_window(span: int) -> None:
    size = bar_bytes(span)
    assert size & size - 1 == 0
    assert size >= max(span, 4096)
    assert size == 4096 or size < 2 * span
