"""Several sources as one: order, health, hedging, concurrency limits, and the verification of every block."""
