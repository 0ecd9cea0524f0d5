"""What runs in the rig's dom0: programs of checks, a line printed for each."""
