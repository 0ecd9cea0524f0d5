"""What the bridge costs: `make bench` measures it against the least that a forwarder costs."""
