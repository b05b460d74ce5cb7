"""How teachers themselves are trained."""
