"""What a model is trained with: losses."""
