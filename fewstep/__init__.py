"""fewstep: distil diffusion and flow teachers into students of one to four steps."""

__version__ = "0.1.0"
