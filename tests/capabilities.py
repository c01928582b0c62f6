"""Marks of tests that need what not every system has."""

from __future__ import annotations

import pytest

from ami_shared.shared_memory import can_share

sharing_memory = pytest.mark.skipif(not can_share(), reason="this system has no memory that is shared without a name")
