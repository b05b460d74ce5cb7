"""Maps between two times of a teacher's trajectories: average velocities."""
