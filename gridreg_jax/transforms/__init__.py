"""Pure functions from control grid to displacement to warped image."""
