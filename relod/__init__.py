"""relod: real-time reinforcement learning on physical robots from camera images."""

__version__ = "0.1.0"
