"""The theory: processes, predictions, solvers, times and closed-form teachers."""
