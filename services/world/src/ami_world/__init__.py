"""The simulated world: VizDoom behind the two faces of VRChat and OBS, OSC input and an MJPEG camera.

It knows nothing of agents, hubs or training; whoever lives here meets it through UDP and HTTP alone.
"""
