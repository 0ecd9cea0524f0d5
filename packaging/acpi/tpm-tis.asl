/*
 * Tells a guest that the vfio-user function in slot 4 of its root bus is a TPM (TIS).
 *
 * A TPM is found through ACPI, never through PCI: MSFT0101 names it to the operating
 * system, and its resource is where the firmware put the function's BAR 0, which is read
 * from configuration space whenever somebody asks.  The device stands below its PCI
 * function: so an operating system sees that the resource lies within the BAR.  Were it
 * beside it, Linux would take the two for a conflict and move the BAR.
 *
 * There is no interrupt in _CRS: drivers poll, as with QEMU's own device.
 *
 *     iasl -p tpm-tis packaging/acpi/tpm-tis.asl
 *     qemu-system-x86_64 ... -acpitable file=tpm-tis.aml -acpitable file=tpm2.aml
 *
 * QEMU's own tables have the function already, under a name made of its slot: S20 is slot 4,
 * function 0 (4 * 8 = 20h).  Another slot is another name here.
 */
DefinitionBlock ("", "SSDT", 2, "QVTPMB", "VFIOTIS", 1)
{
    External (\_SB.PCI0.S20, DeviceObj)

    Scope (\_SB.PCI0.S20)
    {
        OperationRegion (CONF, PCI_Config, 0x00, 0x40)
        Field (CONF, DWordAcc, NoLock, Preserve)
        {
            Offset (0x10),
            BAR0, 32
        }

        Device (TPM)
        {
            Name (_HID, "MSFT0101")
            Name (_CID, "MSFT0101")
            Name (_STR, Unicode ("TPM 2.0 Device"))
            Name (_STA, 0x0F)
            Method (_CRS, 0, Serialized)
            {
                Name (RBUF, ResourceTemplate ()
                {
                    Memory32Fixed (ReadWrite, 0x00000000, 0x00005000, MEM0)
                })
                CreateDWordField (RBUF, MEM0._BAS, BASE)
                BASE = BAR0 & 0xFFFFFFF0
                Return (RBUF)
            }
        }
    }
}
