"""Students trained to match the distribution of a teacher: score distillation and its relatives."""
