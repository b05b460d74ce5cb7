"""Data sets, embedded and from disk, and the loader that restores its position."""
