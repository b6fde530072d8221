"""What runs on a device: no compiler, only the standard library and numpy."""
