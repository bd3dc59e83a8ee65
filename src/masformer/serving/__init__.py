"""What serving engines make of a plan."""
