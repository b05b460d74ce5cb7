"""Metrics, reports and the leaderboard."""

if __name__ != "fewstep.evaluation":
    # The folder sits at the repository's root, so a bare import would find it and make a second copy of every class.
    raise ImportError(f"`{__name__}` is a folder of fewstep: write `import fewstep.evaluation` instead")
