"""Names of TPM commands and response codes, for people who read logs, status and traces.

Tables only; nothing decides anything with them.  A number that is in no table is shown
as hexadecimal, never guessed at.

Sources: TPM 2.0 Library Specification, Part 2, 6.5.2 (TPM_CC) and 6.6 (TPM_RC);
TPM 1.2 Main, Part 2, 16 (return codes) and 17 (ordinals).
"""

from __future__ import annotations

from typing import Final

TPM_CC: Final[dict[int, str]] = {
    0x11F: "TPM2_NV_UndefineSpaceSpecial",
    0x120: "TPM2_EvictControl",
    0x121: "TPM2_HierarchyControl",
    0x122: "TPM2_NV_UndefineSpace",
    0x124: "TPM2_ChangeEPS",
    0x125: "TPM2_ChangePPS",
    0x126: "TPM2_Clear",
    0x127: "TPM2_ClearControl",
    0x128: "TPM2_ClockSet",
    0x129: "TPM2_HierarchyChangeAuth",
    0x12A: "TPM2_NV_DefineSpace",
    0x12B: "TPM2_PCR_Allocate",
    0x12C: "TPM2_PCR_SetAuthPolicy",
    0x12D: "TPM2_PP_Commands",
    0x12E: "TPM2_SetPrimaryPolicy",
    0x12F: "TPM2_FieldUpgradeStart",
    0x130: "TPM2_ClockRateAdjust",
    0x131: "TPM2_CreatePrimary",
    0x132: "TPM2_NV_GlobalWriteLock",
    0x133: "TPM2_GetCommandAuditDigest",
    0x134: "TPM2_NV_Increment",
    0x135: "TPM2_NV_SetBits",
    0x136: "TPM2_NV_Extend",
    0x137: "TPM2_NV_Write",
    0x138: "TPM2_NV_WriteLock",
    0x139: "TPM2_DictionaryAttackLockReset",
    0x13A: "TPM2_DictionaryAttackParameters",
    0x13B: "TPM2_NV_ChangeAuth",
    0x13C: "TPM2_PCR_Event",
    0x13D: "TPM2_PCR_Reset",
    0x13E: "TPM2_SequenceComplete",
    0x13F: "TPM2_SetAlgorithmSet",
    0x140: "TPM2_SetCommandCodeAuditStatus",
    0x141: "TPM2_FieldUpgradeData",
    0x142: "TPM2_IncrementalSelfTest",
    0x143: "TPM2_SelfTest",
    0x144: "TPM2_Startup",
    0x145: "TPM2_Shutdown",
    0x146: "TPM2_StirRandom",
    0x147: "TPM2_ActivateCredential",
    0x148: "TPM2_Certify",
    0x149: "TPM2_PolicyNV",
    0x14A: "TPM2_CertifyCreation",
    0x14B: "TPM2_Duplicate",
    0x14C: "TPM2_GetTime",
    0x14D: "TPM2_GetSessionAuditDigest",
    0x14E: "TPM2_NV_Read",
    0x14F: "TPM2_NV_ReadLock",
    0x150: "TPM2_ObjectChangeAuth",
    0x151: "TPM2_PolicySecret",
    0x152: "TPM2_Rewrap",
    0x153: "TPM2_Create",
    0x154: "TPM2_ECDH_ZGen",
    0x155: "TPM2_HMAC",
    0x156: "TPM2_Import",
    0x157: "TPM2_Load",
    0x158: "TPM2_Quote",
    0x159: "TPM2_RSA_Decrypt",
    0x15B: "TPM2_HMAC_Start",
    0x15C: "TPM2_SequenceUpdate",
    0x15D: "TPM2_Sign",
    0x15E: "TPM2_Unseal",
    0x160: "TPM2_PolicySigned",
    0x161: "TPM2_ContextLoad",
    0x162: "TPM2_ContextSave",
    0x163: "TPM2_ECDH_KeyGen",
    0x164: "TPM2_EncryptDecrypt",
    0x165: "TPM2_FlushContext",
    0x167: "TPM2_LoadExternal",
    0x168: "TPM2_MakeCredential",
    0x169: "TPM2_NV_ReadPublic",
    0x16A: "TPM2_PolicyAuthorize",
    0x16B: "TPM2_PolicyAuthValue",
    0x16C: "TPM2_PolicyCommandCode",
    0x16D: "TPM2_PolicyCounterTimer",
    0x16E: "TPM2_PolicyCpHash",
    0x16F: "TPM2_PolicyLocality",
    0x170: "TPM2_PolicyNameHash",
    0x171: "TPM2_PolicyOR",
    0x172: "TPM2_PolicyTicket",
    0x173: "TPM2_ReadPublic",
    0x174: "TPM2_RSA_Encrypt",
    0x176: "TPM2_StartAuthSession",
    0x177: "TPM2_VerifySignature",
    0x178: "TPM2_ECC_Parameters",
    0x179: "TPM2_FirmwareRead",
    0x17A: "TPM2_GetCapability",
    0x17B: "TPM2_GetRandom",
    0x17C: "TPM2_GetTestResult",
    0x17D: "TPM2_Hash",
    0x17E: "TPM2_PCR_Read",
    0x17F: "TPM2_PolicyPCR",
    0x180: "TPM2_PolicyRestart",
    0x181: "TPM2_ReadClock",
    0x182: "TPM2_PCR_Extend",
    0x183: "TPM2_PCR_SetAuthValue",
    0x184: "TPM2_NV_Certify",
    0x185: "TPM2_EventSequenceComplete",
    0x186: "TPM2_HashSequenceStart",
    0x187: "TPM2_PolicyPhysicalPresence",
    0x188: "TPM2_PolicyDuplicationSelect",
    0x189: "TPM2_PolicyGetDigest",
    0x18A: "TPM2_TestParms",
    0x18B: "TPM2_Commit",
    0x18C: "TPM2_PolicyPassword",
    0x18D: "TPM2_ZGen_2Phase",
    0x18E: "TPM2_EC_Ephemeral",
    0x18F: "TPM2_PolicyNvWritten",
    0x190: "TPM2_PolicyTemplate",
    0x191: "TPM2_CreateLoaded",
    0x192: "TPM2_PolicyAuthorizeNV",
    0x193: "TPM2_EncryptDecrypt2",
    0x194: "TPM2_AC_GetCapability",
    0x195: "TPM2_AC_Send",
    0x196: "TPM2_Policy_AC_SendSelect",
    0x197: "TPM2_CertifyX509",
    0x198: "TPM2_ACT_SetTimeout",
    0x199: "TPM2_ECC_Encrypt",
    0x19A: "TPM2_ECC_Decrypt",
    0x19B: "TPM2_PolicyCapability",
    0x19C: "TPM2_PolicyParameters",
    0x19D: "TPM2_NV_DefineSpace2",
    0x19E: "TPM2_NV_ReadPublic2",
    0x19F: "TPM2_SetCapability",
    0x1A0: "TPM2_ReadOnlyControl",
    0x1A1: "TPM2_PolicyTransportSPDM",
}
"""Command codes of TPM 2.0."""

