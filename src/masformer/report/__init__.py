"""Pictures of plans, plots and one self-contained page; nothing here imports torch."""
