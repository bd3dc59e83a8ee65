"""Documents, the training sequences made from them, synthetic recall, and the demo's own model and speeches."""
