"""One file a command: the composition point, where the hall meets the wings."""
