"""The data sheet of the CRB (command/response buffer) device.

Values and access rules are those of QEMU 7.2's tpm-crb, which is what a guest is to see
(promise P11): one locality, no interrupts, and writes that act only where offset and
value match as a whole.  Source: PC Client Platform TPM Profile, 6.4.
"""

from __future__ import annotations

from typing import Final

from .registers import Access, Field, Register, RegisterMap, bit

_RO, _RW, _WO, _W1 = (
    Access.READ_ONLY,
    Access.READ_WRITE,
    Access.WRITE_ONLY,
    Access.WRITE_ONE_ACTS,
)

BASE_ADDRESS: Final = 0xFED40000
"""Where a PC has its TPM; the registers name their buffer by address."""

BUFFER_OFFSET: Final = 0x80
BUFFER_BYTES: Final = 0xF80

LOC_STATE: Final = Register(
    "LOC_STATE",
    0x00,
    _RO,
    "Who uses the TPM. A read from its first byte on shows tpmEstablished.",
    (
        bit("tpmRegValidSts", 7, _RO, "The other bits are valid: always."),
        Field("activeLocality", 4, 2, _RO, "Which locality is active: 0."),
        bit("locAssigned", 1, _RO, "A locality is active."),
        bit("tpmEstablished", 0, _RO, "0 once a D-RTM sequence has happened."),
    ),
    reset=0x81,
)
LOC_CTRL: Final = Register(
    "LOC_CTRL",
    0x08,
    _WO,
    "Asks for the TPM or gives it up; one bit at a time.",
    (
        bit("resetEstablishmentBit", 3, _WO, "Accepted, and without effect."),
        bit("Seize", 2, _WO, "Accepted, and without effect."),
        bit("relinquish", 1, _WO, "Give the TPM up."),
        bit("requestAccess", 0, _WO, "Ask for the TPM; granted at once."),
    ),
)
LOC_STS: Final = Register(
    "LOC_STS",
    0x0C,
    _RO,
    "What became of a request.",
    (
        bit("beenSeized", 1, _RO, "A higher locality took the TPM away: never."),
        bit("Granted", 0, _RO, "The locality has the TPM."),
    ),
)
INTF_ID: Final = Register(
    "INTF_ID",
    0x30,
    _RO,
    "What kind of interface this is.",
    (
        Field("RID", 31, 24, _RO, "Revision."),
        bit("IntfSelLock", 19, _RO, "The selection is locked."),
        Field("InterfaceSelector", 18, 17, _RO, "Selected.", {0: "FIFO", 1: "CRB"}),
        Field("CapIFRes", 16, 15, _RO, "Reserved capabilities."),
        bit("CapCRB", 14, _RO, "Can be a CRB interface."),
        bit("CapFIFO", 13, _RO, "Can be a FIFO interface."),
        Field(
            "CapDataXferSizeSupport",
            12,
            11,
            _RO,
            "The largest access.",
            {0: "4 bytes", 1: "8 bytes", 2: "32 bytes", 3: "64 bytes"},
        ),
        bit("CapCRBChunk", 10, _RO, "Commands in chunks: not offered."),
        bit("CapCRBIdleBypass", 9, _RO, "Commands without Idle between them."),
        bit("CapLocality", 8, _RO, "There are five localities: only one here."),
        Field("InterfaceVersion", 7, 4, _RO, "Version of the type."),
        Field("InterfaceType", 3, 0, _RO, "Type.", {0: "FIFO", 1: "CRB", 15: "TIS 1.3"}),
    ),
    reset=0x00025811,
)
INTF_ID2: Final = Register(
    "INTF_ID2",
    0x34,
    _RO,
    "Who made it: QEMU's values.",
    (
        Field("DID", 31, 16, _RO, "Device."),
        Field("VID", 15, 0, _RO, "Vendor.", {0x1014: "IBM"}),
    ),
    reset=0x00001014,
)
CTRL_EXT: Final = Register(
    "CTRL_EXT", 0x38, _RO, "Two words for extensions: none.", last_offset=0x3C
)
CTRL_REQ: Final = Register(
    "CTRL_REQ",
    0x40,
    _WO,
    "Makes the TPM ready or idle; one bit at a time, done at once.",
    (
        bit("goIdle", 1, _WO, "Go to Idle."),
        bit("cmdReady", 0, _WO, "Become ready for a command."),
    ),
)
CTRL_STS: Final = Register(
    "CTRL_STS",
    0x44,
    _RO,
    "The state of the TPM.",
    (
        bit("tpmIdle", 1, _RO, "Idle; commands run all the same."),
        bit("tpmSts", 0, _RO, "The last start failed: its command had less than ten bytes."),
    ),
    reset=0x2,
)
CTRL_CANCEL: Final = Register(
    "CTRL_CANCEL",
    0x48,
    _WO,
    "Gives up the running command; reads 0.",
    (bit("cancel", 0, _WO, "Cancel, while Start is 1."),),
)
CTRL_START: Final = Register(
    "CTRL_START",
    0x4C,
    _W1,
    "Runs the command in the buffer; needs locAssigned.",
    (bit("Start", 0, _W1, "1 until the response is there."),),
)
INT_ENABLE: Final = Register("INT_ENABLE", 0x50, _RO, "Interrupts: none.")
INT_STS: Final = Register("INT_STS", 0x54, _RO, "Interrupts: none.")
_BYTES: Final = (Field("bytes", 31, 0, _RO, "Size in bytes."),)
_ADDRESS: Final = (Field("address", 31, 0, _RO, "Physical address."),)
CMD_SIZE: Final = Register(
    "CMD_SIZE", 0x58, _RO, "Size of the command buffer.", _BYTES, BUFFER_BYTES
)
CMD_LADDR: Final = Register(
    "CMD_LADDR",
    0x5C,
    _RO,
    "Address of the command buffer, low half.",
    _ADDRESS,
    BASE_ADDRESS + BUFFER_OFFSET,
)
CMD_HADDR: Final = Register(
    "CMD_HADDR", 0x60, _RO, "Address of the command buffer, high half.", _ADDRESS
)
RSP_SIZE: Final = Register(
    "RSP_SIZE",
    0x64,
    _RO,
    "Size of the response buffer, which is the same memory and has to have the same size.",
    _BYTES,
    BUFFER_BYTES,
)
RSP_LADDR: Final = Register(
    "RSP_LADDR",
    0x68,
    _RO,
    "Address of the response buffer, low half.",
    _ADDRESS,
    BASE_ADDRESS + BUFFER_OFFSET,
)
RSP_HADDR: Final = Register(
    "RSP_HADDR", 0x6C, _RO, "Address of the response buffer, high half.", _ADDRESS
)
DATA_BUFFER: Final = Register(
    "DATA_BUFFER",
    BUFFER_OFFSET,
    _RW,
    "Memory for the command, then for the response; what is behind the response reads 0.",
    (Field("data", 31, 0, _RW, "Bytes of the command or of the response."),),
    last_offset=0xFFC,
)

CRB: Final = RegisterMap(
    "crb",
    "CRB",
    "One page of 4 KiB, locality 0 only. A word below 80h that no register claims reads 0, and "
    "so does the space where other localities would have their pages.",
    (
        LOC_STATE,
        LOC_CTRL,
        LOC_STS,
        INTF_ID,
        INTF_ID2,
        CTRL_EXT,
        CTRL_REQ,
        CTRL_STS,
        CTRL_CANCEL,
        CTRL_START,
        INT_ENABLE,
        INT_STS,
        CMD_SIZE,
        CMD_LADDR,
        CMD_HADDR,
        RSP_SIZE,
        RSP_LADDR,
        RSP_HADDR,
        DATA_BUFFER,
    ),
    unclaimed=0,
)
