"""Sources behind a network: trustless gateways and Kubo nodes, over one HTTP layer."""
