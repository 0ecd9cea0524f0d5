"""The data sheet of the TIS (FIFO) device.

Values and access rules are those of QEMU's tpm-tis, which is what a guest is to see
(promise P11); where the specification says otherwise, the meaning says so.  Sources: TCG
PC Client TPM Interface Specification 1.3, 5; PC Client Platform TPM Profile, 6.5.
"""

from __future__ import annotations

from typing import Final

from .registers import Access, Field, Register, RegisterMap, bit

_RO, _RW, _W1, _W1C = (
    Access.READ_ONLY,
    Access.READ_WRITE,
    Access.WRITE_ONE_ACTS,
    Access.WRITE_ONE_CLEARS,
)

LOCALITIES: Final = 5
BUFFER_MAX_BYTES: Final = 4096
"""The largest command and response, whatever the TPM behind takes."""

ACCESS: Final = Register(
    "ACCESS",
    0x00,
    _W1,
    "Who uses the TPM: a locality asks for it, gives it up, or takes it from a lower one.",
    (
        bit("tpmRegValidSts", 7, _RO, "The other bits are valid: always, and at once."),
        bit(
            "activeLocality",
            5,
            _W1,
            "This locality is active; written by it: relinquish.",
            "relinquish",
        ),
        bit("beenSeized", 4, _W1C, "A higher locality took the TPM away.", "clear beenSeized"),
        bit("Seize", 3, _W1, "Take the TPM from a lower locality; reads 0."),
        bit("pendingRequest", 2, _RO, "Some other locality has requestUse set."),
        bit("requestUse", 1, _W1, "This locality waits for the TPM; written: ask for it."),
        bit("tpmEstablishment", 0, _RO, "0 once a D-RTM sequence has happened."),
    ),
    reset=0x81,
)

_INTERRUPTS: Final = (
    bit("commandReady", 7, _RW, "The locality became ready for a command."),
    bit("localityChange", 2, _RW, "The locality became the active one."),
    bit("stsValid", 1, _RW, "STS became valid."),
    bit("dataAvail", 0, _RW, "A response came."),
)

INT_ENABLE: Final = Register(
    "INT_ENABLE",
    0x08,
    _RW,
    "Which events raise the interrupt; each locality has its own.",
    (
        bit("globalIntEnable", 31, _RW, "Without it no event of this locality interrupts."),
        _INTERRUPTS[0],
        Field(
            "typePolarity",
            4,
            3,
            _RW,
            "Kept, and not used: the line is active high.",
            {0: "high level", 1: "low level", 2: "rising edge", 3: "falling edge"},
        ),
        *_INTERRUPTS[1:],
    ),
    reset=0x08,
)

INT_VECTOR: Final = Register(
    "INT_VECTOR",
    0x0C,
    _RO,
    "The ISA interrupt; writes vanish, though the specification lets the owner choose.",
    (Field("sirqVec", 3, 0, _RO, "Interrupt number."),),
    reset=5,
)

INT_STATUS: Final = Register(
    "INT_STATUS",
    0x10,
    _W1C,
    "Which events have happened; each locality has its own. The line goes low when its "
    "active owner has cleared all of them.",
    tuple(bit(f.name, f.low, _W1C, f.meaning, f"clear {f.name}") for f in _INTERRUPTS),
)

INTF_CAPABILITY: Final = Register(
    "INTF_CAPABILITY",
    0x14,
    _RO,
    "What the interface can do.",
    (
        Field(
            "interfaceVersion",
            30,
            28,
            _RO,
            "Which specification the interface follows.",
            {0: "TIS 1.21", 2: "TIS 1.3", 3: "PTP, TPM 2.0"},
        ),
        Field(
            "dataTransferSizeSupport",
            10,
            9,
            _RO,
            "The largest access to the FIFO.",
            {0: "legacy", 1: "8 bytes", 2: "32 bytes", 3: "64 bytes"},
        ),
        bit("burstCountStatic", 8, _RO, "0: burstCount changes with what fits."),
        bit("commandReadyIntSupport", 7, _RO, "Can interrupt for commandReady."),
        bit("interruptEdgeFalling", 6, _RO, "Falling edge."),
        bit("interruptEdgeRising", 5, _RO, "Rising edge."),
        bit("interruptLevelLow", 4, _RO, "Low level."),
        bit("interruptLevelHigh", 3, _RO, "High level."),
        bit("localityChangeIntSupport", 2, _RO, "Can interrupt for localityChange."),
        bit("stsValidIntSupport", 1, _RO, "Can interrupt for stsValid."),
        bit("dataAvailIntSupport", 0, _RO, "Can interrupt for dataAvail."),
    ),
    reset=0x30000697,
)
INTF_CAPABILITY_1_2: Final = 0x20000697

