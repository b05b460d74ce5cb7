"""Students of whole trajectories: straightened, halved, or corrected by their own ends."""
