"""The simulated world: VizDoom behind the two faces of VRChat and OBS, OSC input and an MJPEG camera.

It knows nothing of agents, hubs or training; bodies use it through UDP and HTTP only.
"""
