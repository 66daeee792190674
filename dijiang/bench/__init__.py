"""How fast a bundle runs here, how close that is to what the hardware allows, and what is installed."""
