"""Programs to start from, and the data they train on."""
