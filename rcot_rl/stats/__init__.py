"""Statistics that evaluation and monitoring share."""
