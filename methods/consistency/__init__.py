"""Students trained to agree with themselves along a trajectory of the teacher."""