TPM_ORD: Final[dict[int, str]] = {
    0x0A: "TPM_OIAP",
    0x0B: "TPM_OSAP",
    0x0C: "TPM_ChangeAuth",
    0x0D: "TPM_TakeOwnership",
    0x0E: "TPM_ChangeAuthAsymStart",
    0x0F: "TPM_ChangeAuthAsymFinish",
    0x10: "TPM_ChangeAuthOwner",
    0x11: "TPM_DSAP",
    0x12: "TPM_CMK_CreateTicket",
    0x13: "TPM_CMK_CreateKey",
    0x14: "TPM_Extend",
    0x15: "TPM_PcrRead",
    0x16: "TPM_Quote",
    0x17: "TPM_Seal",
    0x18: "TPM_Unseal",
    0x19: "TPM_DirWriteAuth",
    0x1A: "TPM_DirRead",
    0x1B: "TPM_CMK_CreateBlob",
    0x1C: "TPM_CMK_SetRestrictions",
    0x1D: "TPM_CMK_ApproveMA",
    0x1E: "TPM_UnBind",
    0x1F: "TPM_CreateWrapKey",
    0x20: "TPM_LoadKey",
    0x21: "TPM_GetPubKey",
    0x22: "TPM_EvictKey",
    0x23: "TPM_KeyControlOwner",
    0x24: "TPM_CMK_ConvertMigration",
    0x25: "TPM_MigrateKey",
    0x28: "TPM_CreateMigrationBlob",
    0x29: "TPM_DAA_Join",
    0x2A: "TPM_ConvertMigrationBlob",
    0x2B: "TPM_AuthorizeMigrationKey",
    0x2C: "TPM_CreateMaintenanceArchive",
    0x2D: "TPM_LoadMaintenanceArchive",
    0x2E: "TPM_KillMaintenanceFeature",
    0x2F: "TPM_LoadManuMaintPub",
    0x30: "TPM_ReadManuMaintPub",
    0x31: "TPM_DAA_Sign",
    0x32: "TPM_CertifyKey",
    0x33: "TPM_CertifyKey2",
    0x3C: "TPM_Sign",
    0x3D: "TPM_Sealx",
    0x3E: "TPM_Quote2",
    0x3F: "TPM_SetCapability",
    0x40: "TPM_ResetLockValue",
    0x41: "TPM_LoadKey2",
    0x46: "TPM_GetRandom",
    0x47: "TPM_StirRandom",
    0x50: "TPM_SelfTestFull",
    0x52: "TPM_CertifySelfTest",
    0x53: "TPM_ContinueSelfTest",
    0x54: "TPM_GetTestResult",
    0x5A: "TPM_Reset",
    0x5B: "TPM_OwnerClear",
    0x5C: "TPM_DisableOwnerClear",
    0x5D: "TPM_ForceClear",
    0x5E: "TPM_DisableForceClear",
    0x64: "TPM_GetCapabilitySigned",
    0x65: "TPM_GetCapability",
    0x66: "TPM_GetCapabilityOwner",
    0x6E: "TPM_OwnerSetDisable",
    0x6F: "TPM_PhysicalEnable",
    0x70: "TPM_PhysicalDisable",
    0x71: "TPM_SetOwnerInstall",
    0x72: "TPM_PhysicalSetDeactivated",
    0x73: "TPM_SetTempDeactivated",
    0x74: "TPM_SetOperatorAuth",
    0x75: "TPM_SetOwnerPointer",
    0x78: "TPM_CreateEndorsementKeyPair",
    0x79: "TPM_MakeIdentity",
    0x7A: "TPM_ActivateIdentity",
    0x7C: "TPM_ReadPubek",
    0x7D: "TPM_OwnerReadPubek",
    0x7E: "TPM_DisablePubekRead",
    0x7F: "TPM_CreateRevocableEK",
    0x80: "TPM_RevokeTrust",
    0x81: "TPM_OwnerReadInternalPub",
    0x82: "TPM_GetAuditEvent",
    0x83: "TPM_GetAuditEventSigned",
    0x85: "TPM_GetAuditDigest",
    0x86: "TPM_GetAuditDigestSigned",
    0x8C: "TPM_GetOrdinalAuditStatus",
    0x8D: "TPM_SetOrdinalAuditStatus",
    0x96: "TPM_Terminate_Handle",
    0x97: "TPM_Init",
    0x98: "TPM_SaveState",
    0x99: "TPM_Startup",
    0x9A: "TPM_SetRedirection",
    0xA0: "TPM_SHA1Start",
    0xA1: "TPM_SHA1Update",
    0xA2: "TPM_SHA1Complete",
    0xA3: "TPM_SHA1CompleteExtend",
    0xAA: "TPM_FieldUpgrade",
    0xB4: "TPM_SaveKeyContext",
    0xB5: "TPM_LoadKeyContext",
    0xB6: "TPM_SaveAuthContext",
    0xB7: "TPM_LoadAuthContext",
    0xB8: "TPM_SaveContext",
    0xB9: "TPM_LoadContext",
    0xBA: "TPM_FlushSpecific",
    0xC8: "TPM_PCR_Reset",
    0xCC: "TPM_NV_DefineSpace",
    0xCD: "TPM_NV_WriteValue",
    0xCE: "TPM_NV_WriteValueAuth",
    0xCF: "TPM_NV_ReadValue",
    0xD0: "TPM_NV_ReadValueAuth",
    0xD1: "TPM_Delegate_UpdateVerification",
    0xD2: "TPM_Delegate_Manage",
    0xD4: "TPM_Delegate_CreateKeyDelegation",
    0xD5: "TPM_Delegate_CreateOwnerDelegation",
    0xD6: "TPM_Delegate_VerifyDelegation",
    0xD8: "TPM_Delegate_LoadOwnerDelegation",
    0xDB: "TPM_Delegate_ReadTable",
    0xDC: "TPM_CreateCounter",
    0xDD: "TPM_IncrementCounter",
    0xDE: "TPM_ReadCounter",
    0xDF: "TPM_ReleaseCounter",
    0xE0: "TPM_ReleaseCounterOwner",
    0xE6: "TPM_EstablishTransport",
    0xE7: "TPM_ExecuteTransport",
    0xE8: "TPM_ReleaseTransportSigned",
    0xF1: "TPM_GetTicks",
    0xF2: "TPM_TickStampBlob",
    0x4000000A: "TSC_PhysicalPresence",
    0x4000000B: "TSC_ResetEstablishmentBit",
}
"""Ordinals of TPM 1.2."""

