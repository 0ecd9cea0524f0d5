/*
 * The TPM2 table for a TIS device: start method 6, memory mapped I/O; no control area,
 * since the FIFO interface has none.  See tpm-tis.asl.
 */
[0004]                          Signature : "TPM2"
[0004]                       Table Length : 00000000
[0001]                           Revision : 04
[0001]                           Checksum : 00
[0006]                             Oem ID : "QVTPMB"
[0008]                       Oem Table ID : "VFIOTPM2"
[0004]                       Oem Revision : 00000001
[0004]                    Asl Compiler ID : "INTL"
[0004]              Asl Compiler Revision : 00000001

[0002]                     Platform Class : 0000
[0002]                           Reserved : 0000
[0008]                    Control Address : 0000000000000000
[0004]                       Start Method : 00000006
[000C]                  Method Parameters : 00 00 00 00 00 00 00 00 00 00 00 00
[0004]                 Minimum Log Length : 00010000
[0008]                        Log Address : 0000000000000000
