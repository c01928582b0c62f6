"""What all AMI services share: wire format, sockets, lifecycle, time grid, configuration, models."""

__version__ = "0.1.0"