_RC_1_2: Final = (
    "SUCCESS AUTHFAIL BADINDEX BAD_PARAMETER AUDITFAILURE CLEAR_DISABLED DEACTIVATED DISABLED "
    "DISABLED_CMD FAIL BAD_ORDINAL INSTALL_DISABLED INVALID_KEYHANDLE KEYNOTFOUND "
    "INAPPROPRIATE_ENC MIGRATEFAIL INVALID_PCR_INFO NOSPACE NOSRK NOTSEALED_BLOB OWNER_SET "
    "RESOURCES SHORTRANDOM SIZE WRONGPCRVAL BAD_PARAM_SIZE SHA_THREAD SHA_ERROR "
    "FAILEDSELFTEST AUTH2FAIL BADTAG IOERROR ENCRYPT_ERROR DECRYPT_ERROR INVALID_AUTHHANDLE "
    "NO_ENDORSEMENT INVALID_KEYUSAGE WRONG_ENTITYTYPE INVALID_POSTINIT INAPPROPRIATE_SIG "
    "BAD_KEY_PROPERTY BAD_MIGRATION BAD_SCHEME BAD_DATASIZE BAD_MODE BAD_PRESENCE BAD_VERSION "
    "NO_WRAP_TRANSPORT AUDITFAIL_UNSUCCESSFUL AUDITFAIL_SUCCESSFUL NOTRESETABLE NOTLOCAL "
    "BAD_TYPE INVALID_RESOURCE NOTFIPS INVALID_FAMILY NO_NV_PERMISSION REQUIRES_SIGN "
    "KEY_NOTSUPPORTED AUTH_CONFLICT AREA_LOCKED BAD_LOCALITY READ_ONLY PER_NOWRITE "
    "FAMILYCOUNT WRITE_LOCKED BAD_ATTRIBUTES INVALID_STRUCTURE KEY_OWNER_CONTROL BAD_COUNTER "
    "NOT_FULLWRITE CONTEXT_GAP MAXNVWRITES NOOPERATOR RESOURCEMISSING DELEGATE_LOCK "
    "DELEGATE_FAMILY DELEGATE_ADMIN TRANSPORT_NOTEXCLUSIVE OWNER_CONTROL DAA_RESOURCES "
    "DAA_INPUT_DATA0 DAA_INPUT_DATA1 DAA_ISSUER_SETTINGS DAA_TPM_SETTINGS DAA_STAGE "
    "DAA_ISSUER_VALIDITY DAA_WRONG_W BAD_HANDLE BAD_DELEGATE BADCONTEXT TOOMANYCONTEXTS "
    "MA_TICKET_SIGNATURE MA_DESTINATION MA_SOURCE MA_AUTHORITY"
)

