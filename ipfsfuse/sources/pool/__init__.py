"""Several sources as one: order, health, hedging, bounds, and the check of every block."""
