"""Loss terms that methods share."""