TPM_RC_1_2: Final[dict[int, str]] = {
    **{number: f"TPM_{name}" for number, name in enumerate(_RC_1_2.split())},
    0x61: "TPM_PERMANENTEK",
    0x62: "TPM_BAD_SIGNATURE",
    0x63: "TPM_NOCONTEXTSPACE",
    0x800: "TPM_RETRY",
    0x801: "TPM_NEEDS_SELFTEST",
    0x802: "TPM_DOING_SELFTEST",
    0x803: "TPM_DEFEND_LOCK_RUNNING",
}
"""Return codes of TPM 1.2."""

TPM_RC_VER1: Final[dict[int, str]] = {
    0x100: "TPM_RC_INITIALIZE",
    0x101: "TPM_RC_FAILURE",
    0x103: "TPM_RC_SEQUENCE",
    0x10B: "TPM_RC_PRIVATE",
    0x119: "TPM_RC_HMAC",
    0x120: "TPM_RC_DISABLED",
    0x121: "TPM_RC_EXCLUSIVE",
    0x124: "TPM_RC_AUTH_TYPE",
    0x125: "TPM_RC_AUTH_MISSING",
    0x126: "TPM_RC_POLICY",
    0x127: "TPM_RC_PCR",
    0x128: "TPM_RC_PCR_CHANGED",
    0x12D: "TPM_RC_UPGRADE",
    0x12E: "TPM_RC_TOO_MANY_CONTEXTS",
    0x12F: "TPM_RC_AUTH_UNAVAILABLE",
    0x130: "TPM_RC_REBOOT",
    0x131: "TPM_RC_UNBALANCED",
    0x142: "TPM_RC_COMMAND_SIZE",
    0x143: "TPM_RC_COMMAND_CODE",
    0x144: "TPM_RC_AUTHSIZE",
    0x145: "TPM_RC_AUTH_CONTEXT",
    0x146: "TPM_RC_NV_RANGE",
    0x147: "TPM_RC_NV_SIZE",
    0x148: "TPM_RC_NV_LOCKED",
    0x149: "TPM_RC_NV_AUTHORIZATION",
    0x14A: "TPM_RC_NV_UNINITIALIZED",
    0x14B: "TPM_RC_NV_SPACE",
    0x14C: "TPM_RC_NV_DEFINED",
    0x150: "TPM_RC_BAD_CONTEXT",
    0x151: "TPM_RC_CPHASH",
    0x152: "TPM_RC_PARENT",
    0x153: "TPM_RC_NEEDS_TEST",
    0x154: "TPM_RC_NO_RESULT",
    0x155: "TPM_RC_SENSITIVE",
    0x156: "TPM_RC_READ_ONLY",
}
"""Format-zero errors of TPM 2.0."""

