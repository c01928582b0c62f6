"""Where observations come from. A user-defined sensor is any class with read() and close(), named by `_target_`."""

from ami_inference.sensors.noise import NoiseSensor
from ami_inference.sensors.opencv_image import OpenCVImageSensor
from ami_inference.sensors.video import VideoSensor

__all__ = ["NoiseSensor", "OpenCVImageSensor", "VideoSensor"]
