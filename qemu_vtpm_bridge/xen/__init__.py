"""What both ends of tpmif need of Xen: XenStore, XenBus names, grants and event channels."""
