"""Students taught by a discriminator."""
