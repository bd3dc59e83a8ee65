"""What a model can do, measured on documents: loss by position, and generation with its speed and cache."""