STS: Final = Register(
    "STS",
    0x18,
    _W1,
    "The state of this locality's command, and how many bytes the FIFO takes or gives.",
    (
        Field("tpmFamily", 27, 26, _RO, "Family.", {0: "TPM 1.2", 1: "TPM 2.0"}),
        bit(
            "resetEstablishmentBit", 25, _W1, "TPM 2.0, locality 3: set tpmEstablishment; reads 0."
        ),
        bit("commandCancel", 24, _W1, "TPM 2.0: give up the running command; reads 0."),
        Field("burstCount", 23, 8, _RO, "Bytes that the FIFO takes or gives without a wait."),
        bit("stsValid", 7, _RO, "dataAvail and Expect are valid."),
        bit("commandReady", 6, _W1, "Ready for a command; written: become ready, abort."),
        bit("tpmGo", 5, _W1, "Run the command; reads 0."),
        bit("dataAvail", 4, _RO, "The FIFO has more of the response."),
        bit("Expect", 3, _RO, "The FIFO needs more of the command."),
        bit("selfTestDone", 2, _RO, "A ContinueSelfTest (ordinal 53h) has ended well."),
        bit("responseRetry", 1, _W1, "Give the response from its start again; reads 0."),
    ),
    reset=0x04000000,
    others_read=0xFFFFFFFF,
)

DATA_FIFO: Final = Register(
    "DATA_FIFO",
    0x24,
    _RW,
    "Takes the command, gives the response, a byte per lane, low lanes first.",
    (Field("data", 31, 0, _RW, "Bytes of the command or of the response."),),
    reset=0xFFFFFFFF,
    others_read=0xFFFFFFFF,
)

INTERFACE_ID: Final = Register(
    "INTERFACE_ID",
    0x30,
    _RW,
    "What kind of interface this is; with TPM 1.2 all ones, which stands for TIS 1.3.",
    (
        bit("IntfSelLock", 19, _W1, "The selection is locked: kept in all localities until reset."),
        Field("InterfaceSelector", 18, 17, _RO, "Ignored: there is nothing to select."),
        Field("CapIFRes", 16, 15, _RO, "Reserved capabilities."),
        bit("CapCRB", 14, _RO, "Could be a CRB interface."),
        bit("CapFIFO", 13, _RO, "Can be a FIFO interface."),
        Field("CapDataXferSizeSupport", 12, 11, _RO, "Legacy here: INTF_CAPABILITY has the word."),
        bit("CapCRBChunk", 10, _RO, "Commands in chunks; never of a FIFO."),
        bit("CapCRBIdleBypass", 9, _RO, "Commands without Idle; never of a FIFO."),
        bit("CapLocality", 8, _RO, "There are five localities."),
        Field("InterfaceVersion", 7, 4, _RO, "Version of the type."),
        Field("InterfaceType", 3, 0, _RO, "Type.", {0: "FIFO", 1: "CRB", 15: "TIS 1.3"}),
    ),
    reset=0x00002100,
)
INTERFACE_ID_1_2: Final = 0xFFFFFFFF

XDATA_FIFO: Final = Register(
    "XDATA_FIFO",
    0x80,
    _RW,
    "The FIFO again, wide enough for 8-byte accesses; each word is the same register.",
    DATA_FIFO.fields,
    reset=0xFFFFFFFF,
    others_read=0xFFFFFFFF,
    last_offset=0xBC,
)

DID_VID: Final = Register(
    "DID_VID",
    0xF00,
    _RO,
    "Who made it: QEMU's values, which drivers know.",
    (
        Field("did", 31, 16, _RO, "Device."),
        Field("vid", 15, 0, _RO, "Vendor.", {0x1014: "IBM"}),
    ),
    reset=0x00011014,
)

RID: Final = Register(
    "RID",
    0xF04,
    _RO,
    "Revision.",
    (Field("rid", 7, 0, _RO, "Revision number."),),
    reset=1,
)

TIS: Final = RegisterMap(
    "tis",
    "TIS (FIFO)",
    "Five pages of 4 KiB, one for each locality 0 to 4. Locality 4 reads like the others, and "
    "all writes to it vanish: they belong to the processor's D-RTM launch, and a guest must not "
    "be able to make them. An address that no register claims reads as FFh bytes.",
    (
        ACCESS,
        INT_ENABLE,
        INT_VECTOR,
        INT_STATUS,
        INTF_CAPABILITY,
        STS,
        DATA_FIFO,
        INTERFACE_ID,
        XDATA_FIFO,
        DID_VID,
        RID,
    ),
    localities=LOCALITIES,
)
