"""The hub of AMI, its lifecycle, parameter store and learning record, and the command line `ami`."""
