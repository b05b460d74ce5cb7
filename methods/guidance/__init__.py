"""Guidance folded into one evaluation a step."""
