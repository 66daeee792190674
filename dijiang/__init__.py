"""DiJiang linear-attention checkpoints to production and the edge."""

__version__ = "0.1.0"
