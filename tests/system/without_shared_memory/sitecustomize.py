"""Takes away from every process that has this folder on its path what lets it share memory, as on Windows."""

import os

if hasattr(os, "memfd_create"):
    del os.memfd_create
