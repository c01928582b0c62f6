"""What decides. A user-defined agent is any class with the methods of Agent, named by `_target_`."""

from ami_inference.agents.curious import CuriosityAgent
from ami_inference.agents.random_holding import RandomHoldingAgent

__all__ = ["CuriosityAgent", "RandomHoldingAgent"]
