"""Which TPM devices a QEMU has, asked of the real ones; and how a word stands in an xl.cfg."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_vtpm_bridge.errors import ConfigError
from qemu_vtpm_bridge.toolstack.device_model import (
    find_device_model,
    qemu_words,
    tpm_devices,
    xl_cfg_list,
)

XEN_QEMU = Path("/usr/libexec/xen-qemu-system-i386")


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_the_distributions_qemu_has_both_and_debians_for_xen_none(tmp_path: Path) -> None:
    qemu = shutil.which("qemu-system-x86_64")
    assert qemu
    assert tpm_devices(Path(qemu), tmp_path) == {"tis", "crb"}
    assert tpm_devices(XEN_QEMU, tmp_path) == frozenset()
    assert find_device_model(None) == XEN_QEMU


def test_it_is_asked_once_and_again_when_the_program_changed(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    text = f'echo "$@" >>{calls}; case $1 in -tpmdev) echo " emulator  yes";; *) echo "$N";; esac'
    qemu = script(tmp_path / "qemu", text.replace("$N", 'name \\"tpm-tis\\", bus ISA'))
    cache = tmp_path / "run"
    for _ in range(3):
        assert tpm_devices(qemu, cache) == {"tis"}
    assert calls.read_text().splitlines() == ["-tpmdev help", "-device help"]
    script(qemu, "exit 1")
    assert tpm_devices(qemu, cache) == frozenset()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"qemu": 1}', '{"qemu": [], "devices": 1}'])
def test_a_cache_that_cannot_be_used_is_not(tmp_path: Path, text: str) -> None:
    (tmp_path / "qemu-probe.json").write_text(text)
    assert tpm_devices(script(tmp_path / "qemu", "exit 1"), tmp_path) == frozenset()


def test_a_cache_that_cannot_be_written_is_no_matter(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert tpm_devices(script(tmp_path / "qemu", "exit 1"), tmp_path / "file") == frozenset()


def test_a_device_model_that_is_none_is_refused(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("no program")
    for path in (plain, tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError) as caught:
            find_device_model(str(path))
        assert "device-model" in caught.value.next_step
    # The wrapper must not become itself, under whatever name.
    qemu = script(tmp_path / "qemu", "exit 0")
    (tmp_path / "link").symlink_to(qemu)
    with pytest.raises(ConfigError):
        find_device_model(str(tmp_path / "link"), not_this=qemu)
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o755)
    with pytest.raises(ConfigError, match="-tpmdev help"):
        tpm_devices(broken, tmp_path)


# What xl makes of a line.


@pytest.fixture(scope="module")
def read_by_xl() -> Callable[[str], list[str]]:
    """Return xl's own reader of a list named `k`."""
    (library, *_) = sorted(Path("/usr/lib").glob("*/libxlutil.so.4.*"))
    xlu, libc = ctypes.CDLL(str(library)), ctypes.CDLL(None)
    xlu.xlu_cfg_init.restype = libc.fdopen.restype = ctypes.c_void_p
    xlu.xlu_cfg_get_listitem.restype = ctypes.c_char_p
    report = ctypes.c_void_p(libc.fdopen(2, b"w"))

    def read(line: str) -> list[str]:
        text = line.encode() + b"\n"
        config = ctypes.c_void_p(xlu.xlu_cfg_init(report, b"test"))
        assert xlu.xlu_cfg_readdata(config, text, len(text)) == 0
        words, count = ctypes.c_void_p(), ctypes.c_int()
        found = xlu.xlu_cfg_get_list(config, b"k", ctypes.byref(words), ctypes.byref(count), 0)
        assert found == 0
        raw = [xlu.xlu_cfg_get_listitem(words, index) for index in range(count.value)]
        xlu.xlu_cfg_destroy(config)
        return [word.decode() for word in raw]

    return read


@given(words=st.lists(st.text(st.characters(codec="ascii", min_codepoint=32), min_size=1)))
def test_xl_reads_what_was_written(
    read_by_xl: Callable[[str], list[str]], words: list[str]
) -> None:
    words = words or ["x"]
    assert read_by_xl(xl_cfg_list("k", words)) == words


def test_the_words_for_qemu_survive_xl(read_by_xl: Callable[[str], list[str]]) -> None:
    words = qemu_words(Path("/run/q,v/a\\x20b.sock"), "crb")
    assert words[1] == "socket,id=chrvtpm,path=/run/q,,v/a\\x20b.sock"
    assert words[-1] == "tpm-crb,tpmdev=vtpm0"
    assert read_by_xl(xl_cfg_list("k", words)) == words
