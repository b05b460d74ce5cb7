"""Experiment files, shipped inside the wheel."""

if __name__ != "fewstep.configs":
    # The folder sits at the repository's root, so a bare import would find it and make a second copy of every class.
    raise ImportError(f"`{__name__}` is a folder of fewstep: write `import fewstep.configs` instead")
