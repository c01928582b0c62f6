"""The command line `ami`: talks to a controller anywhere, and runs a whole experiment on this machine."""
