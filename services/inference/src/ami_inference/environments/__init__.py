"""What a body lives in: observations in, actions out. A user-defined environment is named by `_target_`."""

from ami_inference.environments.gymnasium import GymnasiumEnvironment
from ami_inference.environments.realtime import RealTimeEnvironment

__all__ = ["GymnasiumEnvironment", "RealTimeEnvironment"]
