"""What actions move. A user-defined actuator is any class with the methods of Actuator, named by `_target_`."""

from ami_inference.actuators.null import NullActuator
from ami_inference.actuators.vrchat_osc import VRChatOSCDiscreteActuator

__all__ = ["NullActuator", "VRChatOSCDiscreteActuator"]