TPM_RC_WARN: Final[dict[int, str]] = {
    0x901: "TPM_RC_CONTEXT_GAP",
    0x902: "TPM_RC_OBJECT_MEMORY",
    0x903: "TPM_RC_SESSION_MEMORY",
    0x904: "TPM_RC_MEMORY",
    0x905: "TPM_RC_SESSION_HANDLES",
    0x906: "TPM_RC_OBJECT_HANDLES",
    0x907: "TPM_RC_LOCALITY",
    0x908: "TPM_RC_YIELDED",
    0x909: "TPM_RC_CANCELED",
    0x90A: "TPM_RC_TESTING",
    **{0x910 + n: f"TPM_RC_REFERENCE_H{n}" for n in range(7)},
    **{0x918 + n: f"TPM_RC_REFERENCE_S{n}" for n in range(7)},
    0x920: "TPM_RC_NV_RATE",
    0x921: "TPM_RC_LOCKOUT",
    0x922: "TPM_RC_RETRY",
    0x923: "TPM_RC_NV_UNAVAILABLE",
}
"""Format-zero warnings of TPM 2.0."""

TPM_RC_FMT1: Final[dict[int, str]] = {
    0x01: "TPM_RC_ASYMMETRIC",
    0x02: "TPM_RC_ATTRIBUTES",
    0x03: "TPM_RC_HASH",
    0x04: "TPM_RC_VALUE",
    0x05: "TPM_RC_HIERARCHY",
    0x07: "TPM_RC_KEY_SIZE",
    0x08: "TPM_RC_MGF",
    0x09: "TPM_RC_MODE",
    0x0A: "TPM_RC_TYPE",
    0x0B: "TPM_RC_HANDLE",
    0x0C: "TPM_RC_KDF",
    0x0D: "TPM_RC_RANGE",
    0x0E: "TPM_RC_AUTH_FAIL",
    0x0F: "TPM_RC_NONCE",
    0x10: "TPM_RC_PP",
    0x12: "TPM_RC_SCHEME",
    0x15: "TPM_RC_SIZE",
    0x16: "TPM_RC_SYMMETRIC",
    0x17: "TPM_RC_TAG",
    0x18: "TPM_RC_SELECTOR",
    0x1A: "TPM_RC_INSUFFICIENT",
    0x1B: "TPM_RC_SIGNATURE",
    0x1C: "TPM_RC_KEY",
    0x1D: "TPM_RC_POLICY_FAIL",
    0x1F: "TPM_RC_INTEGRITY",
    0x20: "TPM_RC_TICKET",
    0x21: "TPM_RC_RESERVED_BITS",
    0x22: "TPM_RC_BAD_AUTH",
    0x23: "TPM_RC_EXPIRED",
    0x24: "TPM_RC_POLICY_CC",
    0x25: "TPM_RC_BINDING",
    0x26: "TPM_RC_CURVE",
    0x27: "TPM_RC_ECC_POINT",
    0x28: "TPM_RC_FW_LIMITED",
    0x29: "TPM_RC_SVN_LIMITED",
    0x30: "TPM_RC_CHANNEL",
    0x31: "TPM_RC_CHANNEL_KEY",
}
"""Format-one errors of TPM 2.0: bits 5 to 0 of the code."""

