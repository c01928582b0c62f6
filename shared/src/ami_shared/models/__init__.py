"""Models that bodies and trainers share. Needs the extra `ami-shared[torch]`."""
