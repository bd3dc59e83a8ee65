"""Documents and the demo's own model and speeches."""
