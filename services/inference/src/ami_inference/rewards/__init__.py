"""What drives the agent. A user-defined reward is any class with the methods of RewardModule, named by `_target_`."""

from ami_inference.rewards.curiosity import LearningProgress, NormalisedPredictionError, PredictionError
from ami_inference.rewards.extrinsic import ExtrinsicReward
from ami_inference.rewards.mixture import RewardMixture

__all__ = ["ExtrinsicReward", "LearningProgress", "NormalisedPredictionError", "PredictionError", "RewardMixture"]
