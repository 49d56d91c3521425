"""disttrain: teach Stable Diffusion new subjects, on a laptop or on many nodes, from one config."""

__version__ = "0.1.0"
