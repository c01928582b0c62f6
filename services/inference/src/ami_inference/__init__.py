"""The body of AMI: senses, acts on a fixed time grid, streams its experience, follows the trainers' parameters."""

import os

# Read by OpenCV when it is imported: a lost camera is told by us, once, and not by its drivers at every try.
os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
