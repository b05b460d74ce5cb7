"""Networks behind one call, what conditions them, and the players of a distillation."""
