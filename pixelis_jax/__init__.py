"""A vision-language agent that reasons in pixel space, trained and adapted online in JAX."""
