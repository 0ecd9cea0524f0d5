"""What a toolstack does for a guest: the XenStore entries that join two ends."""
