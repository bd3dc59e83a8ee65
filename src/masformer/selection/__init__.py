"""Which layers of a model stay full, under a budget: measured, searched, and tried on held-out data."""