_FMT1: Final = 0x080
_PARAMETER: Final = 0x040
_SESSION: Final = 0x800


def ordinal_name(ordinal: int) -> str:
    """Return a command's name, of either family; their ordinals do not overlap."""
    return TPM_CC.get(ordinal) or TPM_ORD.get(ordinal) or f"{ordinal:#010x}"


def response_code_name(code: int, *, tpm_1_2: bool = False) -> str:
    """Return a response code's name; for TPM 2.0 with the handle, session or parameter it is about.

    TPM 2.0 also uses TPM_RC_BAD_TAG, which is the code of TPM 1.2.
    """
    if tpm_1_2:
        return TPM_RC_1_2.get(code, f"{code:#x}")
    if code == 0:
        return "TPM_RC_SUCCESS"
    if code == 0x1E:
        return "TPM_RC_BAD_TAG"
    if code > 0xFFF:
        return f"{code:#x}"
    if code & _FMT1:
        name = TPM_RC_FMT1.get(code & 0x3F, f"{code:#x}")
        number = code >> 8 & 0xF
        if code & _PARAMETER:
            return f"{name} (parameter {number})" if number else name
        kind = "session" if code & _SESSION else "handle"
        number &= 7
        return f"{name} ({kind} {number})" if number else name
    return TPM_RC_VER1.get(code) or TPM_RC_WARN.get(code) or f"{code:#x}"
