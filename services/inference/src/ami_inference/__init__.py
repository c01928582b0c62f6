"""The body of AMI: observes and acts on a fixed time grid, streams its experience, follows the trainers' parameters."""

import os

# Read by OpenCV when it is imported: this package reports a lost camera once; drivers would at every attempt.
os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
