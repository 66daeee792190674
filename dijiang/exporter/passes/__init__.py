"""Graph passes: each one small, exact, and with its pre- and postcondition."""
